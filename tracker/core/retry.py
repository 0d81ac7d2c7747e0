"""Whether a failed run is worth starting again, by FLORA's error code and message.

The table is from FLORA's production figures (flora-api.md, section 8). Codes are compared without
case: FLORA writes them in capitals, its documentation in small letters. A message that names
moderation overrides the code, because `GPU_PROVIDER_ERROR` and
`GENERATION_NO_RESULT` often hide such a refusal.
"""

import re
from enum import StrEnum
from typing import Final


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
        """The advice as one plain sentence."""
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
