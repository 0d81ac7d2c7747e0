"""Batches: one run for each row of a sheet, however often the command is repeated.

A plan is made from the sheet, the technique's definition and what is known already, at no cost.
Then its rows are stored, missing ones are started, and the runs are followed in the database until
all have ended. After an interruption the next plan of the same sheet resumes the batch.

A launch starts several rows at a time, each with its own key. An error of one row (FLORA refuses
its inputs) is kept with it, and the others go on. An error that every further row would meet (no
credits, a refused key, no answer at all) ends the launch, and the remaining rows are started when
the command is repeated. So does a price that would exceed the maximum cost of the batch, or does
not fit a budget; for that the launch can wait until the budget renews, or has room again because
runs failed or cost less.

While FLORA asks for a pause, no row begins. A row whose start is in doubt delays no other, and its
outcome is waited for at the end. After several in succession FLORA seems to be down: until it
answers one, rows begin one at a time, with pauses.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from tracker.core.errors import (
    BudgetExceeded,
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    IdempotencyConflict,
    InvalidRequest,
    KeyRefused,
    MaxCostReached,
    RateLimited,
    ServerFault,
    SettingsError,
    StartError,
    StartNotStored,
    StartPending,
    StartUnresolved,
    StoreError,
    TrackerError,
)
from tracker.core.formatting import money
from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.waiting import cancel, run_all
from tracker.flora.parse import runs_of
from tracker.polling.follow import CHECK_EVERY, OwnPolling
from tracker.polling.poll import Poller
from tracker.starting.plan import BatchPlanner
from tracker.starting.recover import Recovery
from tracker.starting.rows import BatchPlan, Order, RowState, kept_rows
from tracker.starting.start import Starter, StartRequest
from tracker.store.queries import batches, starts
from tracker.store.queries.batches import BatchCounts, BatchRow
from tracker.store.queries.starts import UNKNOWN, StartState
from tracker.workspaces import Workspace

ABOUT_THE_ROW: Final = (400, 409, 413, 415, 422)
"""Statuses of refusals that the next row may not meet."""
TRIES: Final = 3
"""Attempts for a row to which FLORA gives no usable answer."""
SILENCE: Final = 20.0
"""Seconds without a successful start after which a failed connection ends the launch."""
FAILURES: Final = 3
"""Rows in succession without a usable answer that end it, too."""
DOUBT_PAUSES: Final = (5.0, 60.0)
"""Seconds until the next row begins after `FAILURES` starts in succession are in doubt: doubling
with each further one, from the first to the second. What stays in doubt is left to a person."""
BUDGET_EVERY: Final = timedelta(seconds=30)
"""The longest wait for a budget before the next row is tried again."""
CHARGES_EVERY: Final = 5.0
"""Seconds between two reads of the runs' charges."""
BREAK_OFF_SECONDS: Final = 10.0
"""How long starts that were sent have to end when the command is interrupted."""
COUNT_SHARE: Final = 0.1
"""At most this share of the time is spent on counting the progress."""

log = get_logger(__name__)


@dataclass(eq=False)
class BatchLaunch:
    """Starts the missing rows of a plan, for a command or in a worker, `concurrency` at a time.

    `counted` are rows whose runs count against the order's maximum already. `wait` waits for starts
    in doubt. `errors` are why rows could not be started, by position; `stopped` is what ended the
    launch early; `over_budget` is why no row begins now, if it is to wait for a budget. Raises
    `TrackerError` if there are rows to start and the price could not be read.
    """

    batches: "Batches"
    workspace: Workspace
    plan: BatchPlan
    order: Order
    _: KW_ONLY
    concurrency: int
    counted: InitVar[Sequence[RowState]] = ()
    wait: bool = True

    def __post_init__(self, counted: Sequence[RowState]) -> None:
        if self.plan.missing and (error := self.plan.price_error) is not None:
            raise TrackerError(
                f"the price could not be read, so nothing was started: {error}"
            ) from error
        self._budget_at: datetime | None = None
        self.over_budget: BudgetExceeded | None = None
        self._queue: deque[RowState] = deque()
        self._later: list[RowState] = []
        self._doubt: dict[str, RowState] = {}
        self._starting: dict[str, RowState] = {}
        self._tries: Counter[str] = Counter()
        self._silent: set[str] = set()
        self._doubted = 0  # starts in doubt since FLORA has answered one
        self._probe_at = 0.0
        self._spent: dict[str, Decimal] = {}  # by the key of the row
        self._rows: dict[str, RowState] = {}
        self._charges_read_at = time.monotonic()
        self._worked_at = time.monotonic()
        self.broken_off = False
        self.errors: dict[int, str] = {}
        self.stopped: TrackerError | None = None
        for row in counted:
            self._count(row, row.records)
        for row in self.plan.missing:
            if row.start is not None and row.start.state in UNKNOWN:
                self._doubt[row.entry.key] = row
            else:
                self._later.append(row)
        self._queue_due()

    @property
    def left(self) -> int:
        """Rows still to be started."""
        return len(self._queue) + len(self._later) + len(self._starting)

    @property
    def has_doubts(self) -> bool:
        """Whether starts are in doubt, each of which may have to be sent again."""
        return bool(self._doubt)

    @property
    def free_in(self) -> float:
        """Seconds until a row can be tried whose retry was advised for later; 0 while there is
        anything else to do."""
        if self._queue or self._starting or self._doubt or not self._later:
            return 0.0
        return min(self._held_for(row) for row in self._later)

    @property
    def paused(self) -> float:
        """Seconds for which FLORA accepts no request, or seems to be down."""
        asked = self.workspace.require_client().request_limit.state().paused
        return max(asked, self._probe_at - time.monotonic()) if self._doubt_pause else asked

    @property
    def _doubt_pause(self) -> float:
        """Seconds from one row to the next while FLORA seems to be down; else 0."""
        first, longest = self.batches.doubt_pauses
        doublings = self._doubted - FAILURES
        return 0.0 if doublings < 0 else min(first * 2.0 ** min(doublings, 10), longest)

    @property
    def only_waits(self) -> bool:
        """Whether no row can begin now, and one may later: a budget has no room, or each row that
        is left waits."""
        idle = self._waits_for_budget or not self._queue
        return idle and self.stopped is None and not self._starting

    def progress(self, counts: BatchCounts) -> "BatchProgress":
        """How far it has come; `counts` are those of the batch."""
        return BatchProgress(
            counts=counts,
            left=self.left,
            errors=len(self.errors),
            paused=self.paused,
            doubt=len(self._doubt),
            held=self.free_in,
            over_budget=self.over_budget,
        )

    def break_off(self) -> None:
        """Begin no further row."""
        self.broken_off = True

    async def run(self) -> None:
        """Start the missing rows; returns when no row is left that can be started, none is waited
        for in doubt, or it is to begin no further one."""
        try:
            while True:
                several = min(self.concurrency, len(self._queue))
                await run_all([self._work() for _ in range(several)])
                waits = self.wait and self.has_doubts
                if self._over or not (waits or self._later or self._queue):
                    return
                if waits:
                    await self._check_doubts()
                self._queue_due()
                if not self._queue or self._waits_for_budget:
                    await self.batches.sleep(CHECK_EVERY)
        except StoreError as error:
            self._stop(error)

    @property
    def _over(self) -> bool:
        return self.broken_off or self.stopped is not None

    def _held_for(self, row: RowState) -> float:
        """Seconds until the row may be tried, as advised when it failed."""
        if row.not_before is None:
            return 0.0
        return max(0.0, (row.not_before - self.batches.clock()).total_seconds())

    @property
    def _waits_for_budget(self) -> bool:
        return self._budget_at is not None and self.batches.clock() < self._budget_at

    def _queue_due(self) -> None:
        self._queue.extend(row for row in self._later if self._held_for(row) == 0)
        self._later = [row for row in self._later if self._held_for(row) > 0]

    async def _check_doubts(self) -> None:
        """Check the starts in doubt; a row that may be sent again is queued."""
        await self.batches.recovery.recover()
        keys = list(self._doubt)
        rows = await starts.of_keys(self.batches.database, self.plan.batch.workspace_id, keys)
        for key in keys:
            found = rows.get(key)
            if found is None or (found.is_fresh and not found.is_held(self.batches.clock())):
                self._queue.append(self._doubt.pop(key))
            elif found.state is StartState.STARTED:
                started = await starts.runs_of(self.batches.database, [found])
                self._count(self._doubt.pop(key), started[key])
            elif found.state is StartState.UNRESOLVED:
                row = self._doubt.pop(key)
                # It may have been started and paid.
                self._spent[key] = self.plan.cost_of(row) or Decimal(0)
                self.errors[row.entry.position] = "it is not known whether it was started"

    async def _work(self) -> None:
        try:
            while self._queue and not (self._over or self._waits_for_budget):
                if (paused := self.paused) > 0:
                    await self.batches.sleep(min(paused, 1.0))
                    continue
                self._probe_at = time.monotonic() + self._doubt_pause
                row = self._queue.popleft()
                self._starting[row.entry.key] = row
                try:
                    if await self._fits(row):
                        await self._start(row)
                    else:
                        self._queue.appendleft(row)
                finally:
                    del self._starting[row.entry.key]
        except StoreError as error:
            self._stop(error)

    async def _start(self, row: RowState) -> None:
        key, workspace_id = row.entry.key, self.plan.batch.workspace_id
        request = StartRequest(
            technique=self.plan.technique.technique_id,
            inputs=row.entry.inputs or [],
            workspace_id=workspace_id,
            idempotency_key=key,
            started_by=self.order.started_by,
            tags=row.entry.tags,
        )
        try:
            await self.batches.starter.workspaces.id_of(self.workspace, wanted=workspace_id)
            started = await self.batches.starter.start(request, wait_in_doubt=False)
        except (StartPending, StartNotStored):
            self._doubt[key] = row
            found = await starts.get(self.batches.database, workspace_id, key)
            self._doubted += found is not None and found.state is StartState.IN_DOUBT
        except (BudgetExceeded, FloraError, SettingsError, StartError, StoreError) as error:
            self._not_started(row, error)
        else:
            self.over_budget = None
            self._worked_at = time.monotonic()
            self._silent.clear()
            self._doubted = 0
            self._count(row, [started.record])

    def _not_started(self, row: RowState, error: TrackerError) -> None:
        """Keep the error with the row, or try it again, or stop."""
        match error:
            case StartUnresolved() | IdempotencyConflict() | InvalidRequest():
                self.errors[row.entry.position] = str(error)
            case FloraRefusal() if error.status in ABOUT_THE_ROW:
                self.errors[row.entry.position] = str(error)
                self._doubted = 0
            case RateLimited():
                self._queue.appendleft(row)
            case FloraError() if not isinstance(error, FloraRefusal):
                self._retry_or_stop(row, error)
            case BudgetExceeded(ever_fits=True, renews_at=datetime() as renews_at) if (
                self.order.wait_for_budget
            ):
                at = self.batches.clock() + self.batches.budget_every
                self._budget_at, self.over_budget = min(renews_at, at), error
                self._queue.appendleft(row)
            case _:  # the next row would meet it, too
                self._stop(error)
                self._queue.appendleft(row)

    def _retry_or_stop(self, row: RowState, error: FloraError) -> None:
        """Try a row again to which FLORA gave no usable answer, unless FLORA seems to be down."""
        key = row.entry.key
        self._silent.add(key)
        is_cut_off = isinstance(error, FloraUnreachable) and not error.may_have_acted
        is_down = is_cut_off and time.monotonic() - self._worked_at >= SILENCE
        if is_down or len(self._silent) >= max(FAILURES, self.concurrency):
            self._stop(error)
        self._tries[key] += 1
        if self._tries[key] < TRIES:
            self._queue.append(row)
        else:
            self.errors[row.entry.position] = str(error)

    def _stop(self, error: TrackerError) -> None:
        if self.stopped is None:
            log.warning("batch.stopped", error=str(error), left=self.left)
            self.stopped = error

    # What the runs cost, to keep them within the maximum that was ordered

    def _count(self, row: RowState, records: Sequence[Record]) -> None:
        """Count what the runs of a row cost: their charges, or what they may cost until then.

        FLORA's answer to a start of several runs names the first. Those that are not known yet
        count as much as the most expensive one, at least their price.
        """
        if not records:
            return
        price = records[0].reserved_cost or self.plan.technique.run_cost or Decimal(0)
        costs = []
        for record in records:
            run, cost = record.run, record.run.charged_cost
            if cost is None:
                cost = Decimal(0) if record.cost_final else max(run.quoted_cost or price, price)
            costs.append(cost)
        missing = max(runs_of(self.plan.technique, row.inputs or []) - len(costs), 0)
        self._spent[row.entry.key] = sum(costs, missing * max(*costs, price))
        self._rows[row.entry.key] = row

    async def _fits(self, row: RowState) -> bool:
        """Whether the row's price fits into the maximum cost; else the launch stops."""
        limit = self.order.max_cost
        if limit is None:
            return True
        if time.monotonic() - self._charges_read_at >= CHARGES_EVERY:
            database, workspace_id = self.batches.database, self.plan.batch.workspace_id
            found = await starts.of_keys(database, workspace_id, self._rows)
            for key, records in (await starts.runs_of(database, found.values())).items():
                self._count(self._rows[key], records)
            self._charges_read_at = time.monotonic()
        cost = self.plan.cost_of(row)
        if cost is None:
            self._stop(MaxCostReached("FLORA shows no price to compare with the maximum cost"))
            return False
        # The runs of those that have begun are not known yet.
        begun = [one for one in self._starting.values() if one is not row]
        reserved = [self.plan.cost_of(one) or Decimal(0) for one in (*begun, *self._doubt.values())]
        committed = sum(self._spent.values(), Decimal(0)) + sum(reserved, Decimal(0))
        if committed + cost > limit:
            self._stop(
                MaxCostReached(
                    f"quotes and charges are {money(committed)}, and another row could exceed the "
                    f"maximum cost of {money(limit)}"
                )
            )
        return committed + cost <= limit


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
        workspace = await self.workspace_of(plan.batch)
        launch = BatchLaunch(self, workspace, plan, order, concurrency=concurrency, wait=wait)
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
            plan.batch,
            self.clock() if stopped is None else None,
            stopped=None if stopped is None else str(stopped),
            errors=launch.errors,
            in_doubt=launch.has_doubts,
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
                on_progress(launch.progress(counts))
                if launched:
                    await launching  # raises its errors
                    awaits_runs = wait and counts.awaits_runs(self.clock())
                    if not awaits_runs or _cannot_go_on(launch.stopped):
                        return launch.stopped
                    refusal = launch.workspace.require_client().breaker.reason
                    if polling.has_begun and refusal:
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
