"""Sending a start, once, and noting what its answer says.

Doubt is sticky: once a request may have acted, no later answer makes that undone. A refusal of the
second request says nothing about the first.
"""

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import partial
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    IdempotencyConflict,
    RateLimited,
    StartPending,
)
from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.flora.client import FloraClient, start_body
from tracker.polling.workspaces import Workspace
from tracker.starting.held_start import HeldStart, described
from tracker.starting.matching import Originals
from tracker.store.engine import Database
from tracker.store.queries import starts as callback_addresses
from tracker.store.queries.starts import StartState

# Starting a run: one request that spends money, and what its answer means for the key it carried.


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


# Where FLORA is asked to send the callback of a start: to an address of the start's own.
#
# A proxy may pass on the exact path `/callbacks/flora` alone, so that every callback to a start's
# own address is lost. After five that did not come new starts get the bare address again, for an
# hour.


ASK_EVERY: Final = 15.0
"""Seconds for which what the database says is believed."""

log = structlog.get_logger(__name__)


def new_token() -> str:
    """The last part of a start's own callback address: nobody can guess it."""
    return secrets.token_urlsafe(24)


class CallbackAddresses:
    """Gives addresses. `url` is the bare one; `None` where FLORA cannot reach this service."""

    def __init__(self, database: Database, *, url: str | None, clock: Clock) -> None:
        self._database = database
        self._url = url
        self._clock = clock
        self._asked_at = float("-inf")
        self.is_bare = False

    async def of(self, token: str | None) -> str | None:
        """The address for a start with that token. Raises `StoreUnavailable`."""
        if self._url is None or token is None:
            return self._url
        if time.monotonic() - self._asked_at >= ASK_EVERY:
            was_bare = self.is_bare
            self.is_bare = await callback_addresses.own_are_missing(
                self._database, now=self._clock()
            )
            self._asked_at = time.monotonic()
            if self.is_bare and not was_bare:
                log.error(
                    "callbacks.own_addresses_missing",
                    count=callback_addresses.MISSING,
                    advice=f"let {self._url}/ and everything below it through; `tracker doctor` "
                    "tries both",
                )
        return self._url if self.is_bare else f"{self._url}/{token}"


_ABOUT_THE_REQUEST: Final = (400, 404)
NO_ANSWER: Final = "FLORA gave no answer that says what became of it"

log = structlog.get_logger(__name__)


class Sender:
    """Sends starts that its caller holds."""

    def __init__(self, *, originals: Originals, addresses: CallbackAddresses, clock: Clock) -> None:
        self._originals = originals
        self._addresses = addresses
        self._clock = clock

    async def send(self, workspace: Workspace, held: HeldStart, *, deadline: float) -> Record:
        """Send it, or send it again as it was first sent; the run that it became.

        `deadline` is in seconds, until the request is written. Raises `FloraError` or
        `IdempotencyConflict` where nothing was started, `StartPending` where that is not known, and
        `StoreError`; the state is noted before.
        """
        row = held.row
        if row.is_fresh:
            url = await self._addresses.of(row.callback_token)
            body = start_body(row.inputs, idempotency_key=held.key, callback_url=url)
        else:
            # A start of a version before 0009 has no body, but all that made it.
            url = row.callback_url
            body = row.request_body or start_body(
                row.inputs, idempotency_key=held.key, callback_url=url
            )
        in_doubt = not row.is_fresh
        answer = await start(
            workspace.require_client(),
            row.technique_id,
            body=body,
            idempotency_key=held.key,
            deadline=deadline,
            fence=partial(held.let_through, url, body),
            clock=self._clock,
        )
        if answer.observation is not None:
            return await self._originals.track(row.workspace_slot, held.row, answer.observation)
        raise await self._failure(held, answer, in_doubt=in_doubt)

    async def _failure(self, held: HeldStart, answer: Answer, *, in_doubt: bool) -> Exception:
        """Note what an answer without a run says; the error that it ends with."""
        error = answer.error
        if error is None:
            raise AssertionError("an answer has a run or an error")
        if not held.has_left:
            return error
        told, verdict = described(error), answer.verdict
        if not in_doubt:
            match verdict:
                case Verdict.REFUSED:
                    await held.note(StartState.REFUSED, told)
                    return error
                case Verdict.NOT_NOW:
                    await held.note(StartState.STORED, told)
                    return error
                case Verdict.KEY_KNOWN if told.get("status") == 422:
                    await held.note(StartState.REFUSED, told)
                    conflict = IdempotencyConflict(str(error))
                    conflict.__cause__ = error
                    return conflict
        if verdict is Verdict.KEY_KNOWN or held.row.is_known_to_flora:
            told |= {"conflict": True}
        if verdict is Verdict.REFUSED and told.get("status") in _ABOUT_THE_REQUEST:
            # It would be refused each time: a person has to say what came of the first request.
            await held.note(StartState.UNRESOLVED, told)
            log.error("start.unresolved", key=held.key, error=str(error))
        else:
            await held.note(StartState.IN_DOUBT, told)
            log.warning("start.in_doubt", key=held.key, error=str(error))
        return pending(held.key)


def pending(key: str) -> StartPending:
    """The error for a start whose outcome is not known yet."""
    return StartPending(
        f"the start with idempotency key {key!r} was sent and its outcome is not known yet; it is "
        "not sent again before that is safe. The same key tells later what came of it"
    )
