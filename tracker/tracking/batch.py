"""Batches: one run for each row of a sheet, however often the command is repeated.

A plan is made of the sheet, the technique's definition and what is known already; it costs nothing.
Then its rows are kept, what is missing is started, and the runs are followed in the database until
all have ended. Whatever breaks off on the way, the next plan of the same sheet goes on from there.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tracker.core.clock import Clock
from tracker.core.columns import Mapping, Row, read_rows
from tracker.core.errors import (
    FloraRefusal,
    InvalidRequest,
    KeyRefused,
    ServerFault,
    TrackerError,
)
from tracker.core.inputs import obstacle
from tracker.core.rowkey import batch_id, row_digests
from tracker.core.sheet import Problem, Sheet, SheetRefused
from tracker.store import batches
from tracker.store.batches import BatchEntry, BatchRow, Tally
from tracker.store.engine import Database
from tracker.tracking.batch_launch import Launch
from tracker.tracking.batch_rows import (
    Plan,
    PlannedRow,
    Retry,
    RowState,
    kept_rows,
    states_of,
    turn_of,
)
from tracker.tracking.catalogue import Catalogue
from tracker.tracking.follow import LOOK_EVERY, OVERDUE, POLL_EVERY
from tracker.tracking.poll import Poller
from tracker.tracking.start import Starter
from tracker.tracking.workspaces import Workspace, Workspaces

BREAK_OFF_WITHIN: Final = 10.0
"""Seconds that starts which are under way have to end when the command is interrupted."""
LOOKS_SHARE: Final = 0.1
"""At most this share of the time goes into looking how far a batch has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProgress:
    """How far a batch has come. `left` rows are still to be started by this command, `errors` could
    not be; `paused` is for how many seconds FLORA wants no request, `held` those until a row that
    another process was sending, or whose turn is later, can be tried."""

    tally: Tally
    left: int = 0
    errors: int = 0
    paused: float = 0.0
    held: float = 0.0


Tell = Callable[[BatchProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command made of a batch. `stopped` is why it ended before all rows were tried."""

    batch: BatchRow
    rows: Sequence[RowState]
    tally: Tally
    stopped: TrackerError | None = None


class Batches:
    """Plans, runs and shows batches."""

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        catalogue: Catalogue,
        starter: Starter,
        poller: Poller,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._catalogue = catalogue
        self._starter = starter
        self._poller = poller
        self._clock = clock
        self._sleep = sleep

    async def plan(
        self,
        technique: str,
        sheet: Sheet,
        *,
        name: str,
        given: Sequence[Mapping] = (),
        workspace_id: str | None = None,
        again: bool = False,
        retry: Retry | None = None,
        skip_bad_rows: bool = False,
    ) -> tuple[Plan, Sequence[Problem]]:
        """What a batch of this sheet would do now, and the problems of the rows that it skips.

        `name` is what the sheet is called, `given` which columns are which inputs. `again` runs
        every row once more, `retry` those that failed. Nothing is started or kept. Raises
        `SheetRefused` with all that is wrong, `InvalidRequest` for the workspace or a technique
        that cannot be started, and whatever asking FLORA raises.
        """
        workspace = self._workspaces.pick(workspace_id)
        definition = await self._catalogue.definition(workspace, technique)
        if (reason := obstacle(definition.ports)) is not None:
            raise InvalidRequest(f"{technique} cannot be started: {reason}")
        reading = read_rows(sheet, definition.ports, given)
        rows = _fit_rows(reading.rows, reading.problems, skip=skip_bad_rows, header=sheet.header)
        digests = row_digests(definition.technique_id, [row.inputs for _, row in rows])
        latest = await batches.latest_turns(self._database, workspace.slot, digests)
        planned = [
            PlannedRow(
                entry=BatchEntry(
                    position=position,
                    line=row.line,
                    digest=digest,
                    turn=turn_of(latest.get(digest), again=again),
                ),
                inputs=row.inputs,
            )
            for (position, row), digest in zip(rows, digests, strict=True)
        ]
        states = await self._states(workspace, planned)
        if retry is not None:
            planned = [states[row.entry.key].retried(row, retry) for row in planned]
            states = await self._states(workspace, planned)
        batch = BatchRow(
            batch_id=batch_id(
                workspace.slot,
                definition.technique_id,
                [(one.position, one.digest, one.turn) for one in (row.entry for row in planned)],
            ),
            workspace_slot=workspace.slot,
            technique_id=definition.technique_id,
            name=name,
            created_at=self._clock(),
        )
        plan = Plan(
            batch=batch,
            technique=definition,
            rows=planned,
            states=states,
            unmapped=reading.unmapped,
        )
        return plan, reading.problems

    async def run(self, plan: Plan, *, concurrency: int, wait: bool, tell: Tell) -> Outcome:
        """Start what is missing, `concurrency` rows at a time, and follow all of it to its end.

        Without `wait` it returns when the rows are started. `tell` hears how far it has come.
        Interrupted, it lets the starts that are under way end. Raises `StoreUnavailable`.
        """
        workspace = self._workspace(plan.batch)
        await batches.keep(self._database, plan.batch, [row.entry for row in plan.rows])
        launch = Launch(
            plan,
            database=self._database,
            workspace=workspace,
            starter=self._starter,
            concurrency=concurrency,
            clock=self._clock,
            sleep=self._sleep,
        )
        launching = asyncio.create_task(launch.run(), name="batch-launch")
        try:
            stopped = await self._follow(plan, launch, launching, workspace, wait=wait, tell=tell)
        finally:
            if not launching.done():
                launch.break_off()
                await asyncio.wait([launching], timeout=BREAK_OFF_WITHIN)
                launching.cancel()
                await asyncio.wait([launching])
        if stopped is None:
            await batches.finish(self._database, plan.batch.batch_id, self._clock())
        states = await self._states(workspace, plan.rows)
        rows = [
            replace(states[row.entry.key], error=launch.errors.get(row.entry.key), asked=row.inputs)
            for row in plan.rows
        ]
        batch = await batches.get(self._database, plan.batch.batch_id) or plan.batch
        tally = await self.tally(batch)
        return Outcome(batch=batch, rows=rows, tally=tally, stopped=stopped)

    async def rows(self, batch: BatchRow) -> list[RowState]:
        """What became of the rows of a batch, as they stand in its sheet."""
        return await kept_rows(self._database, batch)

    async def tally(self, batch: BatchRow) -> Tally:
        """How far a batch has come."""
        return (await batches.tallies(self._database, [batch.batch_id]))[batch.batch_id]

    async def _follow(
        self,
        plan: Plan,
        launch: Launch,
        launching: "asyncio.Task[None]",
        workspace: Workspace,
        *,
        wait: bool,
        tell: Tell,
    ) -> TrackerError | None:
        """Look how far the batch has come until it has ended; what ended it early, if anything."""
        polling: asyncio.Task[Any] | None = None
        polls_here = False
        polled_at = 0.0
        try:
            while True:
                launched = launching.done()
                began = time.monotonic()
                tally = await self.tally(plan.batch)
                tell(
                    BatchProgress(
                        tally=tally,
                        left=launch.left,
                        errors=len(launch.errors),
                        paused=launch.paused,
                        held=launch.free_in,
                    )
                )
                if launched:
                    await launching  # raises what it raised
                    if not wait or tally.active == 0 or _cannot_go_on(launch.stopped):
                        return launch.stopped
                    if polls_here and (refusal := workspace.require_client().breaker.reason):
                        return launch.stopped or TrackerError(f"runs cannot be read: {refusal}")
                if polling is not None and polling.done():
                    await polling
                    polling = None
                # Where a run stays overdue nobody else polls; from then on it is done from here.
                polls_here = polls_here or self._due(tally, after=OVERDUE.total_seconds())
                may_poll = polling is None and began - polled_at >= POLL_EVERY
                if polls_here and may_poll and self._due(tally):
                    polled_at = began
                    polling = asyncio.create_task(self._poller.poll_due(), name="batch-poll")
                took = time.monotonic() - began
                pause = max(LOOK_EVERY, took / LOOKS_SHARE)
                if launched:
                    await asyncio.sleep(pause)
                else:
                    await asyncio.wait([launching], timeout=pause)
        finally:
            if polling is not None:
                polling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await polling

    def _due(self, tally: Tally, *, after: float = 0.0) -> bool:
        due = tally.next_check_at
        return due is not None and (self._clock() - due).total_seconds() > after

    def _workspace(self, batch: BatchRow) -> Workspace:
        return next(one for one in self._workspaces if one.slot == batch.workspace_slot)

    async def _states(
        self, workspace: Workspace, rows: Sequence[PlannedRow]
    ) -> dict[str, RowState]:
        return await states_of(self._database, workspace.slot, [row.entry for row in rows])


def _fit_rows(
    rows: Sequence[Row], problems: Sequence[Problem], *, skip: bool, header: int
) -> list[tuple[int, Row]]:
    """The rows that can be started, with their positions. Raises `SheetRefused` for a problem that
    may not, or cannot, be skipped."""
    bad = {problem.line for problem in problems}
    fit = [(position, row) for position, row in enumerate(rows, 1) if row.line not in bad]
    if problems and (not skip or not fit or header in bad):
        raise SheetRefused(problems)
    return fit


def _cannot_go_on(stopped: TrackerError | None) -> bool:
    """Whether what ended the launch keeps its runs from being followed, too."""
    if isinstance(stopped, FloraRefusal):
        return isinstance(stopped, KeyRefused | ServerFault)
    return stopped is not None
