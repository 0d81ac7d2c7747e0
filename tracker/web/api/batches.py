"""The operations on batches, and their responses: create from JSON rows, show, retry, stop, results
as CSV."""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from itertools import islice
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tracker.core.errors import BudgetExceeded, DefinitionChanged, FieldFault, MaxCostReached
from tracker.core.formatting import counted
from tracker.core.run import RetryAdvice
from tracker.services import Services
from tracker.settings.tokens import Scope
from tracker.starting.plan import ColumnMapping
from tracker.starting.rows import BatchPlan, Order, Retry, csv_lines, kept_rows
from tracker.starting.sheet import SheetProblem, SheetRefused, sheet_of_objects
from tracker.store.engine import Database
from tracker.store.queries import batches, sheet_rows
from tracker.store.queries.batches import BatchRow
from tracker.views import batch_json, error_group_json, plan_json, row_json
from tracker.web.api import Answer, Operation, page_json, page_of
from tracker.web.api.requests import (
    BatchBody,
    OrderBody,
    PageQuery,
    ResultsQuery,
    RetryBody,
    RowsQuery,
)
from tracker.web.api.responses import ResponseModel, RunInput
from tracker.web.auth import actor_of
from tracker.web.http.responses import Fault, Json, invalid, not_found

MOST_CAUSES: Final = 100
"""Causes of refused rows in one response."""
_ORDER_ERRORS: Final = (402, 404, 422, 502, 504)
_BATCH: Final[dict[str, Any]] = {
    "batch_id": "bat_0123456789abcdef",
    "workspace_id": "ws_abc123",
    "technique_id": "tech_icon-pack",
    "name": "Spring icons",
    "source": "api",
    "created_at": "2026-06-11T12:00:00.123000Z",
    "finished_at": None,
    "launching": True,
    "stopped": None,
    "columns": ["sku"],
    "rows": 2,
    "started": 1,
    "completed": 0,
    "failed": 0,
    "active": 1,
    "lost": 0,
    "refused": 0,
    "unresolved": 0,
    "in_doubt": 0,
    "cost": 0,
    "cost_final": False,
    "quoted": 0.25,
}


class BatchResponse(ResponseModel):
    """A batch, with the number of its rows in each state. Times are UTC, costs USD."""

    model_config = ConfigDict(json_schema_extra={"examples": [_BATCH]})

    batch_id: str
    workspace_id: str
    technique_id: str
    name: str
    source: Literal["cli", "api", "page", "python"] | None = Field(
        description="`cli`: `tracker batch`."
    )
    created_at: datetime
    finished_at: datetime | None = Field(description="When all of its runs had ended.")
    launching: bool = Field(description="A worker starts rows, or is about to.")
    stopped: str | None = Field(
        description="Why the last launch ended early, or what it waits for."
    )
    columns: list[str] = Field(description="The fields that are carried into the results.")
    rows: int = Field(ge=0)
    started: int = Field(
        ge=0, description="Rows with a run: the sum of completed, failed, active and lost."
    )
    completed: int = Field(ge=0)
    failed: int = Field(ge=0)
    active: int = Field(ge=0)
    lost: int = Field(ge=0)
    refused: int = Field(ge=0, description="Starts that FLORA refused.")
    unresolved: int = Field(ge=0, description="Starts that a person has to resolve.")
    in_doubt: int = Field(ge=0, description="Starts that were sent and not answered.")
    cost: float = Field(ge=0, description="Billed so far.")
    cost_final: bool = Field(description="No bill may change any more.")
    quoted: float = Field(ge=0, description="Quotes of runs without a bill.")


class ErrorGroupResponse(ResponseModel):
    """Rows that failed for the same reason."""

    code: str = Field(description="FLORA's code, or `lost`, `unresolved` or `not_started`.")
    message: str | None = Field(description="An example.")
    retry_advice: RetryAdvice | None
    count: int = Field(ge=1)
    retryable: int = Field(ge=0, description="Rows that a retry of `failed` starts again.")


class ShownBatch(BatchResponse):
    """A batch with its errors."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**_BATCH, "errors": []}]})

    errors: list[ErrorGroupResponse]


class BatchPrice(ResponseModel):
    """The result of a dry run."""

    batch_id: str
    rows: int = Field(ge=0)
    to_start: int = Field(ge=0, description="Rows without a run.")
    run_cost: float | None = Field(ge=0, description="FLORA's price for one run, in USD.")
    cost: float | None = Field(ge=0, description="The most that starting them can cost, in USD.")
    refusal: str | None = Field(
        description="Why the request would be refused: the maximum cost or a budget."
    )


class PlacedBatch(RootModel[BatchResponse | BatchPrice]):
    """The batch, or the result of a dry run."""


class BatchOutput(ResponseModel):
    """One output of a row."""

    output_id: str
    type: str
    url: str


class RowResponse(ResponseModel):
    """One row of a batch. Costs are USD."""

    row: int = Field(ge=1)
    line: int = Field(ge=1, description="Its first line in the sheet.")
    key: str = Field(description="The idempotency key of its start.")
    run_id: str | None = Field(description="Its first run.")
    run_ids: list[str] = Field(
        description="All its known runs, the first first: one for each value of an input."
    )
    status: str = Field(
        description="FLORA's status of its runs: of one in progress while there is one, "
        "`completed` once all have; `not_started`, `sending`, `in_doubt`, `refused` or "
        "`unresolved` before there is one; `lost` or `forgotten` if there is none any more."
    )
    cost: float | None = Field(
        ge=0, description="The sum of the bills of its runs, once each is known."
    )
    cost_final: bool = Field(description="No bill may change any more, and no run is missing.")
    quoted_cost: float | None = Field(ge=0)
    retry_advice: RetryAdvice | None
    error: str | None
    inputs: list[RunInput] | None
    tags: dict[str, str]
    carried: dict[str, str] = Field(description="The fields that are no input.")
    outputs: list[BatchOutput]


class BatchOperations:
    """The part of the API about batches."""

    _services: Services
    _database: Database

    @Operation(
        "GET /api/batches", page_of("batches", BatchResponse, "A page of batches, newest first.")
    )
    async def list_batches(self, request: Request, query: PageQuery) -> Response:
        """List batches, newest first."""
        rows, cursor = await batches.list_batches(self._database, **dict(query))
        counts = await batches.batch_counts(self._database, [one.batch_id for one in rows])
        shown = (batch_json(one, counts[one.batch_id]) for one in rows)
        return page_json("batches", shown, cursor)

    @Operation(
        "POST /api/batches",
        {
            201: Answer("The batch, whose rows are being started.", PlacedBatch),
            200: Answer("The batch of the same rows, or the result of a dry run.", PlacedBatch),
        },
        _ORDER_ERRORS,
        scope=Scope.START,
        most="batch_bytes",
    )
    async def create_batch(self, request: Request, body: BatchBody) -> Response:
        """Start a run for each row, once each.

        The rows are checked against the technique's definition, and their price against `max_cost`
        and the budgets, before anything is started. They are stored before the response; a process
        with a worker starts them. The same rows again are the same batch: none is started twice. At
        most 10,000 rows, 1,000 different fields and 8 MiB.
        """
        order = self._order(request, body, at_once=body.retry == "all")
        # The lines of this sheet are the numbers of the rows.
        sheet = await asyncio.to_thread(sheet_of_objects, enumerate(body.rows, start=1))
        try:
            plan, _ = await self._services.batches.plan(
                body.technique,
                sheet,
                name=body.name or counted(len(body.rows), "row"),
                explicit=[ColumnMapping(*one) for one in body.columns.items()],
                workspace_id=body.workspace_id,
                retry=None if body.retry is None else Retry(body.retry),
                accept_changes=body.accept_changes,
                tags=body.tags,
                tag_columns=body.tag_columns,
                source="api",
            )
        except SheetRefused as refused:
            raise _refused(refused.problems) from refused
        except DefinitionChanged as changed:
            message = str(changed).replace("--accept-changes", "`accept_changes`")
            raise Fault(422, "definition_changed", message) from changed
        return await self._place(plan, order, dry_run=body.dry_run)

    @Operation("GET /api/batches/{batch_id}", Answer("The batch.", ShownBatch))
    async def show_batch(self, request: Request, batch_id: str) -> Response:
        """Show a batch with the reasons of its failed rows."""
        batch = await self._batch(batch_id)
        groups = await sheet_rows.error_groups(self._database, batch_id)
        shown = await self._shown(batch)
        return Json(shown | {"errors": [error_group_json(one) for one in groups]})

    @Operation(
        "GET /api/batches/{batch_id}/rows",
        page_of("rows", RowResponse, "A page of rows, in their order."),
    )
    async def list_rows(self, request: Request, batch_id: str, query: RowsQuery) -> Response:
        """List the rows of a batch with their runs, in order."""
        batch = await self._batch(batch_id)
        found = await kept_rows(
            self._database,
            batch,
            after=_position(query.cursor),
            limit=query.limit + 1,
            outcome=query.outcome,
            code=query.code,
        )
        page = found[: query.limit]
        cursor = str(page[-1].entry.position) if len(found) > len(page) else None
        return page_json("rows", map(row_json, page), cursor)

    @Operation(
        "GET /api/batches/{batch_id}/results.csv",
        Answer("The results, a line for each row.", content_type="text/csv"),
    )
    async def show_results(self, request: Request, batch_id: str, query: ResultsQuery) -> Response:
        """Show the results of a batch as CSV.

        The same table as that of `tracker batch`: carried fields, run, status, cost, error, inputs
        and outputs.
        """
        batch = await self._batch(batch_id)
        rows = await self._services.batches.rows(batch)
        lines = csv_lines(rows, batch.columns or (), bom=query.bom)
        headers = {"Content-Disposition": f'attachment; filename="{batch_id}.csv"'}
        return StreamingResponse(_pieces(lines), media_type="text/csv", headers=headers)

    @Operation(
        "POST /api/batches/{batch_id}/retry",
        Answer("The batch, or the result of a dry run.", PlacedBatch),
        _ORDER_ERRORS,
        scope=Scope.START,
    )
    async def retry_batch(self, request: Request, batch_id: str, body: RetryBody) -> Response:
        """Start rows of a batch that have no run, or whose run failed.

        A retry is a new run and is charged. The batch may be one of `tracker batch`; its rows are
        started by a worker all the same.
        """
        retry = None if body.which == "unstarted" else Retry(body.which)
        if body.only_failed and retry is None:
            raise invalid(FieldFault("only_failed", "leaves out all that `unstarted` starts"))
        order = self._order(request, body, at_once=retry is Retry.ALL)
        plan = await self._services.batches.stored_plan(
            await self._batch(batch_id), retry=retry, only_failed=body.only_failed
        )
        return await self._place(plan, order, dry_run=body.dry_run)

    @Operation(
        "POST /api/batches/{batch_id}/stop",
        Answer("The batch.", PlacedBatch),
        scope=Scope.START,
    )
    async def stop_batch(self, request: Request, batch_id: str) -> Response:
        """Start no further row of a batch.

        Runs that are started go on. A batch that `tracker batch` launches is stopped by
        interrupting that command.
        """
        batch = await self._batch(batch_id)
        await self._services.batch_orders.stop(batch, by=actor_of(request.scope).name)
        return Json(await self._shown(await self._batch(batch_id)))

    def _order(self, request: Request, body: OrderBody, *, at_once: bool) -> Order:
        return Order(
            started_by=actor_of(request.scope).name,
            ordered_at=self._services.clock(),
            # Exactly as it was written.
            max_cost=None if body.max_cost is None else Decimal(repr(body.max_cost)),
            wait_for_budget=body.wait_for_budget,
            at_once=at_once,
        )

    async def _place(self, plan: BatchPlan, order: Order, *, dry_run: bool) -> Response:
        orders = self._services.batch_orders
        if dry_run:
            refusal: str | None = None
            try:
                await orders.check(plan, order)
            except (MaxCostReached, BudgetExceeded) as error:
                refusal = str(error)
            return Json(plan_json(plan) | {"refusal": refusal})
        try:
            placed = await orders.place(plan, order)
        except MaxCostReached as error:
            raise Fault(402, "max_cost_exceeded", str(error)) from error
        return Json(
            await self._shown(placed.batch),
            status_code=200 if placed.known else 201,
            headers={} if placed.ordered and plan.missing else {"Idempotent-Replayed": "true"},
        )

    async def _batch(self, batch_id: str) -> BatchRow:
        batch = await batches.get(self._database, batch_id)
        if batch is None:
            raise not_found(f"No batch {batch_id[:255]} is stored here.")
        return batch

    async def _shown(self, batch: BatchRow) -> dict[str, Any]:
        return batch_json(batch, await self._services.batches.counts(batch))


def _refused(problems: Sequence[SheetProblem]) -> Fault:
    """422 with an entry for each cause, and the rows that it concerns."""
    causes: dict[tuple[str, str], list[int]] = {}
    for one in problems:
        rows = causes.setdefault((one.column or "rows", one.of_fields), [])
        if one.line:
            rows.append(one.line)
    fields = [
        {"field": field, "message": message, "rows": rows}
        for (field, message), rows in causes.items()
    ]
    bad = len({one.line for one in problems if one.line})
    where = f"{counted(bad, 'row')} cannot be started" if bad else "the rows cannot be started"
    more = f"; the first {MOST_CAUSES} causes are listed" if len(fields) > MOST_CAUSES else ""
    return Fault(
        422,
        "invalid_rows",
        f"{where}, so nothing was started{more}",
        more={"fields": fields[:MOST_CAUSES]},
    )


def _position(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not (cursor.isdecimal() and cursor.isascii() and len(cursor) < 10):
        raise invalid(FieldFault("cursor", "is not one that this API returned"))
    return int(cursor)


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """The lines, many at a time."""
    while piece := "".join(islice(lines, 500)):
        yield piece
