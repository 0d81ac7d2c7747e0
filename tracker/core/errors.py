"""The errors that the tracker raises: `tracker.errors` draws the tree.

Others stand where they are raised: `PollUrlRefused` and `SignatureError` in `tracker.flora`,
`MediaError` (a file cannot be downloaded) in `tracker.delivering`. A `SettingsError` ends a command
with status 2.

Errors of other libraries are translated once, where they are called, with `from exc`. A message
says what was wrong, where, and what to do; it never holds a key, a secret or a signature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from tracker.core.formatting import line_numbers


class TrackerError(Exception):
    """Base class; `str()` of it is a message for people."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by its constructor, whose parameters are not `args`: process pools pickle errors.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[TrackerError], args: tuple[object, ...]) -> TrackerError:
    error = kind.__new__(kind)
    error.args = args
    return error


class SettingsError(TrackerError):
    """A setting is missing or wrong; the message names the variable and what to set it to."""


class StoreError(TrackerError):
    """The database refused or failed an operation."""


class StoreUnavailable(StoreError):
    """The database does not answer or did not commit in time. Nothing was acknowledged; retry."""


class SchemaOutdated(StoreError):
    """The database lacks migrations that this version needs."""


class DownloadDirectoryError(TrackerError):
    """The download directory cannot be used."""


class NotTracked(TrackerError):
    """FLORA does not show the run, or cannot be asked; nothing was stored."""


class MaxCostReached(TrackerError):
    """Quotes and charges leave no room for another row."""


class DefinitionChanged(TrackerError):
    """The technique's inputs differ from those of the batch so far, so that the rows on `lines`,
    which were started, would be started anew. `new` and `gone` are columns: input, column, type."""

    def __init__(
        self,
        *,
        new: Sequence[tuple[str, str, str]],
        gone: Sequence[tuple[str, str, str]],
        lines: Sequence[int],
    ) -> None:
        parts = [
            f"column {column!r} {verb} the input {name!r} ({kind})"
            for verb, columns in (("is now", new), ("was", gone))
            for name, column, kind in columns
        ]
        rows = "1 row that was" if len(lines) == 1 else f"{len(lines)} rows that were"
        super().__init__(
            f"the columns are read differently than when the batch began: {'; '.join(parts)}. "
            f"{rows} started would start again ({line_numbers(lines)}). "
            "Nothing was started; --accept-changes starts them"
        )
        self.new, self.gone, self.lines = tuple(new), tuple(gone), tuple(lines)

    @property
    def is_of_types(self) -> bool:
        """Whether the same columns are the same inputs, of other types."""
        return {one[:2] for one in self.new} == {one[:2] for one in self.gone}


class DoNotRetry(TrackerError):
    """Raise it in a handler to mark the message as failed at once; `str()` of it is stored."""


FIELDS_NAMED: Final = 5
"""Most fields named in the text of one error."""


@dataclass(frozen=True, slots=True)
class FieldFault:
    """One refused field, in FLORA's shape; `valid_values` are the accepted values, if known."""

    field: str
    message: str
    valid_values: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The field as the API shows it."""
        shown: dict[str, object] = {"field": self.field, "message": self.message}
        return shown | ({"valid_values": list(self.valid_values)} if self.valid_values else {})

    def __str__(self) -> str:
        values = f" (one of {', '.join(self.valid_values)})" if self.valid_values else ""
        return f"{self.field}: {self.message}{values}"


class FloraError(TrackerError):
    """A call to FLORA that did not end in a usable answer.

    `silent` is true if FLORA itself gave no information: no answer, a 5xx, or an answer that is not
    FLORA's, such as a gateway's page.
    """

    silent = False


class FloraUnreachable(FloraError):
    """FLORA gave no answer.

    `may_have_acted` is whether the request may have reached FLORA, so that a start is in doubt:
    false only if no connection was made.
    """

    silent = True

    def __init__(self, message: str, *, may_have_acted: bool, timed_out: bool = False) -> None:
        super().__init__(message)
        self.may_have_acted = may_have_acted
        self.timed_out = timed_out


class FloraUnreadable(FloraError):
    """An answer that the API does not promise (no run id, another run), or one that is not FLORA's
    (`silent`: no JSON object, such as an empty 200)."""

    def __init__(
        self, message: str, *, request_id: str | None = None, silent: bool = False
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.silent = silent


class OtherWorkspace(FloraError):
    """The API key belongs to another workspace than configured."""


class FloraRefusal(FloraError):
    """An error answer.

    `status` is the HTTP status; `code`, `message` and `fields` are FLORA's; `request_id` is for its
    support; `retry_after` is in seconds, if any. `from_flora` is false if the body has not FLORA's
    shape, as a gateway's page; `run_id` is the run that the answer names, if any.
    """

    def __init__(
        self,
        *,
        status: int,
        code: str,
        message: str,
        fields: Sequence[FieldFault] = (),
        request_id: str | None = None,
        retry_after: float | None = None,
        from_flora: bool = True,
        run_id: str | None = None,
    ) -> None:
        where = f" ({request_id})" if request_id else ""
        named = "".join(f"; {fault}" for fault in fields[:FIELDS_NAMED])
        who = "FLORA" if from_flora else "something other than FLORA's API"
        super().__init__(f"{who} answered {status} {code}: {message}{named}{where}")
        self.status = status
        self.code = code
        self.message = message
        self.fields: tuple[FieldFault, ...] = tuple(fields)
        self.request_id = request_id
        self.retry_after = retry_after
        self.from_flora = from_flora
        self.run_id = run_id
        self.silent: bool = status >= 500 or not (from_flora or status == 429)


class KeyRefused(FloraRefusal):
    """401: FLORA refuses the API key, and no further call with it can work."""


class Forbidden(FloraRefusal):
    """403: the key is valid but not allowed to do this."""


class PlanRequired(FloraRefusal):
    """403 `paid_plan_required`: the workspace's plan does not include it."""


class NotFound(FloraRefusal):
    """404: it does not exist, or belongs to another workspace."""


class RateLimited(FloraRefusal):
    """429 after all retries."""


class RequestPaused(RateLimited):
    """Nothing was sent: after an earlier 429 no request may start before `until`."""

    def __init__(self, *, seconds: float, until: datetime) -> None:
        message = f"FLORA asked for a pause until {until:%H:%M:%S} UTC; nothing was sent"
        super().__init__(status=429, code="rate_limited", message=message, retry_after=seconds)
        self.args = (message,)


class ServerFault(FloraRefusal):
    """A 5xx after all retries."""


class StartError(TrackerError):
    """A run was not started, or is not known to be."""


class InvalidRequest(StartError):
    """The request is invalid; `fields` names each fault."""

    def __init__(self, message: str, fields: Sequence[FieldFault] = ()) -> None:
        super().__init__(message)
        self.fields: tuple[FieldFault, ...] = tuple(fields)


class IdempotencyConflict(StartError):
    """The idempotency key was used before, for another body. Nothing was started."""


class BudgetExceeded(StartError):
    """The price of a start exceeds what is left of a budget. Nothing was sent.

    `budget` is its name, `left` is USD (at least 0), `renews_at` when its next period starts
    (`None` for `total`). `ever_fits` is false if the price exceeds the whole budget or is unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        budget: str,
        left: Decimal,
        renews_at: datetime | None,
        ever_fits: bool,
    ) -> None:
        super().__init__(message)
        self.budget = budget
        self.left = left
        self.renews_at = renews_at
        self.ever_fits = ever_fits


class StartPending(StartError):
    """A start may have reached FLORA; its outcome is not known yet.

    Ask again with the same key. `retry_after` is in seconds.
    """

    retry_after = 5.0


class StartNotStored(StartError):
    """FLORA started run `run_id`, and the database could not store it yet; the process keeps
    trying."""

    def __init__(self, message: str, *, run_id: str) -> None:
        super().__init__(message)
        self.run_id = run_id


class StartUnresolved(StartError):
    """Which run this start became, if any, is unknown. It is never sent again automatically."""
