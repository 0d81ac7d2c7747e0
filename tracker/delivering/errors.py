"""What can go wrong with one link, told for a person."""

from tracker.core.errors import TrackerError


class MediaError(TrackerError):
    """A file could not be fetched. Unless it is of a kind below, trying again changes nothing."""


class LinkRefused(MediaError):
    """The link leads where no request is sent: no http(s), a private address, too many hops."""


class MediaUnavailable(MediaError):
    """A file could not be fetched now; the next attempt may go on where this one stopped.

    `retry_after` is how many seconds the server asked to wait, if it did.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
