"""`/batches`: all batches; one batch with its rows, by outcome and by error, a page at a time, and
its actions; and `/starts`, starts whose outcome is unknown."""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Mapping
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tracker.core.errors import BudgetExceeded, FieldFault, MaxCostReached
from tracker.core.formatting import counted, money, parse_usd
from tracker.delivering.downloads import batch_archive
from tracker.delivering.saving import naming_column
from tracker.services import Services
from tracker.settings.tokens import Scope as TokenScope
from tracker.starting.rows import BatchPlan, Order, Retry, RowState, kept_rows
from tracker.store.queries import batches, sheet_rows, starts, techniques
from tracker.store.queries.batches import BatchCounts, BatchRow
from tracker.store.queries.sheet_rows import RowOutcome
from tracker.store.queries.starts import LISTED
from tracker.store.queries.techniques import technique_names
from tracker.web.auth import actor_of, may
from tracker.web.dashboard import (
    PAGE_SIZE,
    FlashMessage,
    PageGroup,
    action,
    attachment,
    check_csrf,
    page,
    query_field,
    query_position,
    read_filters,
    read_form,
)
from tracker.web.dashboard.render import Renderer, prompt, query
from tracker.web.http import Limits
from tracker.web.http.responses import Fault, forbidden, invalid, unavailable

PICTURES: Final = 4
"""Outputs that are shown of each batch."""
ROWS: Final = 100
"""Rows on a page."""
STALL_SECONDS: Final = 60.0
NEAR: Final = 2
"""Pages that are named on either side of the present one."""
CHOICES: Final = {"failed": Retry.FAILED, "all": Retry.ALL, "unstarted": None}
"""Which rows: those that FLORA's codes advise to retry, all failed ones, or only those never
started. Rows that were never started are part of each."""
PRICE_SECONDS: Final = 5.0


class RowSplit(NamedTuple):
    """The rows of a batch by outcome; of `removed` ones retention removed the run."""

    completed: int
    failed: int
    running: int
    not_started: int
    removed: int

    @property
    def rows(self) -> int:
        return sum(self)

    @property
    def state(self) -> str:
        """The batch's state: "finished", "running", or "pending" while rows wait to be started."""
        if self.running:
            return "running"
        return "pending" if self.not_started else "finished"

    @property
    def summary(self) -> str:
        failed = f", {self.failed:,} failed" if self.failed else ""
        if self.removed:
            failed += f", {self.removed:,} removed by retention"
        if self.state == "finished":
            return f"finished{failed}"
        done = self.rows - self.running - self.not_started
        ended = f"{done:,} of {counted(self.rows, 'row')} finished{failed}"
        return f"{ended}, {self.not_started:,} not started" if self.not_started else ended


def split_of(counts: BatchCounts) -> RowSplit:
    """The rows by outcome."""
    failed = counts.failed + counts.lost + counts.refused + counts.unresolved + counts.unsent
    running = counts.active + counts.doubt
    waiting = counts.rows - counts.completed - failed - running - counts.removed
    return RowSplit(counts.completed, failed, running, waiting, counts.removed)


class BatchPages(PageGroup):
    """The list of batches; one batch, its outputs as a ZIP, its actions; and the open starts."""

    def __init__(self, services: Services, renderer: Renderer, limits: Limits) -> None:
        super().__init__(services, renderer, limits)
        self._archives = asyncio.Semaphore(limits.archives)

    @page("/batches")
    async def list_batches(self, request: Request) -> Response:
        database, cursor = self._database, query_field(request, "cursor")
        rows, next_cursor = await batches.list_batches(database, cursor=cursor, limit=PAGE_SIZE)
        ids = [one.batch_id for one in rows]
        counts = await batches.batch_counts(database, ids)
        outputs = await sheet_rows.first_outputs(database, ids, most=PICTURES)
        return self._list(
            request,
            "batches.html",
            next_cursor,
            batches=rows,
            counts=counts,
            splits={batch_id: split_of(found) for batch_id, found in counts.items()},
            views={batch_id: self._views(found) for batch_id, found in outputs.items()},
            names=await technique_names(database, sorted({one.technique_id for one in rows})),
        )

    @page("/starts")
    async def list_starts(self, request: Request) -> Response:
        filters, cursor = read_filters(request, {"state": LISTED}), query_field(request, "cursor")
        states = [filters["state"]] if filters["state"] else None
        rows, next_cursor = await starts.list_starts(
            self._database, states=states, cursor=cursor, limit=PAGE_SIZE
        )
        return self._list(
            request,
            "starts.html",
            next_cursor,
            filters,
            rows=rows,
            states={one.value: one.value.replace("_", " ").capitalize() for one in LISTED},
        )

    @page("/batches/{batch_id:any}")
    async def show(self, request: Request) -> Response:
        """One batch, with a page of its rows. `row` leads to the page that has it."""
        database = self._database
        batch = await self._batch(request)
        outcome = query_field(request, "show", RowOutcome)
        chosen: dict[str, Any] = {
            "outcome": None if outcome is None else RowOutcome(outcome),
            "code": query_field(request, "error"),
        }
        address = f"/batches/{quote(batch.batch_id, safe='')}"
        filters = {"show": outcome, "error": chosen["code"]}
        begins = await sheet_rows.page_starts(database, batch.batch_id, limit=ROWS, **chosen) or [0]
        if (row := query_position(request, "row")) is not None:
            page = max(0, bisect_right(begins, row - 1) - 1)
            begin = str(begins[page]) if page else None
            return RedirectResponse(f"{query(address, after=begin, **filters)}#row-{row}", 303)
        after = query_position(request, "after") or 0
        rows = await kept_rows(database, batch, after=after, limit=ROWS, **chosen)
        counts = await self._services.batches.counts(batch)
        errors = await sheet_rows.error_groups(database, batch.batch_id)
        technique = await techniques.get(database, batch.technique_id)
        ports = technique.outputs if technique else ()
        links = [
            query(address, after=str(begin) if number else None, **filters)
            for number, begin in enumerate(begins)
        ]
        return self._render(
            request,
            "batch.html",
            batch=batch,
            address=address,
            archive=query(f"{address}/outputs.zip", name_by=next(iter(batch.columns or ()), None)),
            counts=counts,
            split=split_of(counts),
            finished_at=counts.finished_at(batch),
            without_run=counts.unstarted - counts.unresolved - counts.doubt,
            errors=errors,
            retryable=sum(group.retryable for group in errors),
            failed_runs=sum(group.count for group in errors if group.advice is not None),
            technique=technique,
            filters=filters,
            rows=[self._view(batch, row, ports) for row in rows],
            pages=_page_links(links, max(0, bisect_right(begins, after) - 1)),
        )

    @page("/batches/{batch_id:any}/outputs.zip")
    async def archive(self, request: Request) -> Response:
        """The outputs as a ZIP, named by the column `name_by` or else by row. Raises `Fault` 429
        while `Limits.archives` are being sent."""
        batch = await self._batch(request)
        name_by = query_field(request, "name_by")
        if name_by is not None:
            naming_column(batch, name_by)
        headers = attachment(f"{PurePath(batch.name).stem or 'outputs'}.zip")
        if request.method == "HEAD":
            return Response(media_type="application/zip", headers=headers)
        if self._archives.locked():
            most = self._limits.archives
            message = f"{most} ZIP files are being downloaded: try again when one has ended."
            raise Fault(429, "too_many_downloads", message, headers={"Retry-After": "30"})
        await self._archives.acquire()
        body = batch_archive(
            self._services.downloader,
            batch.batch_id,
            name_by=name_by,
            allow_private=self._services.settings.flora_is_local,
        )
        return _Archive(body, headers=headers, on_close=self._archives.release)

    @page("/batches/{batch_id:any}/retry", post=TokenScope.START)
    async def retry(self, request: Request) -> Response:
        """`GET` shows what would be started, and its price; `POST` starts it, unless the price has
        risen since."""
        if request.method != "POST":
            batch = await self._batch(request)
            if not may(request.scope, TokenScope.START):
                raise forbidden("This token may not start runs.")
            which = query_field(request, "which", CHOICES) or "failed"
            only_failed = query_field(request, "only_failed") is not None
            return self._confirmation(request, await self._plan(batch, which, only_failed), which)
        form = await read_form(request)
        await check_csrf(request)
        batch = await self._batch(request)
        which = form.get("which", "")
        if which not in CHOICES:
            raise invalid(FieldFault("which", f"must be one of {', '.join(CHOICES)}"))
        plan = await self._plan(batch, which, bool(form.get("only_failed")))
        order = Order(
            started_by=actor_of(request.scope).name,
            ordered_at=self._services.clock(),
            max_cost=_usd(form.get("max_cost", "")),
            at_once=which == "all",
        )
        try:
            await self._services.batch_orders.place(plan, order)
        except (MaxCostReached, BudgetExceeded) as error:
            return self._confirmation(request, plan, which, refusal=str(error))
        return _to_batch(batch)

    @action("/batches/{batch_id:any}/stop", scope=TokenScope.START)
    async def stop(self, request: Request) -> Response:
        batch = await self._batch(request)
        await self._services.batch_orders.stop(batch, by=actor_of(request.scope).name)
        return _to_batch(batch)

    async def _batch(self, request: Request) -> BatchRow:
        return await self._stored(request, batches.get, "Batch {} is not stored here.")

    def _view(self, batch: BatchRow, row: RowState, ports: Any) -> dict[str, Any]:
        """A row as the page shows it: its name is its first carried cell, or what was asked for."""
        cells = [row.entry.carried.get(name, "") for name in batch.columns or ()]
        name, *others = [cell for cell in cells if cell] or [""]
        asked = prompt(row.inputs)
        about = " · ".join(filter(None, [*others, asked if name else ""]))
        # The names of outputs are those of one run.
        views = [view for one in row.records for view in self._views(one.run.outputs, ports)]
        name = name or asked or f"row {row.entry.position}"
        return {"state": row, "name": name, "about": about, "views": views}

    async def _plan(self, batch: BatchRow, which: str, only_failed: bool) -> BatchPlan:
        """What would be started now. Raises `Fault` 503 while FLORA does not tell the price."""
        try:
            async with asyncio.timeout(PRICE_SECONDS):
                return await self._services.batches.stored_plan(
                    batch, retry=CHOICES[which], only_failed=only_failed
                )
        except TimeoutError:
            raise unavailable("FLORA does not answer, so the price is not known.") from None

    def _confirmation(
        self, request: Request, plan: BatchPlan, which: str, *, refusal: str | None = None
    ) -> Response:
        runs = counted(len(plan.missing), "run")
        again = sum(row.is_retry for row in plan.missing)
        price = "" if plan.cost is None else f", up to {money(plan.cost)}"
        return self._render(
            request,
            "retry.html",
            status=200 if refusal is None else 402,
            batch=plan.batch,
            plan=plan,
            which=which,
            max_cost="" if plan.cost is None else str(plan.cost),
            again=again,
            question=f"Start {runs}{' again' if again == len(plan.missing) else ''}{price}",
            to_change=len(plan.to_change) if which == "failed" else 0,
            flash=None if refusal is None else FlashMessage("bad", refusal),
        )


class _Archive(StreamingResponse):
    """Sends a ZIP. A client that takes nothing for `STALL_SECONDS` is cut off."""

    media_type = "application/zip"

    def __init__(
        self,
        body: AsyncGenerator[bytes],
        *,
        headers: Mapping[str, str],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(body, headers=headers)
        self._body, self._on_close = body, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALL_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            self._on_close()
            await self._body.aclose()


def _page_links(links: list[str], here: int) -> list[dict[str, Any] | None]:
    """The first and last page and those near the present one, with `None` for those between; none
    where all rows fit on one."""
    if len(links) < 2:
        return []
    shown = {0, len(links) - 1, *range(max(0, here - NEAR), min(len(links), here + NEAR + 1))}
    found: list[dict[str, Any] | None] = []
    for number in sorted(shown):
        if number and number - 1 not in shown:
            found.append(None)
        found.append({"number": number + 1, "href": links[number], "is_here": number == here})
    return found


def _to_batch(batch: BatchRow) -> Response:
    return RedirectResponse(f"/batches/{quote(batch.batch_id, safe='')}", status_code=303)


def _usd(text: str) -> Decimal | None:
    """The confirmed price; `None` if there was none. Raises `Fault` 400."""
    try:
        return parse_usd(text) if text else None
    except ValueError as error:
        raise invalid(FieldFault("max_cost", str(error))) from error
