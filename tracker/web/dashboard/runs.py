"""`/runs`: the runs that match the filters, as a page and as CSV; and one run with its outputs and
timeline, "Check now", and starting it again."""

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from tracker.core.errors import FieldFault
from tracker.core.formatting import csv_text, money
from tracker.core.record import Record
from tracker.core.run import RetryAdvice, Tracking
from tracker.core.starts import parse_tag
from tracker.flora.parse import cost_of
from tracker.settings.tokens import Scope
from tracker.starting.rows import BOM
from tracker.starting.start import StartRequest
from tracker.store.engine import dump_json
from tracker.store.queries import batches, starts, techniques
from tracker.store.queries import runs as read
from tracker.store.queries.search import (
    STATES,
    WINDOW,
    FoundRuns,
    RunTotal,
    SearchFilters,
    Sort,
    count_runs,
    search_runs,
)
from tracker.store.queries.sheet_rows import RowOfBatch, SheetMatches, rows_of_start, search_sheets
from tracker.store.queries.starts import StartRow
from tracker.store.queries.techniques import technique_names
from tracker.views import run_json, web_link
from tracker.web.auth import actor_of, start_logged
from tracker.web.dashboard import (
    PAGE_SIZE,
    PERIOD_NAMES,
    PERIODS,
    FlashMessage,
    PageGroup,
    action,
    attachment,
    page,
    query_field,
    read_filters,
    read_form,
)
from tracker.web.dashboard.render import query
from tracker.web.http.responses import invalid

BATCHES: Final = 50
"""The newest batches, which the filter names."""
CSV_COLUMNS: Final = (
    *("run_id", "status", "tracking", "technique_id", "technique_name", "workspace_id"),
    *("project_id", "created_at", "started_at", "completed_at", "charged_cost", "cost_final"),
    *("quoted_cost", "error_code", "error_message", "retry_advice", "tags", "inputs", "outputs"),
)
"""Columns of the API's runs; tags and inputs are JSON, outputs a link or text on each line."""
MAX_SHOWN: Final = 300
"""Outputs, inputs and sentences (the newest ones) on the page of a run."""
_PASSING: Final = (RetryAdvice.RETRY_NOW, RetryAdvice.RETRY_LATER)

STATE_NAMES: Final = {
    "open": "In progress",
    "pending": "Pending",
    "running": "Running",
    "details": "Finished, fetching results",
    "completed": "Completed",
    "failed": "Failed",
    "other": "Unknown status",
    "lost": "Not found at FLORA",
    "conflict": "Callback and API disagree",
}
ADVICE_NAMES: Final[Mapping[str, str]] = {
    RetryAdvice.RETRY_NOW: "Retry now",
    RetryAdvice.RETRY_LATER: "Retry later",
    RetryAdvice.CHANGE_INPUT: "Change the input",
    RetryAdvice.NOT_RETRYABLE: "Do not retry",
}
SORT_NAMES: Final = {Sort.COST.value: "Cost", Sort.DURATION.value: "Duration"}
_FILTERS: Final[Mapping[str, Iterable[str] | None]] = {
    "text": None,
    "state": STATES,
    "advice": ADVICE_NAMES,
    **dict.fromkeys(("technique", "batch", "workspace", "project", "tag")),
    "within": PERIODS,
    **dict.fromkeys(("from", "to")),
    "sort": Sort,
}


class RetryOffer(NamedTuple):
    """What a failed run offers: its start once more, under `key`, at `cost` USD for all its runs;
    or the run that was started again before."""

    key: str
    cost: Decimal | None
    run_id: str | None

    @property
    def question(self) -> str:
        """What the button does."""
        return f"Start again{'' if self.cost is None else f', up to {money(self.cost)}'}"


class RunPages(PageGroup):
    """The list of runs, and the same as CSV; one run, and its actions."""

    @page("/runs")
    async def list_runs(self, request: Request) -> Response:
        database = self._database
        filters = await self._filters(request)
        cursor = query_field(request, "cursor")
        wanted, matches = await self._wanted(filters)
        found = await search_runs(database, wanted, cursor=cursor, limit=PAGE_SIZE)
        catalogue = {row.technique_id: row for row in await techniques.list_all(database)}
        names = {technique_id: row.name for technique_id, row in catalogue.items()}
        workspaces = {one: one for one in self._workspace_ids}
        newest, _ = await batches.list_batches(database, limit=BATCHES)
        ports = {technique_id: row.outputs for technique_id, row in catalogue.items()}
        unsorted = {name: value for name, value in filters.items() if name != "sort"}
        return self._list(
            request,
            "runs.html",
            found.next_cursor,
            filters,
            date_fields={  # as a `datetime-local` field holds them
                name: f"{at:%Y-%m-%dT%H:%M:%S}" if (at := _moment(name, filters[name])) else ""
                for name in ("from", "to")
            },
            filtered=any(filters.values()) or cursor is not None,
            found=found,
            total=await self._total(wanted, found, first=cursor is None),
            window=WINDOW,
            filtered_by=any(unsorted.values()),
            matches=matches,
            sort=wanted.sort.value,
            sorted_by={
                one.value: query("/runs", **unsorted, sort=one.value if one in SORT_NAMES else None)
                for one in Sort
            },
            csv=query("/runs.csv", **filters),
            csv_runs=self._limits.csv_runs,
            views={
                one.run.run_id: self._views(
                    one.run.outputs, ports.get(one.run.technique_id or "", ())
                )
                for one in found.records
            },
            states=STATE_NAMES,
            advices=ADVICE_NAMES,
            sorts=SORT_NAMES,
            periods=PERIOD_NAMES,
            names=names,
            techniques=_with_chosen(names, filters["technique"]),
            batches=_with_chosen({one.batch_id: one.name for one in newest}, filters["batch"]),
            workspaces=_with_chosen(workspaces, filters["workspace"]),
            has_key=self._has_key,
        )

    @page("/runs.csv")
    async def csv(self, request: Request) -> Response:
        """All runs that match the filters, up to `Limits.csv_runs`."""
        filters = await self._filters(request)
        wanted, _ = await self._wanted(filters)
        headers = attachment("runs.csv")
        if request.method == "HEAD":
            return Response(media_type="text/csv", headers=headers)
        return StreamingResponse(self._csv_lines(wanted), media_type="text/csv", headers=headers)

    @page("/runs/{run_id:any}")
    async def show(self, request: Request, flash: FlashMessage | None = None) -> Response:
        database, record = self._database, await self._record(request)
        run = record.run
        explanation = await self._services.explainer.explain(run.run_id)
        outputs = run.outputs or ()
        technique = run.technique_id and await techniques.get(database, run.technique_id)
        start = await starts.of_run(database, run.run_id)
        rows = await self._rows(start)
        sentences = explanation.sentences if explanation else ()
        return self._render(
            request,
            "run.html",
            record=record,
            names=await technique_names(database, [run.technique_id] if run.technique_id else []),
            flash=flash,
            can_check=record.tracking is not Tracking.SETTLED and self._can_poll(record),
            views=self._views(outputs, technique.outputs if technique else ())[:MAX_SHOWN],
            inputs=[_input(one) for one in (record.inputs or ())[:MAX_SHOWN]],
            rows=rows,
            start=start,
            of_start=await self._of_start(start),
            again=await self._again(record, start, rows),
            sentences=sentences[-MAX_SHOWN:],
            truncated=max(len(sentences), len(outputs)) > MAX_SHOWN,
        )

    @action("/runs/{run_id:any}/check", show, scope=Scope.START)
    async def check(self, request: Request) -> FlashMessage:
        before = await self._record(request)
        if before.tracking is Tracking.SETTLED:  # the button of an older page
            final = "Final" if before.recheck_at is None else "Settled; the bill is checked again."
            return FlashMessage("good", final)
        if not self._can_poll(before):
            return FlashMessage("bad", "No FLORA API key is set for this workspace.")
        return _check_result(before, await self._services.poller.read_now(before))

    @action("/runs/{run_id:any}/retry", show, scope=Scope.START)
    async def retry(self, request: Request) -> Response | FlashMessage:
        """Starts the same inputs again, once for each run, and shows the new run."""
        form = await read_form(request)
        record = await self._record(request)
        before = await starts.of_run(self._database, record.run.run_id)
        again = await self._again(record, before, await self._rows(before))
        if again is None:
            return FlashMessage("bad", "This run cannot be started again here.")
        if again.run_id is not None:
            return _to_run(again.run_id)
        if form.get("cost", "") != ("" if again.cost is None else str(again.cost)):
            return FlashMessage("warn", "The price has changed. Nothing was started.")
        run = record.run
        start = StartRequest(
            technique=run.technique_id or "",
            inputs=record.inputs or [],
            workspace_id=run.workspace_id,
            idempotency_key=again.key,
            started_by=actor_of(request.scope).name,
            tags=record.tags,
        )
        started = await start_logged(self._services.starter, request.scope, start)
        return _to_run(started.record.run.run_id)

    async def _csv_lines(self, wanted: SearchFilters) -> AsyncIterator[str]:
        yield BOM + csv_text([CSV_COLUMNS])
        left, cursor = self._limits.csv_runs, None
        while left > 0:
            limit = min(self._limits.csv_page, left)
            found = await search_runs(self._database, wanted, cursor=cursor, limit=limit)
            yield csv_text(map(_cells, found.records))
            left, cursor = left - len(found.records), found.next_cursor
            if cursor is None:
                return

    async def _filters(self, request: Request) -> dict[str, str | None]:
        filters = read_filters(request, _FILTERS)
        return filters | {"technique": await techniques.id_of(self._database, filters["technique"])}

    async def _wanted(
        self, filters: Mapping[str, str | None]
    ) -> tuple[SearchFilters, SheetMatches | None]:
        """What the filters ask for, and what the text finds in batches. Raises `Fault` 400."""
        since, until = _moment("from", filters["from"]), _moment("to", filters["to"])
        if since is None and filters["within"]:
            since = self._services.clock() - PERIODS[filters["within"]]
        wanted = SearchFilters(
            state=filters["state"],
            advice=filters["advice"],
            technique_id=filters["technique"],
            workspace_id=filters["workspace"],
            project_id=filters["project"],
            batch_id=filters["batch"],
            tag=_tag(filters["tag"]),
            since=since,
            until=until,
            text=filters["text"],
            sort=Sort(filters["sort"] or Sort.NEWEST),
        )
        if wanted.text is None:
            return wanted, None
        matches = await search_sheets(self._database, wanted.text)
        return replace(wanted, among=matches.run_ids), matches

    async def _total(self, wanted: SearchFilters, found: FoundRuns, *, first: bool) -> RunTotal:
        """How many runs match. Where the first page shows all of them, nothing is counted."""
        if first and found.next_cursor is None:
            return RunTotal(len(found.records), more=False)
        return await count_runs(self._database, wanted)

    async def _record(self, request: Request) -> Record:
        return await self._stored(
            request,
            read.get_run,
            "Run {} is not tracked here. If it was started elsewhere, track it with the command "
            "tracker runs track.",
        )

    async def _rows(self, start: StartRow | None) -> list[RowOfBatch]:
        return [] if start is None else await rows_of_start(self._database, start)

    async def _of_start(self, start: StartRow | None) -> list[str]:
        """The runs of a start that has several."""
        if start is None or (start.run_count or 1) == 1:
            return []
        runs = await starts.runs_of(self._database, [start])
        return [one.run.run_id for one in runs[start.idempotency_key]]

    async def _again(
        self, record: Record, start: StartRow | None, rows: list[RowOfBatch]
    ) -> RetryOffer | None:
        """Whether the run can be started again here. A batch starts its rows again itself."""
        run = record.run
        if rows or not record.inputs or run.technique_id is None or run.workspace_id is None:
            return None
        if run.retry_advice not in _PASSING or not self._can_poll(record):
            return None
        key = _retry_key(run.run_id if start is None else start.run_id or run.run_id)
        before = (await starts.of_keys(self._database, run.workspace_id, [key])).get(key)
        row = await techniques.get(self._database, run.technique_id)
        cost = None if row is None else cost_of(row, record.inputs)
        return RetryOffer(key, cost, None if before is None else before.run_id)

    def _can_poll(self, record: Record) -> bool:
        workspace = self._services.workspaces.reader_of(record.run.workspace_id)
        return workspace is not None and workspace.client is not None


def _cells(record: Record) -> list[Any]:
    values = run_json(record)
    values["charged_cost"], values["quoted_cost"] = record.run.charged_cost, record.run.quoted_cost
    values["tags"] = dump_json(record.tags) if record.tags else None
    values["inputs"] = dump_json(record.inputs) if record.inputs else None
    values["outputs"] = "\n".join(output.url for output in record.run.outputs or ())
    return [values[name] for name in CSV_COLUMNS]


def _with_chosen(choices: Mapping[str, str], chosen: str | None) -> dict[str, str]:
    """Choices by value, the chosen one among them."""
    return {**choices} if chosen is None else {**choices, chosen: choices.get(chosen, chosen)}


def _tag(text: str | None) -> str | None:
    try:
        return None if text is None else "=".join(parse_tag(text))
    except ValueError as error:
        raise invalid(FieldFault("tag", str(error))) from None


def _moment(name: str, text: str | None) -> datetime | None:
    """A time of the form; without a zone it is UTC. Raises `Fault` 400."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise invalid(FieldFault(name, "must be a time such as 2026-06-01T12:00")) from None


def _to_run(run_id: str) -> Response:
    return RedirectResponse(f"/runs/{quote(run_id, safe='')}", status_code=303)


def _retry_key(run_id: str) -> str:
    """The idempotency key of starting a run again: by the first run of its start, so that this is
    started again once, however often the button is pressed, and on the page of whichever run."""
    return f"retry-{hashlib.sha256(run_id.encode()).hexdigest()[:32]}"


def _check_result(before: Record, after: Record) -> FlashMessage:
    run = after.run
    if after.last_error is not None and after.checks >= before.checks and not run.settled:
        return FlashMessage("bad", f"The check failed: {after.last_error}")
    if run.settled:
        return FlashMessage("good", f"FLORA reports {run.status}. All details are fetched.")
    if run == before.run:
        return FlashMessage("good", f"No change: FLORA reports {run.status}.")
    return FlashMessage("good", f"FLORA reports {run.status}, at {run.progress:g} %.")


def _input(values: dict[str, Any]) -> dict[str, Any]:
    value = str(values.get("value", ""))
    return {
        "id": str(values.get("id", "")),
        "type": str(values.get("type", "")),
        "value": value,
        "link": web_link(value) if values.get("type") != "text" else None,
    }
