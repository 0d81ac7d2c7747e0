"""The errors that the Python interface raises.

::

    TrackerError
    ├── SettingsError               a setting is missing or wrong
    ├── TrackerNotOpen              the tracker is not open here, or is open already
    ├── RunUnknown                  no such run is stored; `tracker.track(run_id)` tracks it
    ├── BatchUnknown                no such batch is stored
    ├── TechniqueUnknown            no such technique is known here or to FLORA
    ├── RunFailed                   a run ended and did not complete; `run`, `code`, `retry_advice`
    ├── RunLost                     FLORA has no such run any more; `run`
    ├── NotTracked                  FLORA does not show the run, or cannot be asked; nothing stored
    ├── WaitTimeout                 a `TimeoutError`: the runs go on, and can be waited for again
    ├── StoreError
    │   ├── StoreUnavailable        the database does not answer; try again
    │   └── SchemaOutdated          the database is older than this version; `tracker db upgrade`
    ├── FloraError                  a call to FLORA did not end in a usable answer
    │   ├── FloraUnreachable        no answer: refused, timed out or cut
    │   ├── FloraUnreadable         an answer that is not what the API promises
    │   ├── OtherWorkspace          the API key is of another workspace than the settings say
    │   └── FloraRefusal            FLORA's own error, with status, code, fields and request id
    │       ├── KeyRefused          401: every further call with this key fails too
    │       ├── Forbidden           403: the key may not do this
    │       ├── PlanRequired        403 paid_plan_required: the workspace's plan, not the key
    │       ├── NotFound            404: no such thing in this workspace
    │       ├── RateLimited         429 after all retries
    │       │   └── RequestPaused   an earlier 429 asked for a longer wait; nothing was sent
    │       └── ServerFault         5xx after all retries
    ├── SignatureError              a callback is not authentic
    ├── DownloadDirectoryError      the folder for downloads cannot be used
    ├── DoNotRetry                  raised by a handler: its message is not delivered again
    ├── MaxCostReached              a batch could cost more than its `max_cost`; nothing was started
    ├── DefinitionChanged           the technique reads the rows of a batch otherwise than before
    └── StartError                  a run was not started
        ├── InvalidRequest          the caller's fault; `fields` says where
        ├── IdempotencyConflict     this key was used for another body; nothing was started
        ├── BudgetExceeded          its price does not fit a budget; nothing was sent
        ├── StartPending            it was sent, and its outcome is not known yet; start again soon
        ├── StartNotStored          FLORA started it, and the database could not keep it yet
        └── StartUnresolved         whether FLORA started it is unknown; a person decides

Errors of other libraries are translated, with `from exc`. A message says what was wrong, where, and
what to do; it never holds a key, a secret or a signature.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from tracker.core.errors import (
    BudgetExceeded,
    DefinitionChanged,
    DoNotRetry,
    DownloadDirectoryError,
    FieldFault,
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    KeyRefused,
    MaxCostReached,
    NotFound,
    NotTracked,
    OtherWorkspace,
    PlanRequired,
    RateLimited,
    RequestPaused,
    SchemaOutdated,
    ServerFault,
    SettingsError,
    StartError,
    StartNotStored,
    StartPending,
    StartUnresolved,
    StoreError,
    StoreUnavailable,
    TrackerError,
)
from tracker.flora.callback import SignatureError

if TYPE_CHECKING:
    from tracker.library.run import RunFields

__all__ = [
    "BatchUnknown",
    "BudgetExceeded",
    "DefinitionChanged",
    "DoNotRetry",
    "DownloadDirectoryError",
    "FieldFault",
    "FloraError",
    "FloraRefusal",
    "FloraUnreachable",
    "FloraUnreadable",
    "Forbidden",
    "IdempotencyConflict",
    "InvalidRequest",
    "KeyRefused",
    "MaxCostReached",
    "NotFound",
    "NotTracked",
    "OtherWorkspace",
    "PlanRequired",
    "RateLimited",
    "RequestPaused",
    "RunFailed",
    "RunLost",
    "RunUnknown",
    "SchemaOutdated",
    "ServerFault",
    "SettingsError",
    "SignatureError",
    "StartError",
    "StartNotStored",
    "StartPending",
    "StartUnresolved",
    "StoreError",
    "StoreUnavailable",
    "TechniqueUnknown",
    "TrackerError",
    "TrackerNotOpen",
    "WaitTimeout",
]

NAMED: Final = 5
"""Most runs named in the text of one error."""


class TrackerNotOpen(TrackerError):
    """The tracker is not open here, or is open already; the message says what to write."""


class RunUnknown(TrackerError):
    """These runs are not stored: they were never tracked, or were removed. `run_ids` names them."""

    def __init__(self, run_ids: Sequence[str]) -> None:
        verb = "is" if len(run_ids) == 1 else "are"
        shown = ", ".join(run_ids[:NAMED]) + (" …" if len(run_ids) > NAMED else "")
        super().__init__(f"run {shown} {verb} not known: `tracker.track(run_id)` tracks it")
        self.run_ids: tuple[str, ...] = tuple(run_ids)


class BatchUnknown(TrackerError):
    """No batch of this id is stored."""


class TechniqueUnknown(TrackerError):
    """No technique of this id or slug is known here or to FLORA."""


class _RunError(TrackerError):
    def __init__(self, message: str, run: "RunFields", runs: "Sequence[RunFields]") -> None:
        super().__init__(message)
        self.run = run
        self.runs: tuple[RunFields, ...] = tuple(runs) or (run,)


class RunFailed(_RunError):
    """The run has ended and did not complete.

    `code` and `message` are FLORA's; `retry_advice` says whether to start it again (`None` for a
    status that this version does not know). Of several runs that were waited for, `run` is the
    first that did not complete, and `runs` are all of them, in the order asked for.
    """

    def __init__(self, run: "RunFields", runs: "Sequence[RunFields]" = ()) -> None:
        reason = ": ".join(part for part in (run.error_code, run.error_message) if part)
        super().__init__(
            f"run {run.run_id} {run.status}" + (f" ({reason})" if reason else ""), run, runs
        )
        self.code: str | None = run.error_code
        self.message: str | None = run.error_message
        self.retry_advice: str | None = run.retry_advice


class RunLost(_RunError):
    """FLORA has repeatedly answered that the run does not exist. `run` and `runs` are as in
    `RunFailed`; the run is polled once a day, in case FLORA shows it again."""

    def __init__(self, run: "RunFields", runs: "Sequence[RunFields]" = ()) -> None:
        message = f"run {run.run_id} is lost: FLORA repeatedly answered that it does not exist"
        super().__init__(message, run, runs)


class WaitTimeout(TrackerError, TimeoutError):
    """What was waited for has not ended within the time-out. `runs` are the runs still active.

    They stay tracked: wait again, or start again under the same idempotency key for the same run.
    """

    def __init__(self, message: str, runs: "Sequence[RunFields]" = ()) -> None:
        super().__init__(message)
        self.runs: tuple[RunFields, ...] = tuple(runs)

    @classmethod
    def _of(
        cls, runs: "Sequence[RunFields]", timeout: float, reason: str | None = None
    ) -> "WaitTimeout":
        """The error for these runs; `reason` is why they could not be read."""
        first = runs[0]
        which = f"run {first.run_id} is {first.status} ({first.progress:g} %)"
        if len(runs) > 1:
            which = f"{len(runs)} runs are still active, such as {first.run_id} ({first.status})"
        why = f"; its last poll failed: {first.last_error}" if first.last_error else ""
        if reason is not None:
            why = f"; {reason}"
        return cls(f"{which} after {timeout:g} s{why}. It stays tracked: wait again", runs)
