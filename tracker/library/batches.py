"""Batches: a run for each of many rows, as frozen values."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Generic, Literal, Self

from tracker.core.formatting import counted, money, parse_usd
from tracker.core.record import Record
from tracker.core.starts import check_tags
from tracker.errors import BatchUnknown, InvalidRequest, WaitTimeout
from tracker.library.inputs import Rows, check_seconds, check_text, check_texts, planned, valid
from tracker.library.reading import RunCalls
from tracker.library.run import ACTOR, AnyRun, Owned, Run, acting_here, html_macros
from tracker.views import batch_columns

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.starting.rows import BatchPlan, Order, Retry, RowState
    from tracker.store.queries.batches import BatchCounts, BatchRow

PAGE_SIZE = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult(Generic[AnyRun]):
    """A row of a batch: its number from 1, its runs, and its state.

    `runs` has a run for each value of an input, as far as they are known; `run` is the first, if
    there is one. `status` is that of a run in progress while there is one, `completed` once all
    have, `failed` where one did, or `not_started`, `sending`, `in_doubt`, `refused`, `unresolved`,
    `lost` or `forgotten`; `error` is why it could not be started or failed. `carried` are the
    fields that are no input, each as its text: numbers too, dates and times in ISO 8601.
    """

    row: int
    run: AnyRun | None
    runs: tuple[AnyRun, ...]
    status: str
    error: str | None
    retry_advice: str | None
    inputs: tuple[Mapping[str, str], ...]
    tags: Mapping[str, str]
    carried: Mapping[str, str]
    idempotency_key: str

    @classmethod
    def _of(cls, row: "RowState", bound: Callable[[Record], AnyRun]) -> Self:
        """The value of a stored row; `bound` makes its runs."""
        runs = tuple(map(bound, row.records))
        return cls(
            row=row.entry.position,
            run=runs[0] if runs else None,
            runs=runs,
            status=str(row.status),
            error=row.why,
            retry_advice=row.advice and str(row.advice),
            inputs=tuple(row.inputs or ()),
            tags=row.tags,
            carried=row.entry.carried,
            idempotency_key=row.entry.key,
        )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BatchFields:
    """The state of a batch when it was read: the number of its rows in each state, costs in USD.

    `launching` is true until each row was tried; `stopped` says why that ended early.
    """

    batch_id: str
    name: str
    workspace_id: str
    technique_id: str
    source: str | None
    created_at: datetime
    launching: bool
    stopped: str | None
    rows: int
    started: int
    completed: int
    failed: int
    active: int
    lost: int
    refused: int
    unresolved: int
    in_doubt: int
    cost: Decimal
    cost_final: bool
    quoted: Decimal

    @classmethod
    def _of(cls, batch: "BatchRow", counts: "BatchCounts") -> Self:
        """The value of a stored batch."""
        values = batch_columns(batch, counts)
        return cls(**{one.name: values[one.name] for one in fields(cls)})

    @property
    def ended(self) -> bool:
        """Whether no row is to be started any more, and no run is active."""
        return not (self.launching or self.active or self.in_doubt)

    def __hash__(self) -> int:
        return hash(self.batch_id)

    def __repr__(self) -> str:
        shown = f"{self.completed} of {counted(self.rows, 'row')} completed"
        if others := self.failed + self.lost + self.refused + self.unresolved:
            shown += f", {others} not"
        return f"<Batch {self.batch_id} · {self.technique_id} · {shown} · {money(self.cost)}>"

    def _repr_html_(self) -> str:
        """The batch with the number of its rows in each state, and its cost."""
        names = ("completed", "failed", "active", "lost", "refused", "unresolved", "in_doubt")
        counts = {name.replace("_", " "): getattr(self, name) for name in names}
        return str(html_macros().batch_card(self, counts))


class Batch(BatchFields, Owned["BatchCalls"]):
    """A batch, as it was when it was read, and what can be done with it."""

    __slots__ = ("_owner",)

    @classmethod
    def _bound(cls, batch: "BatchRow", counts: "BatchCounts", owner: "BatchCalls") -> Self:
        """The value of a stored batch, with the tracker that read it."""
        return cls._of(batch, counts)._given_to(owner)

    async def wait(self, timeout: float | None = None) -> "Batch":
        """The batch when each row was tried and its runs have ended.

        Failed rows raise nothing: `results` has them. A batch that was `stopped` (by its maximum
        cost, a budget or a person) ends with the runs that it has started. Raises `WaitTimeout`,
        and `StoreUnavailable` if the database does not answer for a minute.
        """
        from tracker.polling.follow import CHECK_EVERY, OUTAGE, OwnPolling, until_available
        from tracker.starting.batches import COUNT_SHARE

        timeout = valid("timeout", check_seconds, timeout)
        services = self._tracker._launching_batches()
        read = partial(_counted, services, self.batch_id)
        give_up = math.inf if timeout is None else time.monotonic() + timeout
        async with OwnPolling(poll=services.poller.poll_due, clock=services.clock) as polling:
            while True:
                began = time.monotonic()
                patience = min(OUTAGE, give_up - began)
                batch, counts = await until_available(read, None, give_up_after=patience)
                waits = counts.doubt or counts.awaits_runs(services.clock())
                if batch.launch_at is None and not waits:
                    return Batch._bound(batch, counts, self._tracker)
                if time.monotonic() >= give_up:
                    raise WaitTimeout(
                        f"batch {self.batch_id} has not ended after {timeout:g} s: {counts.ended} "
                        f"of {counted(counts.rows, 'row')} have. It goes on: wait again"
                    )
                polling.check(counts.next_check_at)
                pause = max(CHECK_EVERY, (time.monotonic() - began) / COUNT_SHARE)
                await asyncio.sleep(min(pause, max(give_up - time.monotonic(), 0.0)))

    async def refresh(self) -> "Batch":
        """The batch as it is stored now."""
        return await self._tracker.batch(self.batch_id)

    async def results(self) -> list[BatchResult[Run]]:
        """Each row with its run, in order."""
        services = self._tracker._services()
        rows = await services.batches.rows(await _stored(services, self.batch_id))
        return [BatchResult[Run]._of(row, self._tracker._run) for row in rows]

    async def stop(self) -> "Batch":
        """Start no further row; runs that are started go on."""
        services = self._tracker._services()
        with acting_here():
            await services.batch_orders.stop(await _stored(services, self.batch_id), by=ACTOR)
        return await self.refresh()

    async def retry(
        self,
        which: Literal["unstarted", "failed", "all"] = "failed",
        *,
        only_failed: bool = False,
        max_cost: Decimal | float | None = None,
        wait_for_budget: bool = False,
    ) -> "Batch":
        """Start rows without a run, and those that failed temporarily (`all`: for any reason).

        `only_failed` leaves rows without a run out. A retry is a new run and is charged. Raises
        like `Tracker.start_batch`.
        """
        services = self._tracker._services()
        retry = valid("which", _retry_of, which)
        if only_failed and retry is None:
            raise InvalidRequest("only_failed leaves out all rows that 'unstarted' starts")
        order = _order_of(
            services, max_cost=max_cost, wait_for_budget=wait_for_budget, at_once=which == "all"
        )
        plan = await services.batches.stored_plan(
            await _stored(services, self.batch_id), retry=retry, only_failed=only_failed
        )
        return await self._tracker._place(plan, order)


class BatchCalls(RunCalls):
    """The part of `Tracker` about batches."""

    async def start_batch(
        self,
        technique: str,
        rows: Rows,
        *,
        name: str | None = None,
        columns: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        tag_columns: Mapping[str, str] | None = None,
        workspace_id: str | None = None,
        retry: Literal["failed", "all"] | None = None,
        accept_changes: bool = False,
        max_cost: Decimal | float | None = None,
        wait_for_budget: bool = False,
    ) -> Batch:
        """Start a run for each row, once each; the same rows again are the same batch.

        A field with the id or name of an input is that input (`columns` maps others, by the input's
        id); all other fields are carried into the results. `tag_columns` are fields that tag the
        runs, by tag. `retry` also starts rows again that failed: temporarily, or for any reason.

        All rows are checked and stored first. Then any process with a worker starts them, or this
        one as long as the tracker is open; what is left is started when the same rows are started,
        or the batch is waited for, again.

        Raises `InvalidRequest` with every wrong row, `MaxCostReached` if the rows could cost more
        than `max_cost` (USD), `BudgetExceeded` unless it is to `wait_for_budget`,
        `DefinitionChanged` unless `accept_changes`, and `FloraError`.
        """
        from tracker.starting.rows import Retry

        check_texts(workspace_id=workspace_id)
        services = self._services()
        order = _order_of(
            services, max_cost=max_cost, wait_for_budget=wait_for_budget, at_once=retry == "all"
        )
        plan = await planned(
            services,
            valid("technique", check_text, technique),
            valid("rows", iter, rows),
            name=None if name is None else valid("name", check_text, name),
            columns=valid("columns", dict, columns or {}),
            tags=valid("tags", check_tags, tags or {}),
            tag_columns=valid("tag_columns", dict, tag_columns or {}),
            workspace_id=workspace_id,
            retry=None if retry is None else valid("retry", Retry, retry),
            accept_changes=accept_changes,
        )
        return await self._place(plan, order)

    async def batch(self, batch_id: str) -> Batch:
        """A stored batch. Raises `BatchUnknown`."""
        batch_id = valid("batch_id", check_text, batch_id)
        return Batch._bound(*await _counted(self._services(), batch_id), self)

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """All stored batches, newest first, read in pages as the loop goes on."""
        from tracker.store.queries import batches as stored

        cursor: str | None = None
        while True:
            database = self._services().database
            rows, cursor = await stored.list_batches(database, cursor=cursor, limit=PAGE_SIZE)
            counts = await stored.batch_counts(database, [one.batch_id for one in rows])
            for one in rows:
                yield Batch._bound(one, counts[one.batch_id], self)
            if cursor is None:
                return

    async def _place(self, plan: "BatchPlan", order: "Order") -> Batch:
        services = self._launching_batches()
        with acting_here():
            placed = await services.batch_orders.place(plan, order)
        counts = await services.batches.counts(placed.batch)
        return Batch._bound(placed.batch, counts, self)


def _order_of(
    services: "Services", *, max_cost: Decimal | float | None, wait_for_budget: bool, at_once: bool
) -> "Order":
    """An order of now. `max_cost` is USD."""
    from tracker.starting.rows import Order

    return Order(
        started_by=ACTOR,
        ordered_at=services.clock(),
        max_cost=None if max_cost is None else valid("max_cost", parse_usd, max_cost),
        wait_for_budget=wait_for_budget,
        at_once=at_once,
    )


def _retry_of(which: str) -> "Retry | None":
    """Which failed rows `which` starts again, if any. Raises `ValueError`."""
    from tracker.starting.rows import Retry

    if which == "unstarted":
        return None
    if which not in {*Retry}:
        raise ValueError(f"must be one of unstarted, {', '.join(Retry)}")
    return Retry(which)


async def _stored(services: "Services", batch_id: str) -> "BatchRow":
    """A stored batch. Raises `BatchUnknown`."""
    from tracker.store.queries import batches as stored

    batch = await stored.get(services.database, batch_id)
    if batch is None:
        raise BatchUnknown(f"batch {batch_id} is not stored here")
    return batch


async def _counted(services: "Services", batch_id: str) -> "tuple[BatchRow, BatchCounts]":
    """A stored batch and its counts. Raises `BatchUnknown`."""
    batch = await _stored(services, batch_id)
    return batch, await services.batches.counts(batch)
