"""Rows given as Python values become a batch, and a batch is followed to its end."""

import asyncio
import math
import time
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import partial
from typing import Any, cast

from tracker.core.errors import FIELDS_NAMED, FieldFault, InvalidRequest
from tracker.core.formatting import counted, parse_usd
from tracker.errors import BatchUnknown, WaitTimeout
from tracker.library.inputs import text_of, valid
from tracker.library.run import ACTOR
from tracker.polling.follow import CHECK_EVERY, OUTAGE, OwnPolling, until_available
from tracker.services import Services
from tracker.starting.batches.batches import COUNT_SHARE
from tracker.starting.batches.launch import Order
from tracker.starting.batches.rows import BatchPlan
from tracker.starting.sheets.columns import ColumnMapping
from tracker.starting.sheets.sheet import SheetRefused, sheet_of_objects
from tracker.store.queries import batches as stored
from tracker.store.queries.batches import BatchCounts, BatchRow


async def planned(
    services: Services, technique: str, rows: Iterable[object], **options: Any
) -> BatchPlan:
    """The plan of these rows; `columns` is the field of an input, by its id.

    Raises `InvalidRequest`, which names rows and fields, and what `Batches.plan` raises.
    """
    explicit = [ColumnMapping(*one) for one in options.pop("columns").items()]
    objects: list[tuple[int, dict[str, Any]]] = []
    faults: list[FieldFault] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            message = f"must be a mapping, not {type(row).__name__}"
            faults.append(FieldFault(f"rows.{number}", message))
            continue
        cells: dict[str, Any] = {}
        for name, value in cast("Mapping[object, object]", row).items():
            given = cast("list[object]", value) if isinstance(value, list | tuple) else [value]
            cells[str(name)] = texts = [text_of(one) for one in given if one is not None]
            if None in texts:
                message = "must be a text, a number, a boolean or a date, or a list of them"
                faults.append(FieldFault(f"rows.{number}.{name}", message))
        objects.append((number, cells))
    if not objects and not faults:
        faults.append(FieldFault("rows", "must not be empty"))
    if faults:
        raise _refused(faults)
    # In a thread: many rows would hold up what else the process does.
    sheet = await asyncio.to_thread(sheet_of_objects, objects)
    options["name"] = options["name"] or counted(len(objects), "row")
    try:
        plan, _ = await services.batches.plan(
            technique, sheet, explicit=explicit, source=ACTOR, **options
        )
    except SheetRefused as refused:
        for one in refused.problems:
            where = [str(part) for part in ("rows", one.line, one.column) if part]
            faults.append(FieldFault(".".join(where), one.of_fields))
        raise _refused(faults) from refused
    return plan


def _refused(faults: list[FieldFault]) -> InvalidRequest:
    more = f"; and {len(faults) - FIELDS_NAMED} more" if len(faults) > FIELDS_NAMED else ""
    named = "; ".join(map(str, faults[:FIELDS_NAMED]))
    return InvalidRequest(f"nothing was started: {named}{more}", faults)


def order_of(
    services: Services, *, max_cost: Decimal | float | None, wait_for_budget: bool, at_once: bool
) -> Order:
    """An order of now. `max_cost` is USD."""
    return Order(
        started_by=ACTOR,
        ordered_at=services.clock(),
        max_cost=None if max_cost is None else valid("max_cost", parse_usd, max_cost),
        wait_for_budget=wait_for_budget,
        at_once=at_once,
    )


async def found(services: Services, batch_id: str) -> tuple[BatchRow, BatchCounts]:
    """A stored batch and its counts. Raises `BatchUnknown`."""
    batch = await stored.get(services.database, batch_id)
    if batch is None:
        raise BatchUnknown(f"batch {batch_id} is not stored here")
    return batch, await services.batches.counts(batch)


async def ended(
    services: Services, batch_id: str, timeout: float | None
) -> tuple[BatchRow, BatchCounts]:
    """The batch when each row was tried and its runs have ended; no process but this one may poll.

    Raises `BatchUnknown`, `WaitTimeout`, and `StoreUnavailable` if the database does not answer for
    a minute.
    """
    give_up = math.inf if timeout is None else time.monotonic() + timeout
    async with OwnPolling(poll=services.poller.poll_due, clock=services.clock) as polling:
        while True:
            began = time.monotonic()
            batch, counts = await until_available(
                partial(found, services, batch_id), None, give_up_after=min(OUTAGE, give_up - began)
            )
            waiting = counts.active + counts.doubt
            if batch.launch_at is None and not waiting:
                return batch, counts
            if time.monotonic() >= give_up:
                raise WaitTimeout(
                    f"batch {batch_id} has not ended after {timeout:g} s: {counts.ended} of "
                    f"{counted(counts.rows, 'row')} have. It goes on: wait again"
                )
            polling.check(counts.next_check_at)
            pause = max(CHECK_EVERY, (time.monotonic() - began) / COUNT_SHARE)
            await asyncio.sleep(min(pause, max(give_up - time.monotonic(), 0.0)))
