"""Changes of runs as they happen, resumable by the number of their event."""

from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Generic

from tracker.core.events import RunFilter
from tracker.core.record import Record
from tracker.library.run import AnyRun
from tracker.polling.follow import until_available
from tracker.services import Services
from tracker.web.http.limits import Limits
from tracker.web.stream.broadcaster import Broadcaster
from tracker.web.stream.reader import Change

if TYPE_CHECKING:
    from datetime import datetime

WAIT_SECONDS: Final = 60.0
"""How long one wait for the next change lasts; another follows."""
READERS: Final = 10_000
"""The loops over events in one process; the API's limit protects from strangers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunChange(Generic[AnyRun]):
    """A change of a run, and the run as it is now.

    `event_id` continues from here after an interruption (`tracker.events(after=event_id)`); it is
    `None` where a run was lost or came back, which is no event. `at`, `source` and `status` are
    those of the event: the run may be further by now.
    """

    event_id: int | None
    at: "datetime | None"
    source: str | None
    status: str
    run: AnyRun


class ChangeFeed:
    """Hands the changes of runs to any number of loops."""

    def __init__(self, services: Services) -> None:
        limits = Limits(stream_readers=READERS)
        self._broadcaster = Broadcaster(services.database, services.signals, limits)
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._broadcaster.close()

    async def follow(
        self, runs: RunFilter, after: int | None, bound: Callable[[Record], AnyRun]
    ) -> AsyncGenerator[RunChange[AnyRun], None]:
        """The changes of these runs after the event `after`, or from now on.

        A loop that is too slow continues from the database. An `after` that the database does not
        have begins with what comes next. Raises `StoreUnavailable` if it does not answer for a
        minute when changes are read from it.
        """
        broadcaster = self._broadcaster
        while not self._closed:
            reader = await until_available(partial(broadcaster.subscribe, runs), None)
            try:
                reached: bool | None = None
                if after is not None:
                    reached = await until_available(partial(broadcaster.has_reached, after), None)
                if after is None or not reached:
                    after = broadcaster.sent_upto
                async for page in broadcaster.missed(after):
                    for change in _shown(page, runs, bound):
                        yield change
                after = max(after, broadcaster.sent_upto)
                reader.go_live(after)  # nothing has been awaited since the last page
                while (taken := await reader.take(WAIT_SECONDS)) is not None:
                    position = reader.position
                    changes = [one for one in taken if isinstance(one, Change)]
                    for change in _shown(changes, runs, bound):
                        yield change
                    after = position
            finally:
                reader.close()


def _shown(
    changes: list[Change], runs: RunFilter, bound: Callable[[Record], AnyRun]
) -> "Iterator[RunChange[AnyRun]]":
    for one in changes:
        if runs.matches(one.record):
            event = one.event
            yield RunChange(
                event_id=event and event.id,
                at=event and event.at,
                source=event and event.source.value,
                status=str((event or one.record.run).status),
                run=bound(one.record),
            )
