"""Sending a start, once, and recording what its answer says.

While a process holds a start's lease, no other sends its key or writes its state. Doubt is sticky:
once a request may have acted, no later answer undoes that. A refusal of the second request says
nothing about the first.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from functools import partial
from typing import Any, Final
from uuid import uuid4

from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    IdempotencyConflict,
    RateLimited,
    StartNotStored,
    StartPending,
    StoreError,
    TrackerError,
)
from tracker.core.log import get_logger
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed, Record
from tracker.core.waiting import repeat
from tracker.flora.client import FloraClient, start_body
from tracker.store.clock import SharedClock
from tracker.store.engine import Database
from tracker.store.errors import StoreClosed
from tracker.store.queries import starts
from tracker.store.queries.starts import NotStored, SentClock, StartRow, StartState
from tracker.store.writing.writer import Writer
from tracker.workspaces import Service, Workspace

HELD_FOR: Final = timedelta(seconds=30)
"""How long the lease of a process that died lasts; a living one renews it."""
RENEW_AFTER: Final = 10.0
"""Seconds after which a lease is renewed."""
RELEASE_AGAIN_AFTER: Final = 1.0
"""Seconds until the release is tried again, if the database did not take it."""
STORED_WITHIN: Final = timedelta(minutes=10)
"""How long what is known of a start is tried to be stored with the release."""
CHECK_ADDRESSES_EVERY: Final = 15.0
"""Seconds for which the database's answer about callback addresses is used."""
STORE_AGAIN: Final = (0.2, 5.0)
"""The first and the longest wait before an answer is stored again, in seconds."""
NO_ANSWER: Final = "FLORA gave no answer that says what became of it"

_NOTHING_RUNS: Final = {
    400: ("invalid_json", "input_validation_error"),
    401: ("unauthorized", "invalid_api_key"),
    402: ("insufficient_credits",),
    403: ("forbidden", "paid_plan_required"),
    404: ("not_found",),
}
"""The refusals after which nothing runs, as FLORA documents them."""
_ABOUT_THE_REQUEST: Final = (400, 404)

log = get_logger(__name__)


class StartVerdict(Enum):
    """What an error says about the start that it answered."""

    REFUSED = "refused"
    """FLORA refused it with a documented status and code: this request did nothing."""
    NOT_NOW = "not_now"
    """FLORA takes no requests now (429), or was not reached: this request did nothing."""
    KEY_IN_USE = "key_in_use"
    """409: FLORA has a run, or a request, under this key, and does not say which."""
    KEY_CONFLICT = "key_conflict"
    """422: FLORA has another request under this key; this one did nothing."""
    DOUBT = "doubt"
    """No answer, a 5xx, or one that is not in FLORA's shape: it may run."""


def verdict_of(error: FloraError) -> StartVerdict:
    """What `error` says about the start that it answered."""
    match error:
        case FloraUnreachable(may_have_acted=False) | _KeyReplaced():
            return StartVerdict.NOT_NOW
        case FloraRefusal(from_flora=False):
            return StartVerdict.DOUBT
        case RateLimited():
            return StartVerdict.NOT_NOW
        case FloraRefusal(status=409):
            return StartVerdict.KEY_IN_USE
        case FloraRefusal(status=422, code="idempotency_conflict"):
            return StartVerdict.KEY_CONFLICT
        case FloraRefusal() if error.code in _NOTHING_RUNS.get(error.status, ()):
            return StartVerdict.REFUSED
    return StartVerdict.DOUBT


_NOTHING_DONE: Final = {
    StartVerdict.REFUSED: StartState.REFUSED,
    StartVerdict.KEY_CONFLICT: StartState.REFUSED,
    StartVerdict.NOT_NOW: StartState.STORED,
}
"""The state of a start whose first request was answered in these ways."""


class _KeyReplaced(FloraError):
    """The API key was replaced, perhaps by another workspace's: nothing was sent with it."""


@dataclass(kw_only=True, eq=False)
class StartSender(Service):
    """Sends starts whose lease the caller holds, and stores their runs.

    `callback_url` is the bare callback address; `None` if FLORA cannot reach this service. Each
    start has one of its own below it. A proxy may pass on exactly `/callbacks/flora`, so that
    callbacks to all others are lost: after five were missed, new starts get the bare address for an
    hour.
    """

    writer: Writer
    callback_url: str | None

    def __post_init__(self) -> None:
        self._checked_at = float("-inf")
        self._own_are_missing = False
        self._storing: dict[asyncio.Task[None], str] = {}

    async def aclose(self) -> None:
        """Wait for answers that are not stored yet; those that are lost by a cancellation are
        logged."""
        try:
            if self._storing:
                await asyncio.wait(self._storing)
        finally:
            for task, run_id in list(self._storing.items()):
                task.cancel()
                log.critical("start.answer_lost", run_id=run_id, advice="tracker starts resolve")

    async def send(self, workspace: Workspace, held: "HeldStart", *, deadline: float) -> Record:
        """Send a start, or send it again exactly as before; the run that it became.

        `deadline` is in seconds, until the request is written. If the API key is replaced
        meanwhile, the new one is used, provided that it is of the same workspace. Raises
        `FloraError` or `IdempotencyConflict` if nothing was started, `StartPending` if that is
        unknown, `SettingsError` if the key is of another workspace, and `StoreError`; the state is
        recorded before.
        """
        while True:
            try:
                return await self._send(workspace, held, deadline)
            except _KeyReplaced:
                log.info("start.key_replaced", key=held.key)

    async def _send(self, workspace: Workspace, held: "HeldStart", deadline: float) -> Record:
        client = workspace.require_client()
        api_key = client.key_fingerprint
        await self.workspaces.id_of(workspace, wanted=held.row.workspace_id, deadline=deadline)
        row = held.row
        in_doubt = not row.is_fresh
        url = row.callback_url if in_doubt else await self.address_of(row.callback_token)
        # A start of a version before 0009 has no body, but everything that made it.
        body = row.request_body if in_doubt else None
        if not body:
            body = start_body(row.inputs, idempotency_key=held.key, callback_url=url)
        try:
            seen = await client.start_run(
                row.technique_id,
                body=body,
                idempotency_key=held.key,
                deadline=deadline,
                fence=partial(held.let_through, client, api_key, url, body),
            )
        except StoreError as error:  # of the fence
            raise held.not_known_to_be_sent() from error
        except FloraError as error:
            if not (isinstance(error, FloraRefusal) and error.from_flora and error.run_id):
                failure = await self._failure(held, error, in_doubt=in_doubt)
                if failure is error:
                    raise
                raise failure from error
            seen = Observation(run_id=error.run_id, source=Source.START, at=self.clock())
        return await self._track(held.row, seen)

    async def _track(self, row: StartRow, seen: Observation) -> Record:
        """Store a run as the start's, which closes the start, in one transaction.

        Raises `StartNotStored` if the database does not take it now; that is tried again until it
        does, for as long as the process lives.
        """
        entry = row.became(seen, callback_expected=row.callback_url is not None)
        try:
            return (await self.writer.submit(entry)).record
        except StoreError as error:
            log.error(
                "start.not_stored", run_id=seen.run_id, key=row.idempotency_key, error=str(error)
            )
            storing = asyncio.create_task(self._store(entry), name="start-answer")
            self._storing[storing] = seen.run_id
            storing.add_done_callback(lambda done: self._storing.pop(done, None))
            raise StartNotStored(
                f"FLORA started run {seen.run_id}, and the database could not store it yet; this "
                "is retried",
                run_id=seen.run_id,
            ) from error

    async def adopt(
        self, row: StartRow, run_id: str, observation: Observation | None = None
    ) -> Record:
        """Store a run as the start's, and what FLORA showed of it, if anything."""
        own = Observation(run_id=run_id, source=Source.START, at=self.clock())
        record = await self._track(row, own)
        if observation is not None:
            record = (await self.writer.submit(Observed(observation=observation))).record
        return record

    async def _store(self, entry: Observed) -> None:
        wait, longest = STORE_AGAIN
        while True:
            await asyncio.sleep(wait)
            wait = min(wait * 2, longest)
            try:
                await self.writer.submit(entry)
            except StoreError as error:
                log.debug("start.still_not_stored", error=str(error))
            else:
                log.info("start.stored", run_id=entry.observation.run_id)
                return

    async def address_of(self, token: str | None) -> str | None:
        """The callback address for a start with that token. Raises `StoreUnavailable`."""
        if self.callback_url is None or token is None:
            return self.callback_url
        if time.monotonic() - self._checked_at >= CHECK_ADDRESSES_EVERY:
            were_missing = self._own_are_missing
            self._own_are_missing = await starts.own_are_missing(self.database, now=self.clock())
            self._checked_at = time.monotonic()
            if self._own_are_missing and not were_missing:
                log.error(
                    "callbacks.own_addresses_missing",
                    count=starts.MISSING,
                    advice=f"let {self.callback_url}/ and everything below it through; `tracker "
                    "doctor` tries both",
                )
        return self.callback_url if self._own_are_missing else f"{self.callback_url}/{token}"

    async def _failure(self, held: "HeldStart", error: FloraError, *, in_doubt: bool) -> Exception:
        """Record an answer without a run; the error to raise."""
        if held.is_marking:
            return held.not_known_to_be_sent()
        if not held.was_sent:
            return error
        kept, verdict = _as_kept(error), verdict_of(error)
        if not in_doubt and (state := _NOTHING_DONE.get(verdict)) is not None:
            outcome = known_to_flora(held.key) if verdict is StartVerdict.KEY_CONFLICT else error
            # Until it is stored, the start is in doubt.
            return outcome if await held.record(state, kept) else pending(held.key)
        is_key_known = verdict in (StartVerdict.KEY_IN_USE, StartVerdict.KEY_CONFLICT)
        if is_key_known or held.row.is_known_to_flora:
            kept |= {"conflict": True}
        if held.row.excluded_runs:
            kept |= {"excluded": sorted(held.row.excluded_runs)}
        if verdict is StartVerdict.REFUSED and kept.get("status") in _ABOUT_THE_REQUEST:
            # It would be refused each time; only a person can say what the first request did.
            await held.record(StartState.UNRESOLVED, kept)
            log.error("start.unresolved", key=held.key, error=str(error))
        else:
            await held.record(StartState.IN_DOUBT, kept)
            log.warning("start.in_doubt", key=held.key, error=str(error))
        return pending(held.key)


def pending(key: str) -> StartPending:
    """The error for a start whose outcome is unknown so far."""
    return StartPending(
        f"the start with idempotency key {key!r} was sent and its outcome is not known yet; it is "
        "not sent again before that is safe. Ask again later with the same key"
    )


def known_to_flora(key: str) -> IdempotencyConflict:
    """The error for a key with which FLORA knows another request than ours (422)."""
    return IdempotencyConflict(
        f"FLORA has another request with idempotency key {key!r}: of another program, or of this "
        "tracker before its database was restored. Nothing was started, and the key is not sent "
        f"again: use another, or settle it with `tracker starts resolve {key}`, by --run RUN_ID "
        "or --none"
    )


def _as_kept(error: FloraError) -> dict[str, Any]:
    if not isinstance(error, FloraRefusal):
        return {"message": str(error)}
    return {
        "status": error.status,
        "code": error.code,
        "message": error.message,
        "fields": [one.to_json() for one in error.fields],
        "request_id": error.request_id,
    }


@dataclass(slots=True)
class HeldStart:
    """A start whose lease one caller holds.

    `valid_until` is until when the lease surely lasts, in `clock.seconds`; `was_sent` is whether a
    request was let through since it was taken. `is_marking` is true while that is being stored: an
    interruption leaves open whether it is. What is `not_stored` is stored when the lease is
    released.
    """

    database: Database
    clock: SharedClock
    row: StartRow
    holder: str
    valid_until: float
    was_sent: bool = False
    is_marking: bool = False
    not_stored: NotStored | None = None

    @property
    def key(self) -> str:
        return self.row.idempotency_key

    @property
    def _id(self) -> tuple[str, str]:
        return self.row.workspace_id, self.key

    @property
    def has_expired(self) -> bool:
        """Whether another caller may hold the lease by now."""
        return self.clock.seconds() >= self.valid_until

    async def let_through(
        self, client: FloraClient, api_key: str, callback_url: str | None, request_body: str
    ) -> None:
        """The fence, awaited directly before a request is written.

        Raises `_KeyReplaced` if the client's key is not the one with that fingerprint any more,
        `StartPending` if the lease has expired, however long this process or the machine was
        suspended, and `StoreError` if that is unknown.
        """
        if client.key_fingerprint != api_key:
            raise _KeyReplaced("the API key was replaced while a start was sent")
        offset, seconds = client.clock_offset, self.clock.seconds()
        ahead = None if offset is None else offset.total_seconds()
        self.is_marking, at = True, self.clock.at(seconds)
        self.not_stored = starts.as_before(self.row, at)
        row = await starts.mark_sent(
            self.database,
            *self._id,
            holder=self.holder,
            at=at,
            callback_url=callback_url,
            request_body=request_body,
            sent=SentClock(self.clock.boot, seconds, ahead),
        )
        self.is_marking = False
        if row is None:
            self.not_stored = None
        # Checked last: the machine may have been suspended after the database answered.
        if row is None or self.has_expired:
            raise StartPending(
                f"idempotency key {self.key!r} was taken over by another request: ask again soon"
            )
        self.row, self.was_sent, self.not_stored = row, True, None

    def not_known_to_be_sent(self) -> StartPending:
        """The error if the database may have stored that the start is sent, and nothing was sent:
        it is sent then once its doubt ends."""
        return StartPending(
            f"the database did not confirm that the start with idempotency key {self.key!r} is "
            "sent, so it was not sent yet. It may be later: ask again soon with the same key"
        )

    async def record(self, state: StartState, error: dict[str, Any] | None) -> bool:
        """Store the state; whether it is stored. If not, the row stays as it is."""
        try:
            row = await starts.mark(
                self.database, *self._id, holder=self.holder, state=state, error=error
            )
        except StoreError as failure:
            log.error("start.not_noted", key=self.key, state=state, error=str(failure))
            self.not_stored = NotStored(self.row.sent_at, starts.outcome(state, error))
            return False
        self.row, self.not_stored = row or self.row, None
        return row is not None

    async def renew(self) -> None:
        """Renew the lease in a while."""
        await asyncio.sleep(RENEW_AFTER)
        valid_until = self.clock.seconds() + HELD_FOR.total_seconds()
        mine = await starts.prolong(self.database, *self._id, self.holder, self.clock(), HELD_FOR)
        # An expired lease may have been free meanwhile, and its budget another start's.
        is_kept = mine and not self.has_expired
        self.valid_until = valid_until if is_kept else float("-inf")


def holding(service: Service, row: StartRow) -> AbstractAsyncContextManager[HeldStart | None]:
    """Hold the lease of a stored start. Raises `StoreUnavailable`; else as `held_by`."""
    start = row.workspace_id, row.idempotency_key

    async def take(holder: str, lease: timedelta) -> StartRow | None:
        return await starts.take(service.database, *start, holder, service.clock(), lease)

    return held_by(service, start, take)


@asynccontextmanager
async def held_by(
    service: Service,
    start: tuple[str, str],
    take: Callable[[str, timedelta], Awaitable[StartRow | None]],
) -> AsyncIterator[HeldStart | None]:
    """Hold the lease of a start; `None` if another caller has it, or the start became a run.

    `start` is its workspace and key; `take(holder, lease)` takes the lease for so long and returns
    the row, or `None`. Raises what `take` raises.
    """
    database, clock = service.database, service.clock
    holder = f"{service.process}:{uuid4()}"
    held: HeldStart | None = None
    taken = True  # as far as is known if taking it is interrupted
    valid_until = clock.seconds() + HELD_FOR.total_seconds()
    try:
        try:
            row = await take(holder, HELD_FOR)
        except TrackerError:
            # It is hardly ever taken all the same, and expires then. During an outage every start
            # would try for half a minute to release what it does not have.
            taken = False
            raise
        if row is None:
            taken = False
            yield None
            return
        held = HeldStart(database, clock, row, holder, valid_until)
        renewing = asyncio.create_task(
            repeat("start lease", held.renew, is_over=lambda: held.has_expired)
        )
        try:
            yield held
        finally:
            renewing.cancel()
    finally:
        if taken:
            releasing = asyncio.create_task(_release(service, start, holder, held))
            _releasing.add(releasing)  # the event loop keeps weak references only
            releasing.add_done_callback(_releasing.discard)
            await asyncio.wait([releasing], timeout=database.url.times.release)


_releasing: set[asyncio.Task[None]] = set()


async def _release(
    service: Service, start: tuple[str, str], holder: str, held: HeldStart | None
) -> None:
    """Release a lease, repeatedly until it expires: it would delay the caller's next attempt. What
    is not stored is tried for longer, and again once another holder is done: the start would stay
    in doubt."""
    seconds = service.clock.seconds
    known = None if held is None else held.not_stored
    lasts = HELD_FOR if known is None else STORED_WITHIN
    give_up, logged = seconds() + lasts.total_seconds(), False
    while seconds() < give_up:
        try:
            if await starts.give_back(service.database, *start, holder, known) or known is None:
                return
        except StoreClosed:
            return
        except StoreError as failure:
            if not logged:
                log.warning("start.hold_kept", key=start[1], error=str(failure))
            logged = True
        await asyncio.sleep(RELEASE_AGAIN_AFTER)
