"""Starting a run so that nothing is paid for twice and nothing paid for is lost.

A start's idempotency key is in the ledger before the request leaves. Whatever happens then, the
ledger row ends in one of three ways: *started* (the run is tracked), *refused* (FLORA started
nothing; the key may be sent again), or *unresolved* (it cannot be told; visible, and never sent
again by itself).

FLORA keeps a key for 24 hours by one account and for two by another, and answers its second use
either with the first answer or with a 409 that names no run. So within the shorter time the key is
simply sent again, and the history is searched for the original where that brings a 409, and before
anything is sent where the key may have been forgotten.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

import structlog

from tracker.core.clock import Clock
from tracker.core.entry import Seen
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    IdempotencyConflict,
    StartUnresolved,
    StoreError,
)
from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.flora.client import check_idempotency_key
from tracker.sources import start as source
from tracker.sources.start import Verdict
from tracker.store import read, starts
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.starts import StartRow, StartState
from tracker.tracking.catalogue import Catalogue
from tracker.tracking.durations import DurationBook
from tracker.tracking.originals import find_original
from tracker.tracking.workspaces import Workspace, Workspaces

KEY_KEPT: Final = timedelta(minutes=110)
"""So long FLORA surely remembers a key: the shorter of its two accounts, less a margin."""
SENDING: Final = timedelta(seconds=90)
"""How long one process holds a key while it sends it; longer than any one start takes."""
PAUSES: Final = (2.0, 5.0, 10.0)
"""Seconds before a start in doubt is sent again: two requests with one key at the same moment may
both run, so the first is given time to be done."""
LOOKS: Final = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each look into the history for an original: it may be listed late."""
IN_DOUBT_FOR: Final = timedelta(minutes=15)
"""How long a start whose caller is gone is looked for before it counts as unresolved."""

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
    """Starts runs. `deadline` is how many seconds one start may take, waits and repeats included.

    `callback_url` is what FLORA is told to call; `None` for polling only. `holder` names the
    process.
    """

    def __init__(
        self,
        *,
        database: Database,
        door: Door,
        workspaces: Workspaces,
        catalogue: Catalogue,
        durations: DurationBook,
        callback_url: str | None,
        holder: str,
        clock: Clock,
        deadline: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._door = door
        self._workspaces = workspaces
        self._catalogue = catalogue
        self._durations = durations
        self._callback_url = callback_url
        self._holder = holder
        self._clock = clock
        self._deadline = deadline
        self._sleep = sleep

    async def start(self, request: StartRequest) -> Started:
        """Start a run, or return the one that this key started.

        Raises `InvalidRequest` (workspace, key), `IdempotencyConflict`, `StartUnresolved`,
        `SettingsError` without a key, `StoreUnavailable`, and the `FloraError` tree for what FLORA
        answered.
        """
        workspace = self._workspaces.pick(request.workspace_id)
        workspace.require_client()
        technique_id = await self._catalogue.technique_id(workspace, request.technique)
        await self._durations.learn([technique_id])
        key = f"trk-{uuid4()}" if request.idempotency_key is None else request.idempotency_key
        check_idempotency_key(key)
        give_up = time.monotonic() + self._deadline
        row, _ = await starts.reserve(
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
        call = f"{self._holder}:{uuid4()}"
        row = await self._take(row, call, give_up)
        if row.state is StartState.STARTED:
            return Started(record=await self._record(row), replayed=True)
        # Whoever finds that nothing was sent, or that FLORA refused it, is the first to start it.
        first = row.state in (StartState.STORED, StartState.REFUSED)
        try:
            started = await self._resolve(workspace, row, first=first, give_up=give_up)
        finally:
            await starts.give_back(self._database, row.workspace_slot, row.idempotency_key, call)
        return started

    async def recover(self) -> int:
        """Find the runs of starts whose caller is gone; returns how many were found.

        Nothing is sent. A start that stays in doubt is marked unresolved.
        """
        found = 0
        now = self._clock()
        for row in await starts.open_starts(self._database, now - SENDING):
            workspace = next(
                (one for one in self._workspaces if one.slot == row.workspace_slot), None
            )
            if workspace is None or workspace.client is None:
                continue
            call = f"{self._holder}:{uuid4()}"
            if not await starts.take(
                self._database, row.workspace_slot, row.idempotency_key, call, now, SENDING
            ):
                continue
            try:
                if row.state is StartState.STORED:
                    await self._mark(row, StartState.REFUSED, {"message": _NEVER_SENT})
                elif (original := await find_original(self._database, workspace, row)) is not None:
                    await self._adopt(workspace, row, original)
                    found += 1
                elif now - row.created_at >= IN_DOUBT_FOR:
                    await self._mark(
                        row, StartState.UNRESOLVED, row.error or {"message": _NOT_TOLD}
                    )
                    log.error(
                        "start.unresolved", key=row.idempotency_key, technique_id=row.technique_id
                    )
            except FloraError as error:
                log.warning("start.recovery_failed", key=row.idempotency_key, error=str(error))
            finally:
                await starts.give_back(
                    self._database, row.workspace_slot, row.idempotency_key, call
                )
        return found

    async def _take(self, row: StartRow, call: str, give_up: float) -> StartRow:
        """Hold the key alone, or wait until whoever holds it is done. Returns the row as it is
        then."""
        pause = 0.05
        while row.state is not StartState.STARTED:
            now = self._clock()
            if await starts.take(
                self._database, row.workspace_slot, row.idempotency_key, call, now, SENDING
            ):
                return await self._row(row)
            if time.monotonic() >= give_up:
                raise StartUnresolved(
                    f"another request is still sending idempotency key {row.idempotency_key!r}: "
                    "ask again later"
                )
            await self._sleep(pause)
            pause = min(pause * 1.5, 1.0)
            row = await self._row(row)
        return row

    async def _resolve(
        self, workspace: Workspace, row: StartRow, *, first: bool, give_up: float
    ) -> Started:
        """Bring a key that this call holds to an end, by the history or by sending it."""
        if row.state is StartState.STARTED:
            return Started(record=await self._record(row), replayed=True)
        forgotten = self._clock() - row.created_at >= KEY_KEPT
        in_doubt = row.state is StartState.SENT
        if row.state is StartState.UNRESOLVED or (in_doubt and forgotten):
            duplicate = (row.error or {}).get("status") == 409
            return await self._adopt_original(
                workspace, row, give_up, send_again=not forgotten and not duplicate, first=first
            )
        return await self._send(workspace, row, first=first, give_up=give_up)

    async def _send(
        self, workspace: Workspace, row: StartRow, *, first: bool, give_up: float
    ) -> Started:
        """Send the start until it is known what became of it, or the time is up."""
        pauses = iter(PAUSES)
        attempts = 0
        while True:
            attempts += 1
            await starts.mark(
                self._database,
                row.workspace_slot,
                row.idempotency_key,
                state=StartState.SENT,
                at=self._clock(),
            )
            answer = await source.start(
                workspace.require_client(),
                row.technique_id,
                inputs=row.inputs,
                idempotency_key=row.idempotency_key,
                callback_url=self._callback_url,
                deadline=max(give_up - time.monotonic(), 1.0),
            )
            if answer.observation is not None:
                # A replay of what this very call sent is no replay to its caller.
                replayed = not first or (answer.replayed and attempts == 1)
                record = await self._track(workspace, row, answer.observation)
                return Started(record=record, replayed=replayed)
            error = answer.error or StartUnresolved(_NOT_TOLD)
            if answer.verdict is Verdict.DUPLICATE:
                await self._mark(row, StartState.SENT, _described(error))
                return await self._adopt_original(
                    workspace, row, give_up, send_again=False, first=first and attempts > 1
                )
            if answer.verdict is Verdict.CONFLICT:
                await self._mark(row, StartState.REFUSED, _described(error))
                raise IdempotencyConflict(str(error)) from error
            if answer.verdict is Verdict.NOTHING and attempts == 1:
                await self._mark(row, StartState.REFUSED, _described(error))
                raise error
            pause = next(pauses, None)
            if pause is None or time.monotonic() + pause >= give_up:
                await self._mark(row, StartState.SENT, _described(error))
                raise error
            log.warning("start.in_doubt", key=row.idempotency_key, error=str(error), retry_in=pause)
            await self._sleep(pause)

    async def _adopt_original(
        self,
        workspace: Workspace,
        row: StartRow,
        give_up: float,
        *,
        send_again: bool,
        first: bool,
    ) -> Started:
        """Find the run that this key started. With none to be told, send again or report it."""
        for pause in (0.0,) if send_again else LOOKS:
            if time.monotonic() + pause >= give_up:
                break
            await self._sleep(pause)
            original = await find_original(self._database, workspace, row)
            if original is not None:
                record = await self._adopt(workspace, row, original)
                return Started(record=record, replayed=not first)
        if send_again:
            return await self._send(workspace, row, first=False, give_up=give_up)
        fresh = await self._row(row)
        await self._mark(row, StartState.UNRESOLVED, fresh.error or {"message": _NOT_TOLD})
        raise StartUnresolved(
            f"idempotency key {row.idempotency_key!r} was sent before, and the history does not "
            f"tell which run of {row.technique_id} it became. Nothing was started again; if a run "
            "is yours, track it with `tracker runs track RUN_ID`"
        )

    async def _adopt(self, workspace: Workspace, row: StartRow, original: Observation) -> Record:
        """Track the original that the history shows, as the run that we started."""
        own = Observation(run_id=original.run_id, source=Source.START, at=self._clock())
        await self._track(workspace, row, own)
        return await self._pass(Seen(observation=original))

    async def _track(self, workspace: Workspace, row: StartRow, seen: Observation) -> Record:
        """Commit the run and close the ledger row, in one transaction."""
        workspace_id = seen.workspace_id or workspace.workspace_id
        return await self._pass(
            Seen(
                observation=replace(seen, workspace_id=workspace_id, technique_id=row.technique_id),
                inputs=row.inputs,
                callback_expected=self._callback_url is not None,
                slot=row.workspace_slot,
                idempotency_key=row.idempotency_key,
            )
        )

    async def _pass(self, entry: Seen) -> Record:
        passed = await self._door.put(entry)
        if passed.after is None:
            raise AssertionError("a sight of a run always leaves a record")
        return passed.after

    async def _row(self, row: StartRow) -> StartRow:
        """The ledger row as it stands now."""
        return await starts.get(self._database, row.workspace_slot, row.idempotency_key) or row

    async def _record(self, row: StartRow) -> Record:
        record = await read.get_run(self._database, row.run_id or "")
        if record is None:
            raise StartUnresolved(
                f"idempotency key {row.idempotency_key!r} started run {row.run_id}, "
                "which is no longer kept"
            )
        return record

    async def _mark(self, row: StartRow, state: StartState, error: dict[str, Any]) -> None:
        """Write what is known into the ledger; where that fails the row stays in doubt, as it
        is."""
        try:
            await starts.mark(
                self._database,
                row.workspace_slot,
                row.idempotency_key,
                state=state,
                error=error,
                at=self._clock(),
            )
        except StoreError as failure:
            log.error(
                "start.ledger_failed", key=row.idempotency_key, state=state, error=str(failure)
            )


_NEVER_SENT: Final = "the process ended before the start was sent; the key may be used again"
_NOT_TOLD: Final = "FLORA gave no answer, and the history shows no run that must be this start's"


def fingerprint(technique_id: str, inputs: list[dict[str, Any]]) -> str:
    """A digest of what a start asks for: equal for equal technique and inputs."""
    canonical = json.dumps([technique_id, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _described(error: Exception) -> dict[str, Any]:
    """An error as the ledger keeps it."""
    if isinstance(error, FloraRefusal):
        return {
            "status": error.status,
            "code": error.code,
            "message": error.message,
            "fields": [{"field": one.field, "message": one.message} for one in error.fields],
            "request_id": error.request_id,
        }
    return {"message": str(error)}
