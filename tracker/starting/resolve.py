"""A person says what came of a start that is not known by itself."""

from dataclasses import replace
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import FieldFault, InvalidRequest, NotFound, StartPending, TrackerError
from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.polling.workspaces import WorkspaceIds, Workspaces
from tracker.starting.held_start import HeldStart, holding
from tracker.starting.matching import Originals
from tracker.store.engine import Database
from tracker.store.queries import audit, starts
from tracker.store.queries.audit import Action
from tracker.store.queries.starts import UNKNOWN, StartRow, StartState

NOTHING_STARTED: Final = "a person says that nothing was started; the key may be used again"

log = structlog.get_logger(__name__)


class UnknownStart(TrackerError):
    """No start of that key is kept here."""


class Resolver:
    """Settles starts by a person's word."""

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        ids: WorkspaceIds,
        originals: Originals,
        process: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._ids = ids
        self._originals = originals
        self._process = process
        self._clock = clock

    async def find(self, key: str, *, workspace_id: str | None = None) -> StartRow:
        """The start of that key.

        Raises `UnknownStart`, `InvalidRequest` where several workspaces have one and none is named,
        and `StoreUnavailable`.
        """
        rows = await starts.of_key(self._database, key)
        rows = [row for row in rows if workspace_id in (None, row.workspace_slot)]
        if not rows:
            raise UnknownStart(f"no start with idempotency key {key!r} is kept here")
        if len(rows) > 1:
            message = "several workspaces have a start of this key, name one of them: "
            message += ", ".join(row.workspace_slot for row in rows)
            raise InvalidRequest(message, [FieldFault("workspace_id", message)])
        return rows[0]

    async def is_run(self, row: StartRow, run_id: str) -> Record:
        """It became that run, which is tracked as ours.

        Raises `InvalidRequest` where its outcome is known, or the run is another start's or not
        there; `StartPending` where it is being sent; and what asking FLORA raises.
        """
        _check_state(row)
        owner = await starts.of_run(self._database, run_id)
        if owner is not None and owner.idempotency_key != row.idempotency_key:
            raise _wrong(f"run {run_id} is the one of the start {owner.idempotency_key!r}")
        observed = await self._read(row, run_id)
        async with holding(self._database, row, self._process, self._clock) as held:
            _check(held, row)
            await self._note(row, run_id)
            own = Observation(run_id=run_id, source=Source.START, at=self._clock())
            record = await self._originals.track(row.workspace_slot, row, own)
            if observed is not None:
                record = await self._originals.observe(replace(observed, source=Source.POLL))
        _log(row, run_id)
        return record

    async def is_nothing(self, row: StartRow) -> None:
        """Nothing was started: its key may be used again. Raises as `is_run`."""
        _check_state(row)
        async with holding(self._database, row, self._process, self._clock) as held:
            mine = _check(held, row)
            await self._note(row, None)
            await mine.note(StartState.REFUSED, {"message": NOTHING_STARTED})
        _log(row, None)

    async def _note(self, row: StartRow, run_id: str | None) -> None:
        """Note in the audit log what is about to be said, whatever comes of it."""
        entry = audit.entry(
            Action.RESOLVE,
            self._clock(),
            workspace_id=row.workspace_slot,
            idempotency_key=row.idempotency_key,
            outcome="nothing was started" if run_id is None else "it became a run",
            run_id=run_id,
        )
        await audit.write(self._database, entry)

    async def _read(self, row: StartRow, run_id: str) -> Observation | None:
        """The run as FLORA shows it; `None` where there is no key to ask with."""
        for workspace in self._workspaces:
            if workspace.client is None:
                continue
            if await self._ids.of(workspace) != row.workspace_slot:
                continue
            try:
                return await workspace.client.get_run(row.technique_id, run_id)
            except NotFound:
                raise _wrong(f"FLORA has no run {run_id} of {row.technique_id}") from None
        return None


def _log(row: StartRow, run_id: str | None) -> None:
    actor = audit.principal().name
    log.info("start.resolved", key=row.idempotency_key, run_id=run_id, actor=actor)


def _check(held: HeldStart | None, row: StartRow) -> HeldStart:
    if held is None:
        raise StartPending(f"the start {row.idempotency_key!r} is being sent: ask again soon")
    _check_state(held.row)
    return held


def _check_state(row: StartRow) -> None:
    if row.state not in UNKNOWN:
        raise _wrong(f"what came of the start {row.idempotency_key!r} is known: {row.state}")


def _wrong(message: str) -> InvalidRequest:
    return InvalidRequest(message, [FieldFault("key", message)])
