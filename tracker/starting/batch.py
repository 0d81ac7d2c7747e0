"""Batches: one run for each row of a sheet, however often the command is repeated.

A plan is made from the sheet, the technique's definition and what is known already, at no cost.
Then its rows are stored, missing ones are started, and the runs are followed in the database until
all have ended. After an interruption the next plan of the same sheet resumes the batch.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
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
from tracker.core.formatting import line_numbers
from tracker.core.inputs import obstacle
from tracker.core.row_key import batch_id, row_digests
from tracker.core.tags import Tags
from tracker.polling.follow import CHECK_EVERY, OVERDUE, POLL_EVERY
from tracker.polling.poll import Poller
from tracker.polling.workspaces import Workspace, WorkspaceIds, Workspaces
from tracker.starting.batch_launch import BatchLaunch
from tracker.starting.batch_rows import (
    BatchPlan,
    PlannedRow,
    Retry,
    RowState,
    kept_rows,
    states_of,
    turn_of,
)
from tracker.starting.catalogue import Catalogue
from tracker.starting.columns import (
    ColumnMapping,
    InputRow,
    SheetReading,
    mapping_of,
    read_rows,
    row_tags,
    rows_by,
)
from tracker.starting.recover import Recovery
from tracker.starting.sheet import Sheet, SheetProblem, SheetRefused, SheetRow
from tracker.starting.start import Starter
from tracker.store.engine import Database
from tracker.store.queries import batches
from tracker.store.queries.batches import BatchCounts, BatchEntry, BatchRow

BREAK_OFF_SECONDS: Final = 10.0
"""How long starts that were sent have to end when the command is interrupted."""
COUNT_SHARE: Final = 0.1
"""At most this share of the time is spent on counting the progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProgress:
    """The progress of a batch.

    `left` rows are still to be started by this command, `errors` could not be, and `doubt` starts
    are in doubt. `paused` is for how many seconds FLORA accepts no request, `held` how many until
    a row can be tried whose retry was advised for later. `over_budget` is the budget that has no
    room for the next row, while the command waits for it.
    """

    counts: BatchCounts
    left: int = 0
    errors: int = 0
    paused: float = 0.0
    doubt: int = 0
    held: float = 0.0
    over_budget: BudgetExceeded | None = None


TagColumns = dict[str, str]
"""The column of each tag, by its key."""
OnProgress = Callable[[BatchProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOutcome:
    """The result of a command. `stopped` is why it ended before all rows were tried."""

    batch: BatchRow
    rows: Sequence[RowState]
    counts: BatchCounts
    stopped: TrackerError | None = None


class DefinitionChanged(TrackerError):
    """The technique's inputs differ from those of the batch so far, so that the rows on `lines`,
    which were started, would be started anew. `new` and `gone` are columns: input, column, type."""

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
        rows = "1 row that was" if len(lines) == 1 else f"{len(lines)} rows that were"
        super().__init__(
            f"the columns are read differently than when the batch began: {'; '.join(parts)}. "
            f"{rows} started would start again ({line_numbers(lines)}). "
            "Nothing was started; --accept-changes starts them"
        )
        self.new, self.gone, self.lines = tuple(new), tuple(gone), tuple(lines)


@dataclass(kw_only=True, eq=False)
class Batches:
    """Plans, runs and shows batches."""

    database: Database
    workspaces: Workspaces
    ids: WorkspaceIds
    catalogue: Catalogue
    starter: Starter
    recovery: Recovery
    poller: Poller
    clock: Clock
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def plan(
        self,
        technique: str,
        sheet: Sheet,
        *,
        name: str,
        explicit: Sequence[ColumnMapping] = (),
        workspace_id: str | None = None,
        again: bool = False,
        retry: Retry | None = None,
        skip_bad_rows: bool = False,
        accept_changes: bool = False,
        tags: Tags | None = None,
        tag_columns: TagColumns | None = None,
        source: str = "cli",
    ) -> tuple[BatchPlan, Sequence[SheetProblem]]:
        """What a batch of this sheet would do now, and the problems of the rows that it skips.

        `name` is the name of the sheet, `explicit` maps columns to inputs. `again`
        runs every row once more, `retry` those that failed. `tags` are those of all runs,
        `tag_columns` the columns with further tags, by key. Nothing is started or stored. Raises
        `SheetRefused` with all problems, `InvalidRequest` for the workspace or a technique that
        cannot be started, `DefinitionChanged` if rows would start anew because the technique has
        changed (unless `accept_changes`), and what reading FLORA raises.
        """
        workspace = self.workspaces.pick(workspace_id)
        workspace_id = await self.ids.of(workspace)
        definition, price_error = await self.catalogue.priced(workspace, technique)
        if (reason := obstacle(definition.ports)) is not None:
            raise InvalidRequest(f"{technique} cannot be started: {reason}")
        # In a thread: many rows would hold up what else the process does.
        reading = await asyncio.to_thread(read_rows, sheet, definition.ports, explicit)
        tagged, wrong = row_tags(sheet, tag_columns or {}, tags or {})
        problems = sorted([*reading.problems, *wrong])
        rows = _fit_rows(reading.rows, problems, skip=skip_bad_rows, header=sheet.header)
        inputs = [row.inputs for _, row in rows]
        digests = await asyncio.to_thread(row_digests, definition.technique_id, inputs)
        latest = await batches.latest_turns(self.database, workspace_id, digests)
        if not accept_changes:
            await self._check_mapping(workspace_id, definition.technique_id, sheet, reading, latest)
        columns = [name for name in reading.unmapped if name]
        planned: Sequence[PlannedRow] = [
            PlannedRow(
                entry=BatchEntry(
                    position=position,
                    line=row.line,
                    digest=digest,
                    turn=turn_of(latest.get(digest), again=again),
                    inputs=row.inputs,
                    tags=tagged[row.line],
                    carried=_carried(sheet.rows[position - 1], columns),
                ),
                inputs=row.inputs,
                tags=tagged[row.line],
            )
            for (position, row), digest in zip(rows, digests, strict=True)
        ]
        planned, states = await self._retried(workspace_id, planned, retry)
        batch = BatchRow(
            batch_id=batch_id(
                workspace_id,
                definition.technique_id,
                [(one.position, one.digest, one.turn) for one in (row.entry for row in planned)],
            ),
            workspace_slot=workspace_id,
            technique_id=definition.technique_id,
            name=name,
            created_at=self.clock(),
            mapping=[[one.input_id, one.column, one.type or ""] for one in reading.mapping],
            source=source,
            columns=columns,
        )
        plan = BatchPlan(
            batch=batch,
            technique=definition,
            rows=planned,
            states=states,
            unmapped=[one for one in reading.unmapped if one not in (tag_columns or {}).values()],
            price_error=price_error,
        )
        return plan, problems

    async def stored_plan(
        self, batch: BatchRow, *, retry: Retry | None = None, wait: bool = True
    ) -> BatchPlan:
        """What a stored batch would do now, without its sheet.

        `retry` starts failed rows again; `wait` keeps the wait that was advised for retries which
        are stored and not started. Rows that a version before 0015 stored and never started are
        left out, because only their sheet has their inputs. Raises what reading FLORA raises, and
        `TrackerError` if the workspace is not configured.
        """
        workspace = await self._workspace(batch)
        definition, price_error = await self.catalogue.priced(workspace, batch.technique_id)
        entries = await batches.entries(self.database, batch.batch_id)
        found = await states_of(self.database, batch.workspace_slot, entries)
        rows = []
        for entry in entries:
            start = found[entry.key].start
            if start is not None and (entry.inputs is None or not start.is_fresh):
                entry = replace(entry, inputs=start.inputs, tags=start.tags or {})
            if entry.inputs is not None:
                rows.append(PlannedRow(entry=entry, inputs=entry.inputs, tags=entry.tags))
        planned, states = await self._retried(batch.workspace_slot, rows, retry, wait=wait)
        return BatchPlan(
            batch=batch,
            technique=definition,
            rows=planned,
            states=states,
            price_error=price_error,
        )

    async def launch_of(
        self,
        plan: BatchPlan,
        *,
        concurrency: int,
        wait: bool = True,
        max_cost: Decimal | None = None,
        wait_for_budget: bool = False,
        started_by: str = "batch",
        spent: Mapping[str, Decimal] | None = None,
    ) -> BatchLaunch:
        """The launch of a plan; see there for the options.

        Raises `TrackerError` if the workspace is not configured here, or if there are rows to start
        and the price could not be read.
        """
        if plan.missing and plan.price_error is not None:
            raise TrackerError(
                f"the price could not be read, so nothing was started: {plan.price_error}"
            ) from plan.price_error
        return BatchLaunch(
            plan,
            database=self.database,
            workspace=await self._workspace(plan.batch),
            starter=self.starter,
            recovery=self.recovery,
            concurrency=concurrency,
            wait=wait,
            max_cost=max_cost,
            wait_for_budget=wait_for_budget,
            started_by=started_by,
            spent=spent,
            clock=self.clock,
            sleep=self.sleep,
        )

    async def run(
        self,
        plan: BatchPlan,
        *,
        concurrency: int,
        wait: bool,
        on_progress: OnProgress,
        max_cost: Decimal | None = None,
        wait_for_budget: bool = False,
    ) -> BatchOutcome:
        """Start missing rows, `concurrency` at a time, and follow all runs to their end.

        Without `wait` it returns when the rows are started or in doubt. It stops if quotes and
        charges together would exceed `max_cost`, in USD, and if a budget has no room for the next
        row, unless it is to `wait_for_budget`. Interrupted, it lets starts that were sent end.
        Raises `StoreUnavailable`, and `TrackerError` if there are rows to start and the price could
        not be read.
        """
        launch = await self.launch_of(
            plan,
            concurrency=concurrency,
            wait=wait,
            max_cost=max_cost,
            wait_for_budget=wait_for_budget,
        )
        await batches.keep(self.database, plan.batch, [row.entry for row in plan.rows])
        launching = asyncio.create_task(launch.run(), name="batch-launch")
        try:
            stopped = await self._follow(
                plan, launch, launching, wait=wait, on_progress=on_progress
            )
        finally:
            if not launching.done():
                launch.break_off()
                await asyncio.wait([launching], timeout=BREAK_OFF_SECONDS)
                launching.cancel()
                await asyncio.wait([launching])
        await batches.finish(
            self.database,
            plan.batch.batch_id,
            self.clock() if stopped is None else None,
            stopped=None if stopped is None else str(stopped),
            errors=launch.errors_by_position,
        )
        states = await self._states(plan.batch.workspace_slot, plan.rows)
        rows = [
            replace(states[row.entry.key], error=launch.errors.get(row.entry.key), asked=row.inputs)
            for row in plan.rows
        ]
        batch = await batches.get(self.database, plan.batch.batch_id) or plan.batch
        counts = await self.counts(batch)
        return BatchOutcome(batch=batch, rows=rows, counts=counts, stopped=stopped)

    async def rows(self, batch: BatchRow) -> list[RowState]:
        """The state of each row of a stored batch, in the order of its sheet."""
        return await kept_rows(self.database, batch)

    async def counts(self, batch: BatchRow) -> BatchCounts:
        """The progress of a stored batch, in rows."""
        return (await batches.batch_counts(self.database, [batch.batch_id]))[batch.batch_id]

    async def _follow(
        self,
        plan: BatchPlan,
        launch: BatchLaunch,
        launching: "asyncio.Task[None]",
        *,
        wait: bool,
        on_progress: OnProgress,
    ) -> TrackerError | None:
        """Report the progress until the batch has ended; what stopped it early, if anything."""
        polling: asyncio.Task[Any] | None = None
        polls_here = False
        polled_at = 0.0
        try:
            while True:
                launched = launching.done()
                began = time.monotonic()
                counts = await self.counts(plan.batch)
                on_progress(
                    BatchProgress(
                        counts=counts,
                        left=launch.left,
                        errors=len(launch.errors),
                        paused=launch.paused,
                        doubt=launch.in_doubt,
                        held=launch.free_in,
                        over_budget=launch.over_budget,
                    )
                )
                if launched:
                    await launching  # raises its errors
                    if not wait or counts.active == 0 or _cannot_go_on(launch.stopped):
                        return launch.stopped
                    if polls_here and (refusal := launch.unreadable):
                        return launch.stopped or TrackerError(f"runs cannot be read: {refusal}")
                if polling is not None and polling.done():
                    await polling
                    polling = None
                # If a run stays overdue no other process polls; from then on this one does.
                polls_here = polls_here or self._due(counts, after=OVERDUE.total_seconds())
                may_poll = polling is None and began - polled_at >= POLL_EVERY
                if polls_here and may_poll and self._due(counts):
                    polled_at = began
                    polling = asyncio.create_task(self.poller.poll_due(), name="batch-poll")
                took = time.monotonic() - began
                pause = max(CHECK_EVERY, took / COUNT_SHARE)
                if launched:
                    await asyncio.sleep(pause)
                else:
                    await asyncio.wait([launching], timeout=pause)
        finally:
            if polling is not None:
                polling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await polling

    def _due(self, counts: BatchCounts, *, after: float = 0.0) -> bool:
        due = counts.next_check_at
        return due is not None and (self.clock() - due).total_seconds() > after

    async def _workspace(self, batch: BatchRow) -> Workspace:
        for one in self.workspaces:
            if one.client is not None and await self.ids.of(one) == batch.workspace_slot:
                return one
        raise TrackerError(f"workspace {batch.workspace_slot} is not configured here")

    async def _states(self, workspace_id: str, rows: Sequence[PlannedRow]) -> dict[str, RowState]:
        return await states_of(self.database, workspace_id, [row.entry for row in rows])

    async def _retried(
        self,
        workspace_id: str,
        rows: Sequence[PlannedRow],
        retry: Retry | None,
        *,
        wait: bool = True,
    ) -> tuple[Sequence[PlannedRow], dict[str, RowState]]:
        """The rows with their states: those that failed for another attempt where `retry` says so,
        and retries that an earlier launch did not start with the rest of their wait."""
        states = await self._states(workspace_id, rows)
        if wait and retry is not Retry.ALL:
            rows = await self._with_waits(workspace_id, rows, states)
        if retry is not None:
            rows = [states[row.entry.key].retried(row, retry) for row in rows]
            states = await self._states(workspace_id, rows)
        return rows, states

    async def _with_waits(
        self, workspace_id: str, rows: Sequence[PlannedRow], states: dict[str, RowState]
    ) -> list[PlannedRow]:
        """The rows, with the rest of the wait for retries that an earlier launch did not start."""
        failed = {
            row.entry.key: replace(row.entry, turn=row.entry.turn.before())
            for row in rows
            if row.entry.turn.attempt and not states[row.entry.key].started
        }
        runs = await states_of(self.database, workspace_id, list(failed.values()))
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
        reading: SheetReading,
        latest: Container[str],
    ) -> None:
        """Raise `DefinitionChanged` if rows that were started with another mapping of columns would
        start anew with this one."""
        now = {(one.input_id, one.column, one.type or "") for one in reading.mapping}
        digests = row_digests(technique_id, [row.inputs for row in reading.rows])
        if all(digest in latest for digest in digests):
            return
        mappings = await batches.mappings(self.database, workspace_id, technique_id)
        # Batches of versions without mappings: the inputs of their rows show it.
        asked = await batches.asked_without_mapping(self.database, workspace_id, technique_id)
        for inputs in asked:
            derived = mapping_of(sheet, reading.mapping, inputs)
            mappings.append(tuple((one.input_id, one.column, one.type or "") for one in derived))
        for before in mappings:
            if set(before) == now or any(column not in sheet.columns for _, column, _ in before):
                continue
            rows = rows_by(sheet, [ColumnMapping(*one) for one in before])
            old = row_digests(technique_id, rows)
            known = await batches.latest_turns(self.database, workspace_id, old)
            anew = [
                row.line
                for row, was, is_now in zip(reading.rows, old, digests, strict=True)
                if was in known and is_now not in latest
            ]
            if anew:
                raise DefinitionChanged(
                    new=sorted(now - set(before)), gone=sorted(set(before) - now), lines=anew
                )


def _carried(row: SheetRow, columns: Sequence[str]) -> dict[str, str]:
    """The cells of a row that are no input, by column."""
    return {name: ", ".join(row.cells[name]) for name in columns if name in row.cells}


def _fit_rows(
    rows: Sequence[InputRow], problems: Sequence[SheetProblem], *, skip: bool, header: int
) -> list[tuple[int, InputRow]]:
    """The rows without problems, with their positions. Raises `SheetRefused` if problems may not be
    skipped, or cannot."""
    bad = {problem.line for problem in problems}
    fit = [(position, row) for position, row in enumerate(rows, 1) if row.line not in bad]
    if problems and (not skip or not fit or header in bad):
        raise SheetRefused(problems)
    return fit


def _cannot_go_on(stopped: TrackerError | None) -> bool:
    """Whether what stopped the launch prevents following its runs, too."""
    if isinstance(stopped, FloraRefusal):
        return isinstance(stopped, KeyRefused | ServerFault)
    # Runs within the budget are followed to their end.
    return stopped is not None and not isinstance(stopped, BudgetExceeded)
