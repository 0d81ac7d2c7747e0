"""Starting a run: one request that spends money, and what its outcome means for the key it
carried."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    FloraUnreadable,
    ServerFault,
)
from tracker.core.observation import Observation
from tracker.flora.client import FloraClient


class Verdict(Enum):
    """What is known of a start after it was sent."""

    STARTED = "started"
    """FLORA answered with the run."""
    NOTHING = "nothing"
    """FLORA refused it, or was not reached: nothing runs, nothing is paid."""
    CONFLICT = "conflict"
    """422 `idempotency_conflict` or 409 `conflict`: FLORA has something else under this key."""
    DUPLICATE = "duplicate"
    """409: the key was used before, and the answer does not say for which run."""
    DOUBT = "doubt"
    """No answer, or one that cannot be read: it may run."""


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
    inputs: list[dict[str, Any]],
    idempotency_key: str,
    callback_url: str | None,
    deadline: float,
) -> Answer:
    """Send one start, in both documented idempotency forms. `deadline` is in seconds.

    FLORA's errors are part of the answer, never raised.
    """
    try:
        started = await client.start_run(
            technique_id,
            inputs=inputs,
            idempotency_key=idempotency_key,
            callback_url=callback_url,
            deadline=deadline,
        )
    except FloraError as error:
        return Answer(verdict=_verdict(error), error=error)
    return Answer(
        verdict=Verdict.STARTED, observation=started.observation, replayed=started.replayed
    )


def _verdict(error: FloraError) -> Verdict:
    match error:
        case FloraRefusal(status=409, code="conflict"):
            return Verdict.CONFLICT
        case FloraRefusal(status=409):
            return Verdict.DUPLICATE
        case FloraRefusal(status=422, code="idempotency_conflict"):
            return Verdict.CONFLICT
        case ServerFault() | FloraUnreadable():
            return Verdict.DOUBT
        case FloraUnreachable(may_have_acted=True):
            return Verdict.DOUBT
    return Verdict.NOTHING
