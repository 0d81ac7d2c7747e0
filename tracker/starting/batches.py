"""Batches: one run for each row of a sheet, however often the command is repeated.

A plan is made from the sheet, the technique's definition and what is known already, at no cost.
Then its rows are stored, missing ones are started, and the runs are followed in the database until
all have ended. After an interruption the next plan of the same sheet resumes the batch.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Final

from tracker.core.errors import BudgetExceeded, FloraRefusal, KeyRefused, ServerFault, TrackerError
from tracker.core.waiting import cancel
from tracker.polling.follow import CHECK_EVERY, OwnPolling
from tracker.polling.poll import Poller
from tracker.starting.launch import BUDGET_EVERY, DOUBT_PAUSES, BatchLaunch, Order
from tracker.starting.plan import BatchPlanner
from tracker.starting.recover import Recovery
from tracker.starting.rows import BatchPlan, RowState, kept_rows
from tracker.starting.start import Starter
from tracker.store.queries import batches
from tracker.store.queries.batches import BatchCounts, BatchRow

BREAK_OFF_SECONDS: Final = 10.0
"""How long starts that were sent have to end when the command is interrupted."""
COUNT_SHARE: Final = 0.1
"""At most this share of the time is spent on counting the progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchProgress:
    """The progress of a batch.

    `left` rows are still to be started by this command, `errors` could not be, and `doubt` starts
    are in doubt. `paused` is for how many seconds no row begins because of FLORA, `held` how many
    until a row can be tried whose retry was advised for later. `over_budget` is the budget that has
    no room for the next row, while the command waits for it.
    """

    counts: BatchCounts
    left: int = 0
    errors: int = 0
    paused: float = 0.0
    doubt: int = 0
    held: float = 0.0
    over_budget: BudgetExceeded | None = None


OnProgress = Callable[[BatchProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOutcome:
    """The result of a command. `stopped` is why it ended before all rows were tried."""

    batch: BatchRow
    rows: Sequence[RowState]
    counts: BatchCounts
    stopped: TrackerError | None = None


@dataclass(kw_only=True, eq=False)
class Batches(BatchPlanner):
    """Plans, runs and shows batches."""

    starter: Starter
    recovery: Recovery
    poller: Poller
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    budget_every: timedelta = BUDGET_EVERY
    doubt_pauses: tuple[float, float] = DOUBT_PAUSES

    async def launch_of(
        self,
        plan: BatchPlan,
        order: Order,
        *,
        concurrency: int,
        counted: Sequence[RowState] = (),
        wait: bool = True,
    ) -> BatchLaunch:
        """The launch of a plan. `concurrency` is how many rows are started at a time, `counted`
        are rows whose runs count against the order's maximum already; `wait` waits for starts in
        doubt.

        Raises `TrackerError` if the workspace is not configured here, or if there are rows to start
        and the price could not be read.
        """
        if plan.missing and plan.price_error is not None:
            raise TrackerError(
                f"the price could not be read, so nothing was started: {plan.price_error}"
            ) from plan.price_error
        workspace = await self.workspace_of(plan.batch)
        return BatchLaunch(
            self, workspace, plan, order, concurrency=concurrency, counted=counted, wait=wait
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
        order = Order(
            started_by="batch",
            ordered_at=self.clock(),
            max_cost=max_cost,
            wait_for_budget=wait_for_budget,
        )
        launch = await self.launch_of(plan, order, concurrency=concurrency, wait=wait)
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
                await cancel(launching)
        stopped = plan.stopped_by(stopped)
        await batches.finish(
            self.database,
            plan.batch.batch_id,
            self.clock() if stopped is None else None,
            stopped=None if stopped is None else str(stopped),
            errors=launch.errors,
        )
        batch = await batches.get(self.database, plan.batch.batch_id) or plan.batch
        rows, counts = await self.rows(batch), await self.counts(batch)
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
        async with OwnPolling(poll=self.poller.poll_due, clock=self.clock) as polling:
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
                    awaits_runs = wait and counts.awaits_runs(self.clock())
                    if not awaits_runs or _cannot_go_on(launch.stopped):
                        return launch.stopped
                    if polling.has_begun and (refusal := launch.unreadable):
                        return launch.stopped or TrackerError(f"runs cannot be read: {refusal}")
                polling.check(counts.next_check_at)
                pause = max(CHECK_EVERY, (time.monotonic() - began) / COUNT_SHARE)
                if launched:
                    await asyncio.sleep(pause)
                else:
                    await asyncio.wait([launching], timeout=pause)


def _cannot_go_on(stopped: TrackerError | None) -> bool:
    """Whether what stopped the launch prevents following its runs, too."""
    if isinstance(stopped, FloraRefusal):
        return isinstance(stopped, KeyRefused | ServerFault)
    # Runs within the budget are followed to their end.
    return stopped is not None and not isinstance(stopped, BudgetExceeded)
