"""What a person says: the outcome of a start in doubt, or the id of a run started elsewhere."""

from dataclasses import dataclass, replace
from typing import Any, Final

from tracker.core.errors import (
    FieldFault,
    FloraError,
    InvalidRequest,
    NotFound,
    NotTracked,
    SettingsError,
    StartPending,
    StoreUnavailable,
    TrackerError,
)
from tracker.core.log import get_logger
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed, Record
from tracker.core.run import RunState
from tracker.polling.poll import Poller
from tracker.starting.catalogue import Catalogue
from tracker.starting.recover import naming
from tracker.starting.sending import HeldStart, StartSender, holding
from tracker.store.queries import audit, runs, starts
from tracker.store.queries.audit import Action
from tracker.store.queries.starts import UNKNOWN, StartRow, StartState
from tracker.store.writing.statements import ShownByFlora, forget_run
from tracker.store.writing.writer import Writer
from tracker.workspaces import Service, Workspace

NOTHING_STARTED: Final = "a person says that nothing was started; the key may be used again"

log = get_logger(__name__)


class UnknownStart(TrackerError):
    """No start of that key is kept here."""


@dataclass(kw_only=True, eq=False)
class StartResolver(Service):
    """Ends the doubt about a start by a person's decision."""

    sender: StartSender

    async def find(self, key: str, *, workspace_id: str | None = None) -> StartRow:
        """The start of that key.

        Raises `UnknownStart`, `InvalidRequest` if several workspaces have one and none is named,
        and `StoreUnavailable`.
        """
        rows = await starts.of_key(self.database, key)
        rows = [row for row in rows if workspace_id in (None, row.workspace_id)]
        if not rows:
            raise UnknownStart(f"there is no start with idempotency key {key!r}")
        if len(rows) > 1:
            message = "several workspaces have a start of this key, name one of them: "
            message += ", ".join(row.workspace_id for row in rows)
            raise InvalidRequest(message, [FieldFault("workspace_id", message)])
        return rows[0]

    async def possible(self, row: StartRow) -> dict[str, Record | None] | None:
        """The only runs that an open start may have become, by id, each with what is stored of it;
        `None` if that is not known. Raises `StoreUnavailable`."""
        left = (await starts.with_runs_left(self.database, row)).possible_runs
        if row.state not in UNKNOWN or left is None:
            return None
        stored = await runs.get_runs(self.database, left)
        return {run_id: stored.get(run_id) for run_id in sorted(left)}

    async def is_run(self, row: StartRow, run_id: str) -> Record:
        """The start became that run, which is tracked as its own.

        Raises `InvalidRequest` if the outcome is known, or the run is another start's or, unless
        the workspace's key reads it, of another workspace; `NotTracked` if FLORA does not have it;
        `StartPending` while the start is being sent; and what reading FLORA raises.
        """
        _check_state(row)
        owner = await starts.of_run(self.database, run_id)
        if owner is not None and _id_of(owner) != _id_of(row):
            raise _fault(
                f"run {run_id} belongs to the start {owner.idempotency_key!r} of workspace "
                f"{owner.workspace_id}"
            )
        seen = await self._read(row, run_id)
        if seen is None:
            await self._check_workspace(row, run_id)
        async with holding(self, row) as held:
            _check(held, row)
            await self._audit(row, run_id, "it became a run")
            record = await self.sender.adopt(row, run_id, seen)
        _log_resolved(row, run_id)
        return record

    async def is_nothing(self, row: StartRow) -> None:
        """Nothing was started: the key may be used again. Raises like `is_run`."""
        _check_state(row)
        async with holding(self, row) as held:
            mine = _check(held, row)
            await self._audit(row, None, "nothing was started")
            await _store(mine, StartState.REFUSED, {"message": NOTHING_STARTED})
        _log_resolved(row, None)

    async def exclude(self, run_id: str) -> list[StartRow]:
        """Someone else started that run: no start without a known outcome became it. The starts
        that may have, as they are now.

        One in doubt goes on, and is sent again if no run is left; an unresolved one of which none
        is left counts as not started. Raises `InvalidRequest` if there is none, `StartPending`
        while one is being sent, and `StoreUnavailable`; what was done until then is kept, and
        repeating it does the rest.
        """
        rows = await starts.that_may_be(self.database, run_id)
        if not rows:
            raise _fault(f"no start without a known outcome may have become run {run_id}")
        changed = [await self._exclude(row, run_id) for row in rows]
        return [await starts.with_runs_left(self.database, row) for row in changed]

    async def _exclude(self, row: StartRow, run_id: str) -> StartRow:
        async with holding(self, row) as held:
            mine = _check(held, row)
            row = mine.row
            left = await starts.possible(self.database, row, row.possible_runs or ())
            if run_id not in left:
                return row
            left.discard(run_id)
            await self._audit(row, run_id, "someone else started the run")
            error = row.with_possible(left) or {}
            error |= {"excluded": sorted({*row.excluded_runs, run_id})}
            if row.state is StartState.IN_DOUBT:
                await _store(mine, row.state, error)
            elif left or row.is_known_to_flora:
                await _store(mine, StartState.UNRESOLVED, naming(error, left))
            else:
                await _store(mine, StartState.REFUSED, {"message": NOTHING_STARTED})
            actor = audit.principal().name
            log.info("start.run_excluded", key=row.idempotency_key, run_id=run_id, actor=actor)
            return mine.row

    async def _audit(self, row: StartRow, run_id: str | None, outcome: str) -> None:
        """Record the decision in the audit log before it is carried out."""
        entry = audit.entry(
            Action.RESOLVE,
            self.clock(),
            workspace_id=row.workspace_id,
            idempotency_key=row.idempotency_key,
            outcome=outcome,
            run_id=run_id,
        )
        await audit.write(self.database, entry)

    async def _read(self, row: StartRow, run_id: str) -> Observation | None:
        """The run as FLORA shows it; `None` without a key to read it with."""
        workspace = await self.workspaces.with_id(row.workspace_id)
        if workspace is None:
            return None
        try:
            return await workspace.require_client().get_run(row.technique_id, run_id)
        except NotFound:
            raise NotTracked(f"FLORA has no run {run_id} of {row.technique_id}") from None

    async def _check_workspace(self, row: StartRow, run_id: str) -> None:
        """Check that no other workspace has shown a run that cannot be read."""
        stored = await runs.get_run(self.database, run_id)
        if stored is None or not stored.run.workspace_is_confirmed:
            return
        if (known := stored.run.workspace_id) != row.workspace_id:
            raise _fault(
                f"run {run_id} is of workspace {known}, and the start of {row.workspace_id}"
            )


def _id_of(row: StartRow) -> tuple[str, str]:
    return row.workspace_id, row.idempotency_key


def _log_resolved(row: StartRow, run_id: str | None) -> None:
    actor = audit.principal().name
    log.info("start.resolved", key=row.idempotency_key, run_id=run_id, actor=actor)


async def _store(held: HeldStart, state: StartState, error: dict[str, Any]) -> None:
    """Record the decision. Raises `StoreUnavailable` if the database did not take it."""
    if not await held.record(state, error):
        raise StoreUnavailable(
            f"the decision about the start {held.key!r} could not be stored: repeat it"
        )


def _check(held: HeldStart | None, row: StartRow) -> HeldStart:
    if held is None:
        raise StartPending(f"the start {row.idempotency_key!r} is being sent: ask again soon")
    _check_state(held.row)
    return held


def _check_state(row: StartRow) -> None:
    if not isinstance(row.state, StartState):
        raise _fault(
            f"the start {row.idempotency_key!r} is left to a newer version of the tracker, which "
            f"calls it {row.state}"
        )
    if row.state not in UNKNOWN and not (row.is_fresh and row.is_known_to_flora):
        raise _fault(f"the outcome of the start {row.idempotency_key!r} is known: {row.state}")


def _fault(message: str) -> InvalidRequest:
    return InvalidRequest(message, [FieldFault("key", message)])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """A run that is tracked now, and whether it was known before."""

    record: Record
    known: bool


class NotForgotten(TrackerError):
    """The run is not stored, or FLORA has shown it."""


@dataclass(kw_only=True, eq=False)
class RunTracker(Service):
    """Tracks runs that were started elsewhere, and stops it. Only their ids are believed."""

    writer: Writer
    poller: Poller
    catalogue: Catalogue

    async def track(
        self,
        run_id: str,
        *,
        technique: str | None = None,
        workspace_id: str | None = None,
        poll_url: str | None = None,
    ) -> TrackedRun:
        """Track `run_id`, which is due to be polled at once.

        `technique` is an id or a slug. Raises `InvalidRequest` for an unknown workspace and
        `StoreUnavailable`.
        """
        workspace = await self.workspaces.pick(workspace_id)
        result = await self.writer.submit(
            Observed(
                observation=Observation(
                    run_id=run_id,
                    source=Source.TRACK,
                    at=self.clock(),
                    workspace_id=workspace_id or workspace.workspace_id,
                    technique_id=await self._technique_id(workspace, technique),
                    poll_url=poll_url,
                )
            )
        )
        return TrackedRun(record=result.record, known=result.before is not None)

    async def track_shown(
        self, run_id: str, *, technique: str | None = None, workspace_id: str | None = None
    ) -> TrackedRun:
        """As `track`, but only what FLORA shows or is stored already; FLORA's answer is stored.

        Raises `NotTracked` too.
        """
        stored = await runs.get_run(self.database, run_id)
        if stored is not None:
            tracked = await self.track(run_id, technique=technique, workspace_id=workspace_id)
            return replace(tracked, record=await self.poller.read_now(tracked.record))
        workspace = await self.workspaces.pick(workspace_id)
        run = RunState(
            run_id=run_id,
            workspace_id=workspace_id or workspace.workspace_id,
            technique_id=await self._technique_id(workspace, technique),
        )
        try:
            found = await self.poller.read_unwritten(run)
        except (FloraError, SettingsError) as error:
            raise NotTracked(f"FLORA cannot be asked about run {run_id}: {error}") from error
        if found.missing:
            old = "" if technique else " (one that is not among the newest needs its technique)"
            raise NotTracked(f"FLORA has no run {run_id} in workspace {workspace.name}{old}")
        if found.observation is None:
            raise NotTracked(f"FLORA cannot be asked about run {run_id}: {found.error}")
        tracked = await self.track(run_id, technique=technique, workspace_id=workspace_id)
        results = await self.writer.submit_all(found.entries)
        return replace(tracked, record=results[-1].after or tracked.record)

    async def forget(self, run_id: str, *, force: bool = False) -> Record:
        """Remove a run with its outputs and timeline; the run as it was.

        Raises `NotForgotten` for an unknown run and, unless `force`, for one that FLORA has shown
        and does not deny; and `StoreUnavailable`.
        """
        entry = audit.entry(Action.FORGET, self.clock(), run_id=run_id, forced=force or None)
        try:
            record = await forget_run(self.database, run_id, force=force, entry=entry)
        except ShownByFlora:
            raise NotForgotten(
                f"FLORA has shown run {run_id}, so it was not removed: the next page of the "
                "history that shows it would track it again (--force removes it anyway)"
            ) from None
        if record is None:
            raise NotForgotten(f"run {run_id} is not tracked")
        log.info("run.forgotten", run_id=run_id, actor=audit.principal().name, forced=force)
        return record

    async def _technique_id(self, workspace: Workspace, technique: str | None) -> str | None:
        """The technique's id, if it can be found; a run is tracked without it as well."""
        if technique is None:
            return None
        try:
            return await self.catalogue.technique_id(workspace, technique)
        except (FloraError, InvalidRequest, SettingsError):
            return None
