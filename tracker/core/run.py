"""A run: its status, its other fields and their precedence; and whether to start it again.

A run's status only rises in *precedence*::

    PENDING             queued; ends when FLORA starts the run
    RUNNING             in progress; ends when the run ends
    CALLBACK_FAILED     ended, reported by a callback; the API overrides it
    CALLBACK_COMPLETED  ended, reported by a callback; the API overrides it
    FAILED              ended, reported by the API; only COMPLETED overrides it
    COMPLETED           ended, reported by the API; final

An unknown status counts as RUNNING without `completed_at`, else as an end just below FAILED;
`RunState.unknown_status` keeps its text.

Every other field keeps the value from the observation with the highest precedence that showed one;
`RunState.precedences` holds that precedence for each field.

Cost and outputs may change after the end: there the latest read counts. Their precedence is then
`LISTED` or `READ`, and `cost_read_at` and `outputs_read_at` are when that read was sent. Quotes are
not costs: `quoted_cost` is the greatest cost shown before the end.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Final, Literal, NamedTuple, TypeVar, dataclass_transform

T = TypeVar("T")

RunType = Literal["technique", "generation"]
"""The kinds of runs; FLORA lists each separately."""


W = TypeVar("W", bound=StrEnum)


def known(kind: type[W], text: str) -> W | str:
    """The member of that value; for one that only a newer version knows, the text as it is."""
    found = kind._value2member_map_.get(text)
    return found if isinstance(found, kind) else text


class OpenNumber(IntEnum):
    """Numbers of a scale that a newer version may extend: an unknown one is kept as it is."""

    @classmethod
    def _missing_(cls, value: object) -> "OpenNumber | None":
        if not isinstance(value, int):
            return None
        found = int.__new__(cls, value)
        found._name_, found._value_ = f"of a newer version: {value}", value
        return found


class RunStatus(StrEnum):
    """The four statuses that FLORA documents; a newer FLORA may show others."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


Status = RunStatus | str
"""A run's status as FLORA shows it: a `RunStatus`, or the text of an unknown one."""


class Precedence(OpenNumber):
    """A status together with who reported it, in ascending order."""

    PENDING = 0
    RUNNING = 1
    CALLBACK_FAILED = 2
    CALLBACK_COMPLETED = 3
    FAILED = 4
    COMPLETED = 5

    @property
    def ended(self) -> bool:
        """Whether a callback or the API reported the end."""
        return self >= Precedence.CALLBACK_FAILED

    @property
    def ended_at_api(self) -> bool:
        """Whether the API reported the end."""
        return self >= Precedence.FAILED


_STATUS: Final = {
    Precedence.PENDING: RunStatus.PENDING,
    Precedence.RUNNING: RunStatus.RUNNING,
    Precedence.CALLBACK_FAILED: RunStatus.FAILED,
    Precedence.CALLBACK_COMPLETED: RunStatus.COMPLETED,
    Precedence.FAILED: RunStatus.FAILED,
    Precedence.COMPLETED: RunStatus.COMPLETED,
}


class Details(OpenNumber):
    """Whether the details of an ended run were read from the API.

    A single read always has them, and so settles the run. A history item or the answer to a start
    has them if the run failed, or if it carries both outputs and cost.
    """

    UNKNOWN = 0
    LISTED = 1
    READ = 2


class Tracking(StrEnum):
    """The tracker's own state of a run."""

    ACTIVE = "active"
    """In progress. Becomes `SETTLED` when the details are read, `LOST` when FLORA has repeatedly
    answered that the run does not exist."""
    SETTLED = "settled"
    """End and details are stored. Left only if a list of the API contradicts them."""
    LOST = "lost"
    """Not found at FLORA by at least five reads over at least an hour. Becomes `ACTIVE` as soon as
    anything shows the run."""


@dataclass(frozen=True, slots=True, order=True)
class Output:
    """One output. For `type` "text", `url` holds the text itself, not a link."""

    output_id: str
    type: str
    url: str


OUTPUT_KINDS: Final = {
    "imageUrl": "image",
    "videoUrl": "video",
    "audioUrl": "audio",
    "documentUrl": "document",
    "text": "text",
}
"""A word for each of FLORA's types of outputs."""


@dataclass(frozen=True, slots=True, order=True)
class RunError:
    """Why a run failed, in FLORA's words; empty strings where it gave none."""

    code: str = ""
    message: str = ""


LISTED: Final = 6
READ: Final = 7
"""The precedences of a value of the ended run that a list or a single read showed."""
WORKSPACE_KNOWN: Final = 7
"""The precedence of a `workspace_id` that FLORA showed to the workspace's own key. Claims
(callbacks, `track`) and values read by older versions are below it."""


class Precedences(NamedTuple):
    """The precedence of the observation that each merged field has its value from, 0 to 7.

    A `Precedence`, `LISTED`, `READ` or `WORKSPACE_KNOWN`; 0 also for a field without a value.
    """

    run_type: int = 0
    workspace_id: int = 0
    project_id: int = 0
    technique_id: int = 0
    technique_name: int = 0
    poll_url: int = 0
    created_at: int = 0
    started_at: int = 0
    completed_at: int = 0
    charged_cost: int = 0
    error: int = 0
    outputs: int = 0


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def fast_dataclass(cls: type[T]) -> type[T]:
    """Decorates a dataclass whose construction is on the hot path of callbacks: only the type
    checker enforces that it is frozen, and it takes its fields by name.

    Freezing at run time sets each field through a function call, which more than doubles the
    construction time of an object with twenty fields. The hash is that of a frozen class.
    """
    return dataclass(unsafe_hash=True, slots=True, kw_only=True)(cls)


@fast_dataclass
class RunState:
    """The state of a run, merged from all its observations.

    Times are aware UTC datetimes, costs are USD, `progress` 0 to 100. `charged_cost` is the bill,
    as the read sent at `cost_read_at` showed it; `None` with a `cost_read_at` is a failed run that
    was shown without a cost. `unknown_status` is the text of a status that this version does not
    know.
    """

    run_id: str
    precedence: Precedence = Precedence.PENDING
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
    precedences: Precedences = Precedences()

    @property
    def status(self) -> Status:
        """FLORA's status of the run, as far as it is known."""
        return self.unknown_status or _STATUS.get(self.precedence, RunStatus.COMPLETED)

    @property
    def settled(self) -> bool:
        """Whether the end and the details were read from the API."""
        return self.precedence.ended_at_api and self.details is not Details.UNKNOWN

    @property
    def retry_advice(self) -> "RetryAdvice | None":
        """Whether to start a failed run again; `None` for other runs."""
        if self.status is not RunStatus.FAILED:
            return None
        error = self.error or RunError()
        return retry_advice(error.code, error.message)

    @property
    def workspace_is_confirmed(self) -> bool:
        """Whether FLORA showed `workspace_id`: a callback, or a request to track the run, claims it
        only."""
        return self.precedences.workspace_id == WORKSPACE_KNOWN

    @property
    def lacks_outputs(self) -> bool:
        """Whether the run completed and no read has shown outputs yet."""
        return self.status is RunStatus.COMPLETED and not self.outputs


# Whether a failed run is worth starting again, by FLORA's error code and message.
#
# The table is from FLORA's production figures (flora-api.md, section 8). Codes are compared without
# case: FLORA writes them in capitals, its documentation in small letters. A message that names
# moderation overrides the code, because `GPU_PROVIDER_ERROR` and
# `GENERATION_NO_RESULT` often hide such a refusal.


class RetryAdvice(StrEnum):
    """What to do about a failed run. A retry is a new run, and is charged again."""

    RETRY_NOW = "retry_now"
    """A temporary fault: start it again, once."""
    RETRY_LATER = "retry_later"
    """A provider is overloaded or down: start it again after a while."""
    CHANGE_INPUT = "change_input"
    """The same input fails again: it has to be changed first."""
    NOT_RETRYABLE = "not_retryable"
    """Starting it again does not help; unknown codes are treated like this."""

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES: Final = {
    RetryAdvice.RETRY_NOW: "A temporary fault at FLORA: start the run again.",
    RetryAdvice.RETRY_LATER: "A provider is overloaded: start the run again in a few minutes.",
    RetryAdvice.CHANGE_INPUT: "FLORA refuses this input: change it before you start the run again.",
    RetryAdvice.NOT_RETRYABLE: "Starting the run again does not help.",
}

_CODES: Final = {
    RetryAdvice.RETRY_NOW: (
        *("generation_provider_timeout", "generation_failed_to_start", "gpu_provider_error"),
        *("generation_failed_to_upload", "generation_generic_error", "server_error"),
        *("generation_failed_to_update", "generation_failed_to_get"),
        *("generation_pregeneration_failed", "generation_postgeneration_failed"),
        *("generation_map_after_request_failed", "model_timeout", "internal_error"),
        "provider_error",
    ),
    RetryAdvice.RETRY_LATER: (
        *("generation_downstream_service_error", "generation_queue_too_large"),
        *("generation_invalid_provider_response", "generation_queue_not_moving"),
        *("generation_no_result", "generation_circuit_breaker_open", "audio_generation_error"),
        *("generation_modal_poll_error", "generation_provider_failed_to_get_status"),
    ),
    RetryAdvice.CHANGE_INPUT: (
        *("generation_prompt_moderated", "llm_refusal", "generation_input_validation"),
        *("generation_invalid_params", "generation_invalid_url", "generation_endpoint_not_found"),
        *("generation_map_before_request_failed", "generation_provider_not_supported"),
        *("safety_blocked", "input_unreachable"),
    ),
    RetryAdvice.NOT_RETRYABLE: ("generation_not_paid", "generation_cancelled"),
}
_BY_CODE: Final = {code: advice for advice, codes in _CODES.items() for code in codes}
_NEVER_AGAIN: Final = re.compile(r"(?:billing_|access_).*|.*_entitlement_required")
_MODERATION: Final = re.compile(
    r"\b(?:safety|moderat\w*|polic(?:y|ies)|refus(?:als?|ed to|es to)|content[ _-]filter\w*)\b"
    r"|safety_\w+",
    re.IGNORECASE,
)


def retry_advice(code: str, message: str) -> RetryAdvice:
    """The advice for a run that failed with this code and message."""
    if _MODERATION.search(message):
        return RetryAdvice.CHANGE_INPUT
    return _BY_CODE.get(code.strip().lower(), RetryAdvice.NOT_RETRYABLE)


def is_known(code: str) -> bool:
    """Whether the table has this code."""
    code = code.strip().lower()
    return code in _BY_CODE or _NEVER_AGAIN.fullmatch(code) is not None
