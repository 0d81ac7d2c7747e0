"""`/runs`: the runs that match the filters, as a page and as CSV."""

import csv
import io
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tracker.core.errors import FieldFault
from tracker.core.formatting import safe_cell
from tracker.core.inputs import parse_tag
from tracker.core.record import Record
from tracker.core.run import RetryAdvice
from tracker.starting.batch_rows import BOM
from tracker.store.queries import batches, techniques
from tracker.store.queries.search import (
    STATES,
    WINDOW,
    Found,
    Sort,
    Total,
    Wanted,
    count_runs,
    search_runs,
)
from tracker.store.queries.sheet_rows import SheetMatches, search_sheets
from tracker.store.text import dump_json
from tracker.views import run_json
from tracker.web.dashboard.forms import PERIODS, query_choice, query_field
from tracker.web.dashboard.media import output_views
from tracker.web.dashboard.render import PageGroup, page, page_links, query
from tracker.web.http.responses import invalid

PAGE_SIZE: Final = 50
BATCHES: Final = 50
"""The newest batches, which the filter names."""
CSV_COLUMNS: Final = (
    *("run_id", "status", "tracking", "technique_id", "technique_name", "workspace_id"),
    *("project_id", "created_at", "started_at", "completed_at", "charged_cost", "cost_final"),
    *("quoted_cost", "error_code", "error_message", "retry_advice", "tags", "inputs", "outputs"),
)
"""Columns of the API's runs; tags and inputs are JSON, outputs a link or text on each line."""

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
_FILTERS: Final = (
    *("text", "state", "advice", "technique", "batch", "workspace", "project", "tag", "within"),
    *("from", "to", "sort"),
)


class RunListPages(PageGroup):
    """The list of runs, and the same as CSV."""

    @page("/runs")
    async def list(self, request: Request) -> Response:
        database = self._database
        filters = {name: query_field(request, name) for name in _FILTERS}
        cursor = query_field(request, "cursor")
        wanted, matches = await self._wanted(request, filters)
        found = await search_runs(database, wanted, cursor=cursor, limit=PAGE_SIZE)
        catalogue = {row.technique_id: row for row in await techniques.list_all(database)}
        names = {technique_id: row.name for technique_id, row in catalogue.items()}
        newest, _ = await batches.list_batches(database, limit=BATCHES)
        ids = [one.workspace_id for one in self._services.workspaces if one.workspace_id]
        ports = {technique_id: row.outputs for technique_id, row in catalogue.items()}
        unsorted = {name: value for name, value in filters.items() if name != "sort"}
        return self._render(
            request,
            "runs.html",
            filters=filters,
            date_fields={
                name: _local_field(_moment(name, filters[name])) for name in ("from", "to")
            },
            filtered=any(filters.values()) or cursor is not None,
            found=found,
            total=await self._total(wanted, found, first=cursor is None),
            window=WINDOW,
            filtered_by=any(unsorted.values()),
            matches=matches,
            sort=wanted.sort.value,
            sorted_by={one.value: query("/runs", **unsorted, sort=_name(one)) for one in Sort},
            csv=query("/runs.csv", **filters),
            csv_runs=self._limits.csv_runs,
            views={
                one.run.run_id: output_views(
                    one.run.outputs,
                    ports.get(one.run.technique_id or "", ()),
                    media_origin=self._media_origin,
                )
                for one in found.records
            },
            states=STATE_NAMES,
            advices=ADVICE_NAMES,
            sorts=SORT_NAMES,
            periods={value: name for value, (name, _) in PERIODS.items()},
            names=names,
            techniques=_with_chosen(names, filters["technique"]),
            batches=_with_chosen({one.batch_id: one.name for one in newest}, filters["batch"]),
            workspaces=_with_chosen({one: one for one in ids}, filters["workspace"]),
            has_key=self._has_key,
            **page_links(request, found.next_cursor, **filters),
        )

    @page("/runs.csv")
    async def csv(self, request: Request) -> Response:
        """All runs that match the filters, up to `Limits.csv_runs`."""
        filters = {name: query_field(request, name) for name in _FILTERS}
        wanted, _ = await self._wanted(request, filters)
        headers = {"Content-Disposition": 'attachment; filename="runs.csv"'}
        if request.method == "HEAD":
            return Response(media_type="text/csv", headers=headers)
        return StreamingResponse(self._csv_lines(wanted), media_type="text/csv", headers=headers)

    async def _csv_lines(self, wanted: Wanted) -> AsyncIterator[str]:
        yield BOM + _csv([CSV_COLUMNS])
        left, cursor = self._limits.csv_runs, None
        while left > 0:
            limit = min(self._limits.csv_page, left)
            found = await search_runs(self._database, wanted, cursor=cursor, limit=limit)
            yield _csv(map(_cells, found.records))
            left, cursor = left - len(found.records), found.next_cursor
            if cursor is None:
                return

    async def _wanted(
        self, request: Request, filters: Mapping[str, str | None]
    ) -> tuple[Wanted, SheetMatches | None]:
        """What the filters ask for, and what the text finds in batches. Raises `Fault` 400."""
        within = query_choice(request, "within", PERIODS)
        since, until = _moment("from", filters["from"]), _moment("to", filters["to"])
        if since is None and within is not None:
            since = self._services.clock() - PERIODS[within][1]
        wanted = Wanted(
            state=query_choice(request, "state", STATES),
            advice=query_choice(request, "advice", ADVICE_NAMES),
            technique_id=filters["technique"],
            workspace_id=filters["workspace"],
            project_id=filters["project"],
            batch_id=filters["batch"],
            tag=_tag(filters["tag"]),
            since=since,
            until=until,
            text=filters["text"],
            sort=Sort(query_choice(request, "sort", Sort) or Sort.NEWEST),
        )
        if wanted.text is None:
            return wanted, None
        matches = await search_sheets(self._database, wanted.text)
        return replace(wanted, among=matches.run_ids), matches

    async def _total(self, wanted: Wanted, found: Found, *, first: bool) -> Total:
        """How many runs match. Where the first page shows all of them, nothing is counted."""
        if first and found.next_cursor is None:
            return Total(len(found.records), more=False)
        return await count_runs(self._database, wanted)


def _csv(rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(
        [safe_cell(cell) for cell in row] for row in rows
    )
    return lines.getvalue()


def _cells(record: Record) -> list[Any]:
    values = run_json(record)
    values["charged_cost"], values["quoted_cost"] = record.run.charged_cost, record.run.quoted_cost
    values["tags"] = dump_json(record.tags) if record.tags else None
    values["inputs"] = dump_json(record.inputs) if record.inputs else None
    values["outputs"] = "\n".join(output.url for output in record.run.outputs or ())
    return [values[name] for name in CSV_COLUMNS]


def _name(sort: Sort) -> str | None:
    """The order as the address has it; the usual one is left out."""
    return None if sort is Sort.NEWEST else sort.value


def _with_chosen(choices: Mapping[str, str], chosen: str | None) -> dict[str, str]:
    """Choices by value, the chosen one among them."""
    return {**choices} if chosen is None else {**choices, chosen: choices.get(chosen, chosen)}


def _tag(text: str | None) -> str | None:
    """A tag of the form. Raises `Fault` 400."""
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


def _local_field(moment: datetime | None) -> str:
    """A UTC time as a `datetime-local` field holds it."""
    return "" if moment is None else f"{moment:%Y-%m-%dT%H:%M:%S}"
