"""Sending a start, once, and noting what its answer says.

Doubt is sticky: once a request may have acted, no later answer makes that undone. A refusal of the
second request says nothing about the first.
"""

from functools import partial
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import IdempotencyConflict, StartPending
from tracker.core.record import Record
from tracker.flora.client import start_body
from tracker.sources import start as source
from tracker.sources.start import Answer, Verdict
from tracker.store.starts import StartState
from tracker.tracking.callback_address import CallbackAddresses
from tracker.tracking.ledger import HeldStart, described
from tracker.tracking.originals import Originals
from tracker.tracking.workspaces import Workspace

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
        answer = await source.start(
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
