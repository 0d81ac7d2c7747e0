"""What a run is: FLORA's words about it, and how much each word weighs.

A run's status climbs and never falls. How high it stands is its *standing*::

    PENDING             FLORA queued it; leaves when FLORA starts it
    RUNNING             FLORA works on it; leaves when it ends
    CALLBACK_FAILED     a callback said so; the API has the last word
    CALLBACK_COMPLETED  a callback said so; the API has the last word
    FAILED              the API said so
    COMPLETED           the API said so; nothing stands higher

A status that this version does not know stands as RUNNING without a `completed_at`, and with one as
FAILED, below `failed` itself: `Run.unknown_status` keeps its name.

Every other fact about a run is a *register*: it keeps the value of the highest-standing sight that
had one. `Run.ranks` remembers, for each register, the standing of the sight its value came from, as
one octal digit each.

The cost and the outputs of an ended run may change after its end: of these the latest read counts.
The digit is then `LISTED` or `READ`, and `cost_read_at` and `outputs_read_at` say when that read
was sent. A quote is not a cost: `quoted_cost` is the greatest that was shown before the end.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Final, Literal

from tracker.core.quick import quick_dataclass
from tracker.core.retry import RetryAdvice, retry_advice

RunType = Literal["technique", "generation"]
"""The kinds of runs, each with a list of its own at FLORA."""


class RunStatus(StrEnum):
    """The four states of a run that FLORA documents; a newer FLORA may show others."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


Status = RunStatus | str
"""A run's status as FLORA shows it: a `RunStatus` where it is one of the four, else its text."""


def status_of(text: str) -> Status:
    """The status of that name."""
    return _KNOWN.get(text, text)


_KNOWN: Final = {str(status): status for status in RunStatus}


class Standing(IntEnum):
    """How far a run has come, and on whose word. Fits one octal digit."""

    PENDING = 0
    RUNNING = 1
    CALLBACK_FAILED = 2
    CALLBACK_COMPLETED = 3
    FAILED = 4
    COMPLETED = 5

    @property
    def status(self) -> RunStatus:
        """The FLORA state that this standing shows as."""
        return _STATUS[self]

    @property
    def ended(self) -> bool:
        """Whether anybody, a callback or the API, has said that the run ended."""
        return self >= Standing.CALLBACK_FAILED

    @property
    def ended_at_api(self) -> bool:
        """Whether the API itself has said that the run ended."""
        return self >= Standing.FAILED


_STATUS: Final = {
    Standing.PENDING: RunStatus.PENDING,
    Standing.RUNNING: RunStatus.RUNNING,
    Standing.CALLBACK_FAILED: RunStatus.FAILED,
    Standing.CALLBACK_COMPLETED: RunStatus.COMPLETED,
    Standing.FAILED: RunStatus.FAILED,
    Standing.COMPLETED: RunStatus.COMPLETED,
}


class Details(IntEnum):
    """Whether the details of an ended run have been read from the API.

    A single read always has them (and so settles for good); a history item or a start's answer has
    them where the run failed, or where it carries both outputs and cost.
    """

    UNKNOWN = 0
    LISTED = 1
    READ = 2


class Tracking(StrEnum):
    """How the tracker stands to a run."""

    ACTIVE = "active"
    """Not known to the end; leaves by `SETTLED` when the details are read, by `LOST` when FLORA
    has long denied the run."""
    SETTLED = "settled"
    """True end and details are stored; leaves only if the API contradicts itself in a list."""
    LOST = "lost"
    """FLORA denied it at least five times over at least an hour; `ACTIVE` as soon as anything shows
    it."""


@dataclass(frozen=True, slots=True, order=True)
class Output:
    """One output. For `type` "text", `url` holds the text itself, not a link."""

    output_id: str
    type: str
    url: str


@dataclass(frozen=True, slots=True, order=True)
class RunError:
    """Why a run failed, in FLORA's words; empty strings where it gave none."""

    code: str = ""
    message: str = ""


LISTED: Final = 6
READ: Final = 7
"""The digits of what a list, or a single read, showed of an ended run."""
WORKSPACE_KNOWN: Final = 7
"""The digit of a `workspace_id` that FLORA showed to the workspace's own key. Claims are below, and
what versions before this rule read."""

REGISTERS: Final = (
    "run_type",
    "workspace_id",
    "project_id",
    "technique_id",
    "technique_name",
    "poll_url",
    "created_at",
    "started_at",
    "completed_at",
    "charged_cost",
    "error",
    "outputs",
)
"""The facts that `merge` keeps by rank. The order fixes each one's digit in `Run.ranks`: append
only."""


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The state of a run as all sights together tell it: the result of `merge`, nothing else.

    Times are aware UTC datetimes, costs are USD, `progress` 0 to 100. `charged_cost` is the bill,
    as the read sent at `cost_read_at` showed it: `None` with a `cost_read_at` means that a failed
    run was shown without a cost. `ranks` holds one octal digit for each of `REGISTERS`: the
    `Standing` of the observation which its value came from, or `LISTED` or `READ`.
    `unknown_status` is the status of the highest observations where only a newer FLORA knows it.
    """

    run_id: str
    standing: Standing = Standing.PENDING
    unknown_status: str | None = None
    details: Details = Details.UNKNOWN
    progress: float = 0
    conflict: bool = False
    run_type: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    technique_id: str | None = None
    technique_name: str | None = None
    poll_url: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    quoted_cost: Decimal | None = None
    charged_cost: Decimal | None = None
    cost_read_at: datetime | None = None
    error: RunError | None = None
    outputs: tuple[Output, ...] | None = None
    outputs_read_at: datetime | None = None
    ranks: int = 0

    @property
    def status(self) -> Status:
        """FLORA's state of the run, as far as anybody has said."""
        return self.unknown_status or self.standing.status

    @property
    def settled(self) -> bool:
        """Whether the run's true end and its details have been read from the API."""
        return self.standing.ended_at_api and self.details is not Details.UNKNOWN

    @property
    def retry_advice(self) -> RetryAdvice | None:
        """Of a failed run, whether to start it again; `None` of any other."""
        if self.status is not RunStatus.FAILED:
            return None
        error = self.error or RunError()
        return retry_advice(error.code, error.message)

    @property
    def workspace_is_claimed(self) -> bool:
        """Whether only a callback, or who asked to track the run, has said whose it is."""
        digit = self.ranks >> 3 * REGISTERS.index("workspace_id") & 0o7
        return self.workspace_id is not None and digit != WORKSPACE_KNOWN

    @property
    def lacks_outputs(self) -> bool:
        """Whether the run completed and no read has shown an output yet."""
        return self.status is RunStatus.COMPLETED and not self.outputs
