"""Ordered batches: stored for the API and the pages, and launched by any process with a worker.

An order is stored with all of its rows before it is answered. A batch is launched by one process at
a time, by its lease; one whose process died is taken over when the lease expires. The lease saves
work and keeps to the maximum cost: that no row is paid twice follows from the rows' keys, as for a
command.

A launch that FLORA's or the database's silence ended goes on by itself. What a person has to
decide (the maximum cost, a budget, no credits) ends it, and the batch says why until it is
ordered again.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from tracker.core.clock import boot_seconds
from tracker.core.errors import (
    BudgetExceeded,
    FloraRefusal,
    KeyRefused,
    MaxCostReached,
    RateLimited,
    ServerFault,
    StoreError,
    TrackerError,
)
from tracker.core.log import get_logger
from tracker.core.starts import Budget, Budgets
from tracker.core.waiting import cancel, repeat, wait_for
from tracker.starting.batches import ABOUT_THE_ROW, Batches, BatchLaunch
from tracker.starting.rows import BatchPlan, Order, RowState
from tracker.store.queries import audit, batches, spending
from tracker.store.queries.audit import Action, Principal, acting
from tracker.store.queries.batches import BatchRow, LaunchEnd
from tracker.store.queries.starts import UNKNOWN, StartState
from tracker.workspaces import Service

log = get_logger(__name__)

MOST_GIVE_WAY: Final = 4
"""Launches that give way at a time, if there are so many that further batches wait."""
BREAK_OFF_SECONDS: Final = 5.0
"""How long starts that were sent have to end when the process stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedOrder:
    """The stored batch, whether it was `known` before, and whether it was `ordered` now: the same
    order again is none."""

    batch: BatchRow
    known: bool
    ordered: bool


@dataclass(kw_only=True, eq=False)
class BatchOrders(Service):
    """Takes orders. `on_order` is called after each."""

    budgets: Budgets
    on_order: Callable[[], None]

    async def check(self, plan: BatchPlan, order: Order) -> None:
        """Check that the rows to start fit into the maximum cost and the budgets.

        Raises `MaxCostReached`, `BudgetExceeded`, and the `FloraError` of a price that could not be
        read.
        """
        if not plan.missing:
            return
        if plan.price_error is not None:
            raise plan.price_error
        plan.check_cost(order.max_cost, name="the maximum cost of")
        prices: defaultdict[Budget, Decimal | None] = defaultdict(Decimal)
        for row in plan.missing:
            if row.start is not None and row.start.state in UNKNOWN:
                continue  # reserved
            cost = plan.cost_of(row)
            of = (plan.batch.workspace_id, plan.batch.technique_id, row.entry.tags)
            for budget in self.budgets.covering(*of):
                sum_ = prices[budget]
                prices[budget] = None if cost is None or sum_ is None else sum_ + cost
        now = self.clock()
        for usage in await spending.usages(self.database, list(prices), now=now):
            price = prices[usage.budget]
            if price is not None and usage.used + price <= usage.budget.usd:
                continue
            if price is None or not (order.wait_for_budget and usage.renews_at):
                raise spending.exceeded(usage, price, what="this batch could cost")

    async def place(self, plan: BatchPlan, order: Order) -> PlacedOrder:
        """Store a batch to be launched.

        The same order again changes nothing but the batch's name and carried cells. Raises like
        `check`, and `StoreUnavailable`.
        """
        order = replace(order, only_failed=plan.only_failed)
        entries = [row.entry for row in plan.rows]
        stored = await batches.get(self.database, plan.batch.batch_id)
        ordered = stored is None or not await self._is_placed(plan, order, stored)
        if not ordered:
            await batches.keep(self.database, replace(plan.batch, launch=None), entries)
        else:
            await self.check(plan, order)
            placed = replace(plan.batch, launch=order.as_json(), launch_at=order.ordered_at)
            entry = audit.entry(
                Action.LAUNCH,
                order.ordered_at,
                batch_id=placed.batch_id,
                technique_id=placed.technique_id,
                workspace_id=placed.workspace_id,
                rows=len(plan.missing),
            )
            noted = entry if plan.missing else None
            if not await batches.keep(
                self.database, placed, entries, only_new=stored is None, noted=noted
            ):
                return await self.place(plan, order)  # it was ordered at the same moment
            if plan.missing:
                log.info(
                    "batch.ordered",
                    batch_id=placed.batch_id,
                    rows=len(plan.missing),
                    token=order.started_by,
                    peer=audit.principal().address,
                )
            self.on_order()
        kept = await batches.get(self.database, plan.batch.batch_id)
        return PlacedOrder(batch=kept or plan.batch, known=stored is not None, ordered=ordered)

    async def stop(self, batch: BatchRow, *, by: str) -> bool:
        """Start no further row of a batch; false if a worker has none to start.

        Starts that were sent are not undone. Raises `StoreUnavailable`.
        """
        entry = audit.entry(Action.STOP, self.clock(), batch_id=batch.batch_id)
        stopped = await batches.stop(self.database, batch.batch_id, f"stopped by {by}", noted=entry)
        if stopped:
            log.info("batch.stop_requested", batch_id=batch.batch_id, token=by)
        return stopped

    async def _is_placed(self, plan: BatchPlan, order: Order, stored: BatchRow) -> bool:
        """Whether this order was placed before, and its rows are about to be started."""
        if stored.launch_at is None or not order.is_like(Order.of(stored)):
            return False
        entries = await batches.entries(self.database, stored.batch_id)
        keys = {entry.position: entry.key for entry in entries}
        return all(keys.get(row.entry.position) == row.entry.key for row in plan.rows)


@dataclass(kw_only=True, eq=False)
class BatchWorker(Service):
    """Launches due batches. `concurrency` is how many rows of a batch are started at a time."""

    batches: Batches
    concurrency: int
    check_every: float = 5.0
    """Seconds between two reads of what is due; an order of this process is launched at once."""
    finish_every: float = 15.0
    """Seconds between two checks whether the runs of launched batches have ended."""
    renew_after: float = 3.0
    """Seconds after which a lease is renewed, and a new order or a stop is noticed."""
    go_on_after: timedelta = timedelta(seconds=30)
    """When a launch goes on that FLORA's or the database's silence ended."""
    most_launches: int = 20
    """Launches at the same time in one process; further batches wait."""
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _launches: dict[BatchLaunch, None] = field(default_factory=dict, init=False)
    _giving_way: set[BatchLaunch] = field(default_factory=set, init=False)
    _ordered: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _closed_at: float = field(default=float("-inf"), init=False)
    _stopping: bool = field(default=False, init=False)
    _running: asyncio.Task[None] | None = field(default=None, init=False)

    def wake(self) -> None:
        """Check at once what is due."""
        self._ordered.set()

    def start(self) -> bool:
        """Launch what is due until `stop`; false if that was begun before."""
        if self._running is not None:
            return False
        launching = repeat("batches", self._launch_next)
        self._running = asyncio.create_task(launching, name="batch-launcher")
        return True

    async def _launch_next(self) -> None:
        await self.launch_due()
        await wait_for(self._ordered, self.check_every)
        self._ordered.clear()

    async def launch_due(self) -> None:
        """Begin to launch what is due, and close batches that have ended. Raises `StoreError`."""
        free = self.most_launches - len(self._tasks)
        known = [one.workspace_id for one in self.workspaces.keyed if one.workspace_id is not None]
        if free > 0 and known:
            due = await batches.claim_due(
                self.database, known, holder=self.process, now=self.clock(), limit=free
            )
            for batch in due:
                if batch.batch_id not in self._tasks:
                    task = asyncio.create_task(self._work(batch), name="batch-launch")
                    self._tasks[batch.batch_id] = task
        elif free <= 0:
            self._give_way()
        if time.monotonic() - self._closed_at >= self.finish_every:
            await batches.finish_ended(self.database, self.clock())
            self._closed_at = time.monotonic()

    def _give_way(self) -> None:
        """End some launches in which no row can begin now, those that began first: one that waits
        for a budget may do so for weeks. They are due again after `go_on_after`."""
        waiting = [one for one in self._launches if one.only_waits]
        for launch in waiting[:MOST_GIVE_WAY]:
            self._giving_way.add(launch)
            launch.break_off()

    async def stop(self) -> None:
        """Begin no further row, let sent starts end, and release the leases."""
        self._stopping = True
        await cancel(self._running)
        tasks = list(self._tasks.values())
        for launch in self._launches:
            launch.break_off()
        if tasks:
            await asyncio.wait(tasks, timeout=BREAK_OFF_SECONDS)
        await cancel(*tasks)

    async def _work(self, batch: BatchRow) -> None:
        """Launch one batch, and store how that ended."""
        try:
            ended = await self._launch(batch)
            if ended is not None:
                await batches.end_launch(self.database, batch, ended, holder=self.process)
        except StoreError as error:
            log.warning("batch.not_launched", batch_id=batch.batch_id, error=str(error))
        finally:
            # A batch that is still due, or was ordered anew, is launched at once.
            with suppress(StoreError):
                await batches.release_launch(self.database, batch, holder=self.process)
            del self._tasks[batch.batch_id]
            self.wake()

    async def _launch(self, batch: BatchRow) -> LaunchEnd | None:
        """Start the rows; how that ended, `None` if it was broken off."""
        launch: BatchLaunch | None = None
        try:
            if unknown := Order.unknown(batch):
                raise TrackerError(
                    "it waits for a worker of the newer version that it was ordered with "
                    f"({', '.join(unknown)})"
                )
            order = Order.of(batch)
            with acting(Principal(name=order.started_by)):
                plan = await self._plan(batch, order)
                launch = BatchLaunch(
                    self.batches,
                    await self.batches.workspace_of(batch),
                    plan,
                    order,
                    concurrency=self.concurrency,
                    counted=_started(plan, order.ordered_at),
                )
                log.info("batch.launched", batch_id=batch.batch_id, rows=len(plan.missing))
                await self._run(batch, launch)
            stopped = launch.stopped
        except TrackerError as error:
            stopped = error
        except Exception as error:
            log.exception("batch.launch_broken", batch_id=batch.batch_id)
            stopped = TrackerError(f"an unexpected error, see the log: {type(error).__name__}")
        goes_on = stopped is not None and _is_passing(stopped)
        if launch is not None and launch.broken_off:
            if launch not in self._giving_way:
                return None
            self._giving_way.discard(launch)
            goes_on, stopped = True, launch.over_budget
        if launch is not None:
            stopped = launch.plan.stopped_by(stopped)
        return LaunchEnd(
            launch_at=self.clock() + self.go_on_after if goes_on else None,
            stopped=None if stopped is None else str(stopped),
            errors={} if goes_on or launch is None else launch.errors,
        )

    async def _run(self, batch: BatchRow, launch: BatchLaunch) -> None:
        self._launches[launch] = None
        if self._stopping:
            launch.break_off()
        renewing = asyncio.create_task(self._renew(batch, launch))
        try:
            await launch.run()
        finally:
            renewing.cancel()
            del self._launches[launch]

    async def _plan(self, batch: BatchRow, order: Order) -> BatchPlan:
        """The batch as it is stored, without rows that this order has tried."""
        plan = await self.batches.stored_plan(
            batch, only_failed=order.only_failed, wait=not order.at_once
        )
        rows = [row for row in plan.rows if not _was_tried(row, since=order.ordered_at)]
        return replace(plan, rows=rows)

    async def _renew(self, batch: BatchRow, launch: BatchLaunch) -> None:
        """Renew the lease; break the launch off where it is lost, or the batch ordered anew."""
        valid_until = boot_seconds() + batches.LEASE.total_seconds()

        async def renew() -> None:
            nonlocal valid_until
            await asyncio.sleep(self.renew_after)
            until = boot_seconds() + batches.LEASE.total_seconds()
            waits = None if launch.over_budget is None else str(launch.over_budget)
            is_mine = await batches.renew_launch(
                self.database, batch, holder=self.process, now=self.clock(), waits=waits
            )
            valid_until = until if is_mine else float("-inf")

        await repeat("batch lease", renew, is_over=lambda: boot_seconds() >= valid_until)
        launch.break_off()


def _is_passing(stopped: TrackerError) -> bool:
    """Whether a launch that ended for this reason goes on by itself."""
    if isinstance(stopped, FloraRefusal) and stopped.from_flora:
        return isinstance(stopped, KeyRefused | RateLimited | ServerFault)
    return not isinstance(stopped, BudgetExceeded | MaxCostReached)


def _was_tried(row: RowState, *, since: datetime) -> bool:
    """Whether a row could not be started since then, for a reason of its own."""
    start = row.start
    if row.error is not None or start is None or start.state is not StartState.REFUSED:
        return row.error is not None
    refused = (start.error or {}).get("status") in ABOUT_THE_ROW
    return refused and start.sent_at is not None and start.sent_at >= since


def _started(plan: BatchPlan, since: datetime) -> list[RowState]:
    """The rows that were started since then."""
    return [
        row
        for row in plan.rows
        if row.start is not None and row.started and (row.start.sent_at or since) >= since
    ]
