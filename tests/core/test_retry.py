"""What to do about a failed run, by FLORA's table of codes and by its message."""

import pytest

from tracker.core.run import RetryAdvice, is_known, retry_advice


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("GENERATION_PROVIDER_TIMEOUT", RetryAdvice.RETRY_NOW),
        ("gpu_provider_error", RetryAdvice.RETRY_NOW),
        ("model_timeout", RetryAdvice.RETRY_NOW),
        (" Model_Timeout ", RetryAdvice.RETRY_NOW),
        ("GENERATION_DOWNSTREAM_SERVICE_ERROR", RetryAdvice.RETRY_LATER),
        ("generation_no_result", RetryAdvice.RETRY_LATER),
        ("GENERATION_PROMPT_MODERATED", RetryAdvice.CHANGE_INPUT),
        ("safety_blocked", RetryAdvice.CHANGE_INPUT),
        ("input_unreachable", RetryAdvice.CHANGE_INPUT),
        ("BILLING_LIMIT_REACHED", RetryAdvice.NOT_RETRYABLE),
        ("access_denied", RetryAdvice.NOT_RETRYABLE),
        ("VIDEO_ENTITLEMENT_REQUIRED", RetryAdvice.NOT_RETRYABLE),
        ("GENERATION_CANCELLED", RetryAdvice.NOT_RETRYABLE),
    ],
)
def test_codes_by_the_table(code: str, advice: RetryAdvice) -> None:
    """Codes are compared without case, some by their beginning or end; all are known."""
    assert retry_advice(code, "") is advice
    assert is_known(code)


@pytest.mark.parametrize("code", ["", "something_new", "billing", "GENERATION_SOMETHING"])
def test_an_unknown_code_is_not_retried(code: str) -> None:
    """What FLORA's table does not name is left to a person."""
    assert retry_advice(code, "Something went wrong") is RetryAdvice.NOT_RETRYABLE
    assert not is_known(code)


@pytest.mark.parametrize(
    "message",
    [
        "Your request was rejected by the safety system. safety_violations=[sexual]",
        "The prompt was moderated.",
        "Blocked by our content moderation",
        "This violates the provider's usage policy",
        "The model refused to answer: refusal",
    ],
)
@pytest.mark.parametrize("code", ["GPU_PROVIDER_ERROR", "GENERATION_NO_RESULT", "", "new_code"])
def test_a_message_that_names_moderation_wins(code: str, message: str) -> None:
    """Whatever the code: the same input would be refused again."""
    assert retry_advice(code, message) is RetryAdvice.CHANGE_INPUT


@pytest.mark.parametrize("message", ["Connection refused by the provider", "Too slow", ""])
def test_other_messages_leave_the_code_s_word(message: str) -> None:
    """A refused connection is no refusal of the input."""
    assert retry_advice("provider_error", message) is RetryAdvice.RETRY_NOW


def test_each_advice_is_one_plain_sentence() -> None:
    """It is shown to people as it is."""
    for advice in RetryAdvice:
        assert advice.sentence.endswith(".")
        assert len(advice.sentence) < 80
