"""Orders: batches that a worker launches, for the API and the pages.

An order is stored with all of its rows before it is answered; `BatchWorker` launches it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal

from tracker.core.log import get_logger
from tracker.core.starts import Budget, Budgets
from tracker.starting.batches.launch import Order
from tracker.starting.batches.rows import BatchPlan
from tracker.store.queries import audit, batches, spending
from tracker.store.queries.audit import Action
from tracker.store.queries.batches import BatchRow
from tracker.store.queries.starts import UNKNOWN
from tracker.workspaces import Service

log = get_logger(__name__)


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
