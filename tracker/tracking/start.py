"""Starting a run so that nothing is paid for twice and nothing paid for is lost.

A start's idempotency key is in the ledger before the request leaves. Whatever happens then, the
ledger row ends in one of three ways: *started* (the run is tracked), *refused* (nothing was
started; the key may be sent again), or *unresolved* (it cannot be told; visible, and never sent
again by itself).

FLORA keeps a key for 24 hours by one account and for two by another, and answers its second use
either with the first answer or with a 409 that names no run. So within the shorter time the key is
simply sent again, and the history is searched for the original where that brings a 409, and before
anything is sent where the key may have been forgotten.

Once a request may have acted, no later answer makes that undone: a refusal of the second request
says nothing about the first.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import (
    FloraRefusal,
    FloraUnreachable,
    IdempotencyConflict,
    StartUnderWay,
    StartUnresolved,
)
from tracker.core.record import Record
from tracker.flora.client import check_idempotency_key
from tracker.sources import start as source
from tracker.sources.start import Verdict
from tracker.store import read, starts
from tracker.store.engine import Database
from tracker.store.starts import StartRow, StartState
from tracker.tracking.catalogue import Catalogue
from tracker.tracking.durations import DurationBook
from tracker.tracking.ledger import HeldStart, described, holding
from tracker.tracking.originals import Originals
from tracker.tracking.recover import NOT_TOLD
from tracker.tracking.workspaces import Workspace, Workspaces

KEY_KEPT: Final = timedelta(minutes=110)
"""So long FLORA surely remembers a key: the shorter of its two accounts, less a margin."""
PAUSES: Final = (2.0, 5.0, 10.0)
"""Seconds before a start in doubt is sent again: two requests with one key at the same moment may
both run, so the one before is given time to be done."""
LOOKS: Final = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each look into the history for an original: it may be listed late."""
LISTED_AFTER: Final = timedelta(minutes=1)
"""A run is in the history after this."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """What to start: a technique by id or slug, and inputs as `{"id", "type", "value"}` each."""

    technique: str
    inputs: list[dict[str, Any]]
    workspace_id: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The run, and whether this key had started it before."""

    record: Record
    replayed: bool


class Starter:
    """Starts runs.

    `callback_url` is what FLORA is told to call; `None` for polling only. `process` names this
    process in the ledger. `deadline` is how many seconds one start is tried: what is under way then
    is still brought to its answer.
    """

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        catalogue: Catalogue,
        durations: DurationBook,
        originals: Originals,
        callback_url: str | None,
        process: str,
        clock: Clock,
        deadline: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._catalogue = catalogue
        self._durations = durations
        self._originals = originals
        self._callback_url = callback_url
        self._process = process
        self._clock = clock
        self._deadline = deadline
        self._sleep = sleep

    async def start(self, request: StartRequest) -> Started:
        """Start a run, or return the one that this key started.

        Raises `InvalidRequest` (workspace, key, inputs), `IdempotencyConflict`, `StartUnresolved`,
        `SettingsError` without an API key, `StoreUnavailable`, and the `FloraError` tree for what
        FLORA answered.
        """
        workspace = self._workspaces.pick(request.workspace_id)
        workspace.require_client()
        key = f"trk-{uuid4()}" if request.idempotency_key is None else request.idempotency_key
        check_idempotency_key(key)
        give_up = time.monotonic() + self._deadline
        technique_id = await self._technique_id(workspace, request, key)
        await self._durations.learn([technique_id])
        row = await starts.reserve(
            self._database,
            workspace_slot=workspace.slot,
            idempotency_key=key,
            technique_id=technique_id,
            fingerprint=fingerprint(technique_id, request.inputs),
            inputs=request.inputs,
            at=self._clock(),
        )
        if row.fingerprint != fingerprint(technique_id, request.inputs):
            raise IdempotencyConflict(
                f"idempotency key {key!r} was used before for another technique or other inputs"
            )
        pause = 0.05
        while row.state is not StartState.STARTED:
            async with holding(self._database, row, self._process, self._clock) as held:
                if held is not None and held.row.state is not StartState.STARTED:
                    try:
                        return await self._bring_to_an_end(workspace, held, give_up)
                    except FloraRefusal as refusal:
                        await self._catalogue.refused(technique_id, refusal)
                        raise
            if held is None and time.monotonic() >= give_up:
                raise StartUnderWay(
                    f"another request is still sending idempotency key {key!r}: ask again soon"
                )
            await self._sleep(pause)
            pause = min(pause * 1.5, 1.0)
            row = await starts.get(self._database, workspace.slot, key) or row
        return Started(record=await self._record(row), replayed=True)

    async def _technique_id(self, workspace: Workspace, request: StartRequest, key: str) -> str:
        """What to start, its inputs checked: before the key is kept, or it could not be mended.

        A key that may have been sent is not checked: whatever the definition says by now, its
        answer is that start's.
        """
        before = await starts.get(self._database, workspace.slot, key)
        if before is not None and before.state not in (StartState.STORED, StartState.REFUSED):
            return await self._catalogue.technique_id(workspace, request.technique)
        return await self._catalogue.checked(
            workspace, request.technique, request.inputs, deadline=self._deadline
        )

    async def _bring_to_an_end(
        self, workspace: Workspace, held: HeldStart, give_up: float
    ) -> Started:
        """Find out what became of a key, by the history or by sending it."""
        row = held.row
        fresh = row.state in (StartState.STORED, StartState.REFUSED)
        forgotten = self._clock() - (row.in_use_since or row.created_at) >= KEY_KEPT
        if not fresh and (forgotten or row.state is StartState.UNRESOLVED):
            duplicate = (row.error or {}).get("status") == 409
            # What was sent a while ago is listed by now, or never will be.
            recent = self._clock() - (row.sent_at or row.created_at) < LISTED_AFTER
            looks = LOOKS if recent and duplicate else LOOKS[:1]
            found = await self._look(workspace, held, looks, give_up)
            if found is not None:
                return Started(record=found, replayed=True)
            if forgotten or duplicate:
                raise await self._unresolved(held)
        return await self._send(workspace, held, fresh=fresh, give_up=give_up)

    async def _send(
        self, workspace: Workspace, held: HeldStart, *, fresh: bool, give_up: float
    ) -> Started:
        """Send the start until it is known what became of it, or the time is up.

        `fresh` tells that no request of this key can have acted yet.
        """
        in_doubt = not fresh
        if held.row.sent_at is not None and in_doubt:
            since = (self._clock() - held.row.sent_at).total_seconds()
            await self._sleep(min(max(PAUSES[0] - since, 0.0), PAUSES[0]))
        pauses = iter(PAUSES)
        while True:
            await held.about_to_send(self._callback_url)
            answer = await source.start(
                workspace.require_client(),
                held.row.technique_id,
                inputs=held.row.inputs,
                idempotency_key=held.key,
                callback_url=held.row.callback_url,
                deadline=max(give_up - time.monotonic(), 1.0),
            )
            if answer.observation is not None:
                # A replay of what this very call sent is no replay to its caller.
                replayed = not fresh or (answer.replayed and not in_doubt)
                record = await self._originals.track(workspace, held.row, answer.observation)
                return Started(record=record, replayed=replayed)
            error = answer.error or StartUnresolved(NOT_TOLD)
            ours = answer.verdict is Verdict.CONFLICT and in_doubt
            if answer.verdict is Verdict.DUPLICATE or ours:
                # Noted as it is: should nothing be found now, it is not sent again later either.
                await held.note(StartState.SENT, described(error) | {"status": 409})
                found = await self._look(workspace, held, LOOKS, give_up)
                if found is None:
                    raise await self._unresolved(held)
                return Started(record=found, replayed=not (fresh and in_doubt))
            if not in_doubt and answer.verdict is not Verdict.DOUBT:
                await held.note(StartState.REFUSED, described(error))
                if answer.verdict is Verdict.CONFLICT:
                    raise IdempotencyConflict(str(error)) from error
                raise error
            in_doubt = True
            await held.note(StartState.SENT, described(error))
            # Where FLORA is slow, rather than cut off, the request may be at work for long: it is
            # left to the caller's next try, or to the recovery, which asks the history.
            slow = isinstance(error, FloraUnreachable) and error.timed_out
            pause = None if slow else next(pauses, None)
            if pause is None or time.monotonic() + pause >= give_up:
                raise error
            log.warning("start.in_doubt", key=held.key, error=str(error), retry_in=pause)
            await self._sleep(pause)

    async def _look(
        self, workspace: Workspace, held: HeldStart, looks: tuple[float, ...], give_up: float
    ) -> Record | None:
        """Look for the key's run in the history, and track it as ours where it can be told."""
        for pause in looks:
            if pause and time.monotonic() + pause >= give_up:
                break
            await self._sleep(pause)
            original = await self._originals.find(workspace, held.row, give_up=give_up)
            if original is not None:
                return await self._originals.adopt(workspace, held.row, original)
        return None

    async def _unresolved(self, held: HeldStart) -> StartUnresolved:
        """Note that nobody can tell; returns the error that says so."""
        await held.note(StartState.UNRESOLVED, held.row.error or {"message": NOT_TOLD})
        return StartUnresolved(
            f"idempotency key {held.key!r} was sent before, and the history does not tell which "
            f"run of {held.row.technique_id} it became. Nothing was started again; if a run is "
            "yours, track it with `tracker runs track RUN_ID`"
        )

    async def _record(self, row: StartRow) -> Record:
        record = await read.get_run(self._database, row.run_id or "")
        if record is None:
            raise StartUnresolved(
                f"idempotency key {row.idempotency_key!r} started run {row.run_id}, "
                "which is no longer kept"
            )
        return record


def fingerprint(technique_id: str, inputs: list[dict[str, Any]]) -> str:
    """A digest of what a start asks for: equal for equal technique and inputs."""
    canonical = json.dumps([technique_id, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
