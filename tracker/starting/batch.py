"""Batches: one run for each row of a sheet, however often the command is repeated.

A plan is made of the sheet, the technique's definition and what is known already; it costs nothing.
Then its rows are kept, what is missing is started, and the runs are followed in the database until
all have ended. Whatever breaks off on the way, the next plan of the same sheet goes on from there.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final

from tracker.core.clock import Clock
from tracker.core.errors import (
    BudgetExceeded,
    FloraRefusal,
    InvalidRequest,
    KeyRefused,
    ServerFault,
    TrackerError,
)
from tracker.core.inputs import obstacle
from tracker.core.row_key import batch_id, row_digests
from tracker.core.tags import Tags
from tracker.polling.follow import LOOK_EVERY, OVERDUE, POLL_EVERY
from tracker.polling.poll import Poller
from tracker.polling.workspaces import Workspace, WorkspaceIds, Workspaces
from tracker.starting.batch_launch import Launch
from tracker.starting.batch_rows import (
    Plan,
    PlannedRow,
    Retry,
    RowState,
    kept_rows,
    states_of,
    turn_of,
)
from tracker.starting.catalogue import Catalogue
from tracker.starting.recover import Recovery
from tracker.starting.sheet import (
    Mapping,
    Problem,
    Reading,
    Row,
    Sheet,
    SheetRefused,
    mapping_of,
    read_rows,
    row_tags,
    rows_by,
)
from tracker.starting.start import Starter
from tracker.store.engine import Database
from tracker.store.queries import batches
from tracker.store.queries.batches import BatchCounts, BatchEntry, BatchRow

BREAK_OFF_WITHIN: Final = 10.0
"""Seconds that starts which are under way have to end when the command is interrupted."""
LOOKS_SHARE: Final = 0.1
"""At most this share of the time goes into looking how far a batch has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProgress:
    """How far a batch has come. `left` rows are still to be started by this command, `errors` could
    not be; `paused` is for how many seconds FLORA wants no request, `doubt` how many starts are in
    doubt, and `held` the seconds until a row whose retry was advised for later can be tried.
    `over_budget` is the budget that has no room for the next row, while that is waited for."""

    tally: BatchCounts
    left: int = 0
    errors: int = 0
    paused: float = 0.0
    doubt: int = 0
    held: float = 0.0
    over_budget: BudgetExceeded | None = None


TagColumns = dict[str, str]
"""The column of each tag, by its key."""
Tell = Callable[[BatchProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command made of a batch. `stopped` is why it ended before all rows were tried."""

    batch: BatchRow
    rows: Sequence[RowState]
    tally: BatchCounts
    stopped: TrackerError | None = None


class DefinitionChanged(TrackerError):
    """The technique's inputs are others than when the batch began, so that rows that were started
    would be started anew, on these `lines`. `new` and `gone` are columns: input, column, type."""

    def __init__(
        self,
        *,
        new: Sequence[tuple[str, str, str]],
        gone: Sequence[tuple[str, str, str]],
        lines: Sequence[int],
    ) -> None:
        parts = [
            f"column {column!r} is now the input {name!r} ({kind})" for name, column, kind in new
        ]
        parts += [
            f"column {column!r} was the input {name!r} ({kind})" for name, column, kind in gone
        ]
        count = (
            "1 row that was started" if len(lines) == 1 else f"{len(lines)} rows that were started"
        )
        super().__init__(
            "the columns are read otherwise than when the batch began: "
            f"{'; '.join(parts)}. {count} would start anew ({spans(lines)}). "
            "Nothing was started; --accept-changes starts them"
        )
        self.new, self.gone, self.lines = tuple(new), tuple(gone), tuple(lines)


def spans(lines: Sequence[int]) -> str:
    """Lines of a sheet in words: `line 2`, `lines 2, 5-9`."""
    parts: list[list[int]] = []
    for line in sorted(lines):
        if parts and line == parts[-1][-1] + 1:
            parts[-1][1:] = [line]
        else:
            parts.append([line])
    shown = ", ".join("-".join(map(str, part)) for part in parts)
    return f"line {shown}" if len(lines) == 1 else f"lines {shown}"


class Batches:
    """Plans, runs and shows batches."""

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        ids: WorkspaceIds,
        catalogue: Catalogue,
        starter: Starter,
        recovery: Recovery,
        poller: Poller,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._ids = ids
        self._catalogue = catalogue
        self._starter = starter
        self._recovery = recovery
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
        accept_changes: bool = False,
        tags: Tags | None = None,
        tag_columns: TagColumns | None = None,
    ) -> tuple[Plan, Sequence[Problem]]:
        """What a batch of this sheet would do now, and the problems of the rows that it skips.

        `name` is what the sheet is called, `given` which columns are which inputs. `again` runs
        every row once more, `retry` those that failed. `tags` are those of all runs, `tag_columns`
        the columns from which they have more, by key. Nothing is started or kept. Raises
        `SheetRefused` with all that is wrong, `InvalidRequest` for the workspace or a technique
        that cannot be started, `DefinitionChanged` where rows that were started would start anew
        because the technique has changed (unless `accept_changes`), and whatever asking FLORA
        raises.
        """
        workspace = self._workspaces.pick(workspace_id)
        workspace_id = await self._ids.of(workspace)
        definition, price_error = await self._catalogue.priced(workspace, technique)
        if (reason := obstacle(definition.ports)) is not None:
            raise InvalidRequest(f"{technique} cannot be started: {reason}")
        reading = read_rows(sheet, definition.ports, given)
        tagged, wrong = row_tags(sheet, tag_columns or {}, tags or {})
        problems = sorted([*reading.problems, *wrong])
        rows = _fit_rows(reading.rows, problems, skip=skip_bad_rows, header=sheet.header)
        digests = row_digests(definition.technique_id, [row.inputs for _, row in rows])
        latest = await batches.latest_turns(self._database, workspace_id, digests)
        if not accept_changes:
            await self._check_mapping(workspace_id, definition.technique_id, sheet, reading, latest)
        planned = [
            PlannedRow(
                entry=BatchEntry(
                    position=position,
                    line=row.line,
                    digest=digest,
                    turn=turn_of(latest.get(digest), again=again),
                ),
                inputs=row.inputs,
                tags=tagged[row.line],
            )
            for (position, row), digest in zip(rows, digests, strict=True)
        ]
        states = await self._states(workspace_id, planned)
        if retry is not Retry.ALL:
            planned = await self._with_waits(workspace_id, planned, states)
        if retry is not None:
            planned = [states[row.entry.key].retried(row, retry) for row in planned]
            states = await self._states(workspace_id, planned)
        batch = BatchRow(
            batch_id=batch_id(
                workspace_id,
                definition.technique_id,
                [(one.position, one.digest, one.turn) for one in (row.entry for row in planned)],
            ),
            workspace_slot=workspace_id,
            technique_id=definition.technique_id,
            name=name,
            created_at=self._clock(),
            mapping=[[one.input_id, one.column, one.type or ""] for one in reading.mapping],
        )
        plan = Plan(
            batch=batch,
            technique=definition,
            rows=planned,
            states=states,
            unmapped=[one for one in reading.unmapped if one not in (tag_columns or {}).values()],
            price_error=price_error,
        )
        return plan, problems

    async def run(
        self,
        plan: Plan,
        *,
        concurrency: int,
        wait: bool,
        tell: Tell,
        max_cost: Decimal | None = None,
        wait_for_budget: bool = False,
    ) -> Outcome:
        """Start what is missing, `concurrency` rows at a time, and follow all of it to its end.

        Without `wait` it returns when the rows are started, or in doubt. `tell` hears how far it
        has come. It stops where quotes and charges together would pass `max_cost`, in USD, and
        where a budget has no room for the next row, unless it is to `wait_for_budget`.
        Interrupted, it lets the starts that are under way end. Raises `StoreUnavailable`, and
        `TrackerError` where there is something to start and the price could not be read.
        """
        if plan.missing and plan.price_error is not None:
            raise TrackerError(
                f"the price could not be read, so nothing was started: {plan.price_error}"
            ) from plan.price_error
        workspace = await self._workspace(plan.batch)
        await batches.keep(self._database, plan.batch, [row.entry for row in plan.rows])
        launch = Launch(
            plan,
            database=self._database,
            workspace=workspace,
            starter=self._starter,
            recovery=self._recovery,
            concurrency=concurrency,
            wait=wait,
            max_cost=max_cost,
            wait_for_budget=wait_for_budget,
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
        states = await self._states(plan.batch.workspace_slot, plan.rows)
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

    async def tally(self, batch: BatchRow) -> BatchCounts:
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
                        doubt=launch.in_doubt,
                        held=launch.free_in,
                        over_budget=launch.over_budget,
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

    def _due(self, tally: BatchCounts, *, after: float = 0.0) -> bool:
        due = tally.next_check_at
        return due is not None and (self._clock() - due).total_seconds() > after

    async def _workspace(self, batch: BatchRow) -> Workspace:
        for one in self._workspaces:
            if one.client is not None and await self._ids.of(one) == batch.workspace_slot:
                return one
        raise TrackerError(f"workspace {batch.workspace_slot} is not configured here")

    async def _states(self, workspace_id: str, rows: Sequence[PlannedRow]) -> dict[str, RowState]:
        return await states_of(self._database, workspace_id, [row.entry for row in rows])

    async def _with_waits(
        self, workspace_id: str, rows: Sequence[PlannedRow], states: dict[str, RowState]
    ) -> list[PlannedRow]:
        """The rows; a retry that an earlier command planned and did not start waits its rest."""
        failed = {
            row.entry.key: replace(row.entry, turn=row.entry.turn.before())
            for row in rows
            if row.entry.turn.attempt and not states[row.entry.key].started
        }
        runs = await states_of(self._database, workspace_id, list(failed.values()))
        return [
            replace(row, not_before=runs[failed[row.entry.key].key].retry_not_before)
            if row.entry.key in failed
            else row
            for row in rows
        ]

    async def _check_mapping(
        self,
        workspace_id: str,
        technique_id: str,
        sheet: Sheet,
        reading: Reading,
        latest: Container[str],
    ) -> None:
        """Raise `DefinitionChanged` where rows that were started by another mapping of the sheet's
        columns would start anew by this one."""
        now = {(one.input_id, one.column, one.type or "") for one in reading.mapping}
        digests = row_digests(technique_id, [row.inputs for row in reading.rows])
        if all(digest in latest for digest in digests):
            return
        mappings = await batches.mappings(self._database, workspace_id, technique_id)
        # Batches of before there were mappings: what their rows asked for tells it.
        asked = await batches.asked_without_mapping(self._database, workspace_id, technique_id)
        for inputs in asked:
            derived = mapping_of(sheet, reading.mapping, inputs)
            mappings.append(tuple((one.input_id, one.column, one.type or "") for one in derived))
        for before in mappings:
            if set(before) == now or any(column not in sheet.columns for _, column, _ in before):
                continue
            rows = rows_by(sheet, [Mapping(*one) for one in before])
            old = row_digests(technique_id, rows)
            known = await batches.latest_turns(self._database, workspace_id, old)
            anew = [
                row.line
                for row, was, is_now in zip(reading.rows, old, digests, strict=True)
                if was in known and is_now not in latest
            ]
            if anew:
                raise DefinitionChanged(
                    new=sorted(now - set(before)), gone=sorted(set(before) - now), lines=anew
                )


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
    # The runs that fitted a budget are followed to their ends.
    return stopped is not None and not isinstance(stopped, BudgetExceeded)
