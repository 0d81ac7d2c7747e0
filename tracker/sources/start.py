"""Starting a run: one request that spends money, and what its answer means for the key it
carried."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final

from tracker.core.errors import FloraError, FloraRefusal, FloraUnreachable, RateLimited
from tracker.core.observation import Observation, Source
from tracker.flora.client import FloraClient

_LISTED: Final = {
    400: ("invalid_json", "input_validation_error"),
    401: ("unauthorized", "invalid_api_key"),
    402: ("insufficient_credits",),
    403: ("forbidden", "paid_plan_required"),
    404: ("not_found",),
}
"""The refusals after which nothing runs, as FLORA documents them."""


class Verdict(Enum):
    """What an answer says of a start."""

    STARTED = "started"
    """FLORA named the run."""
    REFUSED = "refused"
    """FLORA refused it, with a listed status and code: this request did nothing."""
    NOT_NOW = "not_now"
    """FLORA takes no requests now (429), or was not reached: this request did nothing."""
    KEY_KNOWN = "key_known"
    """409 or 422: FLORA has a run, or a request, under this key, and does not say which."""
    DOUBT = "doubt"
    """No answer, a 5xx, or one that has not FLORA's shape: it may run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outcome of one request. `observation` is there where it started, else `error`."""

    verdict: Verdict
    observation: Observation | None = None
    replayed: bool = False
    error: FloraError | None = None


async def start(
    client: FloraClient,
    technique_id: str,
    *,
    body: str,
    idempotency_key: str,
    deadline: float,
    fence: Callable[[], Awaitable[None]],
    clock: Callable[[], datetime],
) -> Answer:
    """Send one start. `deadline` is in seconds, until the request is written.

    FLORA's errors are part of the answer, never raised; what `fence` raises is.
    """
    try:
        started = await client.start_run(
            technique_id,
            body=body,
            idempotency_key=idempotency_key,
            deadline=deadline,
            fence=fence,
        )
    except FloraError as error:
        if isinstance(error, FloraRefusal) and error.from_flora and error.run_id is not None:
            named = Observation(run_id=error.run_id, source=Source.START, at=clock())
            return Answer(verdict=Verdict.STARTED, observation=named, replayed=True)
        return Answer(verdict=verdict_of(error), error=error)
    return Answer(
        verdict=Verdict.STARTED, observation=started.observation, replayed=started.replayed
    )


def verdict_of(error: FloraError) -> Verdict:
    """What an error says of a start that it answered."""
    match error:
        case FloraUnreachable(may_have_acted=False):
            return Verdict.NOT_NOW
        case FloraRefusal(from_flora=False):
            return Verdict.DOUBT
        case RateLimited():
            return Verdict.NOT_NOW
        case FloraRefusal(status=409) | FloraRefusal(status=422, code="idempotency_conflict"):
            return Verdict.KEY_KNOWN
        case FloraRefusal() if error.code in _LISTED.get(error.status, ()):
            return Verdict.REFUSED
    return Verdict.DOUBT
