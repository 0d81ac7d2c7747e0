"""What a launch spends, to keep it within the maximum cost that was ordered."""

import time
from collections.abc import Iterable
from decimal import Decimal
from typing import Final

from tracker.core.errors import MaxCostReached
from tracker.core.formatting import money
from tracker.core.record import Record
from tracker.flora.technique import runs_of
from tracker.starting.batches.rows import BatchPlan, RowState
from tracker.store.engine import Database
from tracker.store.queries import runs

CHARGES_EVERY: Final = 5.0
"""Seconds between two reads of the runs' charges."""


class LaunchCosts:
    """The costs of the runs of a plan, which may be `max_cost` USD in all; `None` is no maximum."""

    def __init__(self, plan: BatchPlan, database: Database, max_cost: Decimal | None) -> None:
        self._plan = plan
        self._database = database
        self._max_cost = max_cost
        self._spent: dict[str, Decimal] = {}
        self._rows: dict[str, RowState] = {}
        self._read_at = time.monotonic()

    def count(self, row: RowState, record: Record) -> None:
        """Count what a row costs by its first run: its charge, or what it may cost until then.

        FLORA's answer to a start of several runs names no other; these count as much, at least
        their price.
        """
        run, price = record.run, record.reserved_cost or self._plan.technique.run_cost or Decimal(0)
        cost = run.charged_cost
        if cost is None:
            cost = Decimal(0) if record.cost_final else max(run.quoted_cost or price, price)
        others = runs_of(self._plan.technique, row.inputs or []) - 1
        self._spent[run.run_id] = cost + others * max(cost, price)
        self._rows[run.run_id] = row

    def count_unresolved(self, row: RowState) -> None:
        """Count the price of a row of which it is not known whether it was started and paid."""
        self._spent[row.entry.key] = self._plan.cost_of(row) or Decimal(0)

    async def read_charges(self) -> None:
        """Read what the runs were charged by now, if there is a maximum. Raises `StoreError`."""
        if self._max_cost is None or time.monotonic() - self._read_at < CHARGES_EVERY:
            return
        for run_id, record in (await runs.get_runs(self._database, list(self._rows))).items():
            self.count(self._rows[run_id], record)
        self._read_at = time.monotonic()

    def excess(self, row: RowState, begun: Iterable[RowState]) -> MaxCostReached | None:
        """Why a row may not be started while others have `begun`, whose runs are not known yet;
        `None` if it may."""
        if self._max_cost is None:
            return None
        cost = self._plan.cost_of(row)
        if cost is None:
            return MaxCostReached("FLORA shows no price to compare with the maximum cost")
        reserved = [self._plan.cost_of(one) or Decimal(0) for one in begun]
        committed = sum(self._spent.values(), Decimal(0)) + sum(reserved, Decimal(0))
        if committed + cost <= self._max_cost:
            return None
        return MaxCostReached(
            f"quotes and charges are {money(committed)}, and another row could exceed the maximum "
            f"cost of {money(self._max_cost)}"
        )
