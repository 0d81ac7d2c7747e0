"""Every error the tracker raises on purpose.

::

    TrackerError
    ├── SettingsError               a setting is missing or wrong             (exit status 2)
    ├── StoreError
    │   ├── StoreUnavailable        the database does not answer; try again
    │   └── SchemaOutdated          the database is older than this version; `tracker db upgrade`
    ├── FloraError                  a call to FLORA did not end in a usable answer
    │   ├── FloraUnreachable        no answer: refused, timed out or cut
    │   ├── FloraUnreadable         an answer that is not what the API promises
    │   ├── OtherWorkspace          the API key is of another workspace than the settings say
    │   ├── PollUrlRefused          a poll_url on another origin: not followed   (tracker.flora)
    │   └── FloraRefusal            FLORA's own error, with status, code, fields and request id
    │       ├── KeyRefused          401: every further call with this key fails too
    │       ├── Forbidden           403: the key may not do this
    │       ├── PlanRequired        403 paid_plan_required: the workspace's plan, not the key
    │       ├── NotFound            404: no such thing in this workspace
    │       ├── RateLimited         429 after all retries
    │       └── ServerFault         5xx after all retries
    ├── SignatureError              a callback that is not known to be FLORA's   (tracker.flora)
    ├── MediaError                  a file cannot be downloaded           (tracker.delivering)
    │   ├── LinkRefused             the link leads where no request is sent
    │   └── MediaUnavailable        not now: another attempt may resume it
    ├── DownloadDirectoryError      the folder for downloads cannot be used   (tracker.delivering)
    └── StartError                  a run was not started
        ├── InvalidRequest          the caller's fault; `fields` says where
        ├── IdempotencyConflict     this key was used for another body; nothing was started
        ├── BudgetExceeded          its price does not fit a budget; nothing was sent
        ├── StartPending            it was sent, and its outcome is not known yet; ask again soon
        ├── StartNotStored          FLORA started it, and the database could not keep it yet
        └── StartUnresolved         it cannot be told whether FLORA started it; left to a person

Errors of other libraries are translated once, at the edge that calls them, with `from exc`. A
message says what was wrong, where, and what to do; it never holds a key, a secret or a signature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final


class TrackerError(Exception):
    """Whatever the tracker itself reports; `str()` of it is fit for a person to read."""


class SettingsError(TrackerError):
    """A setting is missing or wrong; the message names the variable and what to set it to."""


class StoreError(TrackerError):
    """The database cannot do what was asked."""


class StoreUnavailable(StoreError):
    """The database does not answer, or did not commit in time. Nothing was acknowledged; try
    again."""


class SchemaOutdated(StoreError):
    """The database lacks migrations that this version needs."""


FIELDS_NAMED: Final = 5
"""So many of the fields that FLORA names stand in an error's text."""


@dataclass(frozen=True, slots=True)
class FieldFault:
    """One field that FLORA or the tracker refuses, in FLORA's shape; `valid_values` where it names
    what it takes."""

    field: str
    message: str
    valid_values: tuple[str, ...] = ()

    def __str__(self) -> str:
        values = f" (one of {', '.join(self.valid_values)})" if self.valid_values else ""
        return f"{self.field}: {self.message}{values}"


class FloraError(TrackerError):
    """A call to FLORA that did not end in a usable answer.

    `silent` tells that FLORA itself has said nothing of what was asked for: no answer came, it
    could not answer (5xx), or something else answered in its place, such as a gateway's page.
    """

    silent = False


class FloraUnreachable(FloraError):
    """FLORA gave no answer.

    `may_have_acted` tells whether the request may have reached FLORA, so that a start is known to
    be in doubt: false only where no connection was made.
    """

    silent = True

    def __init__(self, message: str, *, may_have_acted: bool, timed_out: bool = False) -> None:
        super().__init__(message)
        self.may_have_acted = may_have_acted
        self.timed_out = timed_out


class FloraUnreadable(FloraError):
    """FLORA answered, but not with what the API promises (no run id, another run); or what
    answered was not FLORA (`silent`: no JSON object, as an empty 200)."""

    def __init__(
        self, message: str, *, request_id: str | None = None, silent: bool = False
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.silent = silent


class OtherWorkspace(FloraError):
    """The API key reads another workspace than the one that it is set for."""


class FloraRefusal(FloraError):
    """An error answer.

    `status` is the HTTP status, `code` and `message` FLORA's words, `fields` the faults it names,
    `request_id` what its support asks for, `retry_after` the seconds it asked to wait, if any.
    `from_flora` is false where the body has not FLORA's shape, as a gateway's page; `run_id` is the
    run that the answer names, if any.
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
        who = "FLORA" if from_flora else "something that is not FLORA's API"
        super().__init__(f"{who} answered {status} {code}: {message}{named}{where}")
        self.status = status
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.request_id = request_id
        self.retry_after = retry_after
        self.from_flora = from_flora
        self.run_id = run_id
        self.silent = status >= 500 or not (from_flora or status == 429)


class KeyRefused(FloraRefusal):
    """401: FLORA refuses the API key, and no further call with it can work."""


class Forbidden(FloraRefusal):
    """403: the key is good, and may not do this."""


class PlanRequired(FloraRefusal):
    """403 `paid_plan_required`: the workspace's plan does not include it; the key is good."""


class NotFound(FloraRefusal):
    """404: it does not exist, or belongs to another workspace."""


class RateLimited(FloraRefusal):
    """429, still, after all retries."""


class ServerFault(FloraRefusal):
    """A 5xx, still, after all retries."""


class StartError(TrackerError):
    """A run was not started (or not known to be)."""


class InvalidRequest(StartError):
    """The request itself is wrong; `fields` names each fault."""

    def __init__(self, message: str, fields: Sequence[FieldFault] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


class IdempotencyConflict(StartError):
    """The idempotency key was used before, for another body. Nothing was started."""


class BudgetExceeded(StartError):
    """The price of a start does not fit into what is left of a budget. Nothing was sent.

    `budget` is its name, `left` USD, at least 0, and `renews_at` when its next period begins:
    `None` for a budget that never begins anew. `ever_fits` is false where the price is above the
    whole budget, or is not known.
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
    """A start may have reached FLORA, and its outcome is not known yet.

    The same key tells later what came of it. `retry_after` is in seconds.
    """

    def __init__(self, message: str, *, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StartNotStored(StartError):
    """FLORA started run `run_id`, and the database could not keep it yet: that is tried again for
    as long as the process lives."""

    def __init__(self, message: str, *, run_id: str) -> None:
        super().__init__(message)
        self.run_id = run_id


class StartUnresolved(StartError):
    """It cannot be told which run, if any, this start became. It is never sent again by itself."""
