"""Orders: batches that a worker launches, for the API and the pages.

An order is stored with all of its rows before it is answered; `tracker.starting.batch_worker`
launches it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from tracker.core.budget import Budget, Budgets
from tracker.core.clock import Clock
from tracker.core.errors import MaxCostReached
from tracker.core.formatting import counted, money
from tracker.core.log import get_logger
from tracker.starting.batch_rows import BatchPlan
from tracker.store.engine import Database
from tracker.store.queries import audit, batch_launches, batches, spending
from tracker.store.queries.audit import Action
from tracker.store.queries.batches import BatchRow
from tracker.store.queries.starts import UNKNOWN

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is ordered, beside the rows.

    `max_cost` is the most that they may cost, in USD; `wait_for_budget` waits for a budget to renew
    if it has no room for the next row. `at_once` starts retries without the wait that was advised.
    """

    started_by: str
    ordered_at: datetime
    max_cost: Decimal | None = None
    wait_for_budget: bool = False
    at_once: bool = False

    @classmethod
    def of(cls, batch: BatchRow) -> "Order":
        """The order of a stored batch that has one."""
        stored: dict[str, Any] = batch.launch or {}
        ordered_at, max_cost = stored.get("ordered_at"), stored.get("max_cost")
        return cls(
            started_by=stored.get("started_by", ""),
            ordered_at=datetime.fromisoformat(ordered_at) if ordered_at else batch.created_at,
            max_cost=Decimal(max_cost) if max_cost else None,
            wait_for_budget=stored.get("wait_for_budget", False),
            at_once=stored.get("at_once", False),
        )

    def as_json(self) -> dict[str, Any]:
        """The order as it is stored."""
        return {
            "started_by": self.started_by,
            "ordered_at": self.ordered_at.isoformat(),
            "max_cost": None if self.max_cost is None else str(self.max_cost),
            "wait_for_budget": self.wait_for_budget,
            "at_once": self.at_once,
        }

    def is_like(self, other: "Order") -> bool:
        """Whether both order the same, whoever did and when."""
        return self == replace(other, started_by=self.started_by, ordered_at=self.ordered_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The stored batch, whether it was `known` before, and whether it was `ordered` now: the same
    order again is none."""

    batch: BatchRow
    known: bool
    ordered: bool


@dataclass(kw_only=True, eq=False)
class BatchOrders:
    """Takes orders. `on_order` is called after each."""

    database: Database
    budgets: Budgets
    clock: Clock
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
        if order.max_cost is not None:
            _check_cost(plan, order.max_cost)
        prices: defaultdict[Budget, Decimal | None] = defaultdict(Decimal)
        for row in plan.missing:
            start = plan.states[row.entry.key].start
            if start is not None and start.state in UNKNOWN:
                continue  # reserved
            cost = plan.cost_of(row)
            of = (plan.batch.workspace_slot, plan.batch.technique_id, row.tags)
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

    async def place(self, plan: BatchPlan, order: Order) -> Placed:
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
                workspace_id=placed.workspace_slot,
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
        return Placed(batch=kept or plan.batch, known=stored is not None, ordered=ordered)

    async def stop(self, batch: BatchRow, *, by: str) -> bool:
        """Start no further row of a batch; false if a worker has none to start.

        Starts that were sent are not undone. Raises `StoreUnavailable`.
        """
        entry = audit.entry(Action.STOP, self.clock(), batch_id=batch.batch_id)
        stopped = await batch_launches.stop(
            self.database, batch.batch_id, f"stopped by {by}", noted=entry
        )
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


def _check_cost(plan: BatchPlan, limit: Decimal) -> None:
    if plan.cost is None:
        raise MaxCostReached(
            f"FLORA shows no price for {plan.technique.technique_id} to compare with the maximum "
            "cost; nothing was started"
        )
    if plan.cost > limit:
        raise MaxCostReached(
            f"starting {counted(len(plan.missing), 'row')} could cost {money(plan.cost)}, more "
            f"than the maximum cost of {money(limit)}; nothing was started"
        )
