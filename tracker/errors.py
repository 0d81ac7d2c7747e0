"""The errors that the Python interface raises: those of the tracker, and these.

::

    TrackerError
    ├── TrackerNotOpen          the tracker is not open, or was opened in another event loop
    ├── RunUnknown              no such run is stored; `tracker.track(run_id)` tracks it
    ├── RunFailed               the run ended and did not complete; `run`, `code`, `retry_advice`
    ├── RunLost                 FLORA says that the run does not exist
    ├── WaitTimeout             the run has not ended yet (also a `TimeoutError`); wait again
    └── …                       all others: see below

TREE
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracker.core import errors as _core
from tracker.core.errors import (
    BudgetExceeded,
    DoNotRetry,
    FieldFault,
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    KeyRefused,
    NotFound,
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
from tracker.flora.signature import SignatureError

if TYPE_CHECKING:
    from tracker.library.run import RunFields

__all__ = [
    "BudgetExceeded",
    "DoNotRetry",
    "FieldFault",
    "FloraError",
    "FloraRefusal",
    "FloraUnreachable",
    "FloraUnreadable",
    "Forbidden",
    "IdempotencyConflict",
    "InvalidRequest",
    "KeyRefused",
    "NotFound",
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
    "TrackerError",
    "TrackerNotOpen",
    "WaitTimeout",
]

__doc__ = (__doc__ or "").replace("TREE\n", (_core.__doc__ or "").partition("::\n\n")[2])


class TrackerNotOpen(TrackerError):
    """The tracker is not open here; the message says how to open it."""


class RunUnknown(TrackerError):
    """These runs are not stored: they were never tracked, or were removed. `run_ids` names them."""

    def __init__(self, run_ids: Sequence[str]) -> None:
        verb = "is" if len(run_ids) == 1 else "are"
        shown = ", ".join(run_ids[:5]) + (" …" if len(run_ids) > 5 else "")
        super().__init__(f"run {shown} {verb} not known: `await tracker.track(run_id)` tracks it")
        self.run_ids: tuple[str, ...] = tuple(run_ids)


class RunFailed(TrackerError):
    """The run has ended and did not complete.

    `code` and `message` are FLORA's, `retry_advice` says whether to start it again (`None` for a
    status that this version does not know). Of several runs, `run` is the first that did not
    complete, and `runs` are all of them, in the order asked for.
    """

    def __init__(self, run: "RunFields", runs: "Sequence[RunFields]" = ()) -> None:
        said = ": ".join(part for part in (run.error_code, run.error_message) if part)
        super().__init__(f"run {run.run_id} {run.status}" + (f" ({said})" if said else ""))
        self.run = run
        self.runs: tuple[RunFields, ...] = tuple(runs) or (run,)
        self.code: str | None = run.error_code
        self.message: str | None = run.error_message
        self.retry_advice: str | None = run.retry_advice


class RunLost(TrackerError):
    """FLORA has repeatedly answered that the run does not exist. `run` and `runs` are as in
    `RunFailed`; the run is polled once a day, in case FLORA shows it again."""

    def __init__(self, run: "RunFields", runs: "Sequence[RunFields]" = ()) -> None:
        super().__init__(
            f"run {run.run_id} is lost: FLORA answered {run.checks} polls that it does not exist"
        )
        self.run = run
        self.runs: tuple[RunFields, ...] = tuple(runs) or (run,)


class WaitTimeout(TrackerError, TimeoutError):
    """The runs have not ended within the time-out. `runs` are those that are still active.

    They stay tracked: wait again, or start again under the same idempotency key for the same run.
    """

    def __init__(self, runs: "Sequence[RunFields]", timeout: float) -> None:
        first = runs[0]
        which = f"run {first.run_id} is {first.status} ({first.progress:g} %)"
        if len(runs) > 1:
            which = f"{len(runs)} runs are still active, such as {first.run_id} ({first.status})"
        why = f"; its last poll failed: {first.last_error}" if first.last_error else ""
        super().__init__(f"{which} after {timeout:g} s{why}. It stays tracked: wait again")
        self.runs: tuple[RunFields, ...] = tuple(runs)
        self.run = first
