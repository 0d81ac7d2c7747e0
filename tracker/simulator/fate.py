"""What becomes of the n-th run: a pure function of the seed and n, whatever the clock says.

All random numbers are drawn at once and always in the same order, so that a changed rate changes
which of them count and nothing else. New ones are drawn last: a seed keeps its runs.
"""

import hashlib
from dataclasses import dataclass
from random import Random
from typing import Final

FAILURES: Final = (
    ("model_timeout", "The model took too long to answer."),
    ("safety_blocked", "Blocked by the safety filter: “<b>prompt</b>” — see the guidelines."),
    ("input_unreachable", "One of the inputs could not be fetched."),
    ("internal_error", None),
    ("provider_error", "The provider failed to complete the generation."),
)
"""Why runs fail: codes and messages. One code comes without a message, one message has markup."""

_REJECTED: Final = (
    "Your request was rejected by the safety system. safety_violations=[sexual]. (req_0)"
)
MEASURED_FAILURES: Final = (
    *((code, _REJECTED) for code in ("GPU_PROVIDER_ERROR", "GENERATION_NO_RESULT")),
    *(
        (code, f"The run failed: {code.lower().replace('_', ' ')}.")
        for code in [
            "GENERATION_PROVIDER_TIMEOUT",
            "GENERATION_FAILED_TO_START",
            "GPU_PROVIDER_ERROR",
            "GENERATION_FAILED_TO_UPLOAD",
            "GENERATION_GENERIC_ERROR",
            "GENERATION_FAILED_TO_UPDATE",
            "SERVER_ERROR",
            "GENERATION_FAILED_TO_GET",
            "GENERATION_PREGENERATION_FAILED",
            "GENERATION_POSTGENERATION_FAILED",
            "GENERATION_MAP_AFTER_REQUEST_FAILED",
            "GENERATION_DOWNSTREAM_SERVICE_ERROR",
            "GENERATION_QUEUE_TOO_LARGE",
            "GENERATION_INVALID_PROVIDER_RESPONSE",
            "GENERATION_QUEUE_NOT_MOVING",
            "GENERATION_NO_RESULT",
            "GENERATION_CIRCUIT_BREAKER_OPEN",
            "GENERATION_MODAL_POLL_ERROR",
            "AUDIO_GENERATION_ERROR",
            "GENERATION_PROVIDER_FAILED_TO_GET_STATUS",
            "GENERATION_PROMPT_MODERATED",
            "LLM_REFUSAL",
            "GENERATION_INPUT_VALIDATION",
            "GENERATION_INVALID_PARAMS",
            "GENERATION_INVALID_URL",
            "GENERATION_ENDPOINT_NOT_FOUND",
            "GENERATION_MAP_BEFORE_REQUEST_FAILED",
            "GENERATION_PROVIDER_NOT_SUPPORTED",
            "BILLING_INSUFFICIENT_CREDITS",
            "GENERATION_NOT_PAID",
            "GENERATION_CANCELLED",
            "ACCESS_DENIED",
            "MODEL_ENTITLEMENT_REQUIRED",
        ]
    ),
)
"""The codes that FLORA measured in production; two messages hide that moderation refused."""


@dataclass(frozen=True, slots=True)
class Fate:
    """The throws for one run. Those from `fails` on strike where they are below their rate."""

    run_id: str
    delivery_id: str
    forged_delivery_id: str
    spread: float
    """Duration as a multiple of `run_seconds`, 0.5 to 1.5."""
    pending_share: float
    """The part of the duration that passes before the run is started, 0.05 to 0.25."""
    error_code: str
    error_message: str | None
    failed_progress: int
    """How far a failing run gets, in per cent."""
    shows_zeros: bool
    """Whether the unfinished run shows zero times and cost, as FLORA's examples do."""
    answers_end: bool
    """Whether an early ended run's start already answers with the end."""
    created: bool
    """Whether the start answers 201 and not 200."""
    held: float
    """How long a callback is held back, as a multiple of `run_seconds`, 0 to 1."""
    fails: float
    drop: float
    duplicate: float
    early: float
    late: float
    reorder: float
    bad_signature: float
    cancelled: float
    queued: float
    quotes: float
    quote_size: float
    """Which quote is shown, 0 to 1."""
    late_bills: float
    bill_wait: float
    """Which of the waits for a late bill applies, 0 to 1."""
    missing_bills: float
    corrections: float
    corrected_down: bool
    """Whether a corrected bill was too high at first."""
    late_refunds: float
    late_outputs: float
    failure: float
    """Which of the chosen error codes applies, 0 to 1."""


def fate_of(seed: int, ordinal: int) -> Fate:
    """The fate of run number `ordinal` in the world grown from `seed`."""
    dice = Random(f"{seed}/run/{ordinal}")
    error_code, error_message = FAILURES[dice.randrange(len(FAILURES))]
    return Fate(
        run_id=f"run_{digest(seed, 'run', ordinal)}",
        delivery_id=f"whd_{digest(seed, 'delivery', ordinal)}",
        forged_delivery_id=f"whd_{digest(seed, 'forged', ordinal)}",
        spread=dice.uniform(0.5, 1.5),
        pending_share=dice.uniform(0.05, 0.25),
        error_code=error_code,
        error_message=error_message,
        failed_progress=dice.randint(10, 95),
        shows_zeros=dice.random() < 0.25,
        answers_end=dice.random() < 0.5,
        created=dice.random() < 0.5,
        held=dice.random(),
        fails=dice.random(),
        drop=dice.random(),
        duplicate=dice.random(),
        early=dice.random(),
        late=dice.random(),
        reorder=dice.random(),
        bad_signature=dice.random(),
        cancelled=dice.random(),
        queued=dice.random(),
        quotes=dice.random(),
        quote_size=dice.random(),
        late_bills=dice.random(),
        bill_wait=dice.random(),
        missing_bills=dice.random(),
        corrections=dice.random(),
        corrected_down=dice.random() < 0.5,
        late_refunds=dice.random(),
        late_outputs=dice.random(),
        failure=dice.random(),
    )


def digest(*parts: object) -> str:
    """A short identifier that the parts determine: 20 hexadecimal digits."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:20]
