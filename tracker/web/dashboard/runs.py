"""`/runs`: the list of runs with its filters, and one run with its outputs and "Check now"."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.core.record import Record
from tracker.core.retry import RetryAdvice
from tracker.core.run import Tracking
from tracker.core.tags import parse_tag
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.queries import techniques
from tracker.store.queries.overview import technique_names
from tracker.store.queries.runs import DeliveryRow
from tracker.store.queries.search import STATES, Wanted, search_runs
from tracker.web.dashboard.forms import check_csrf, path_id, query_choice, query_field
from tracker.web.dashboard.media import output_views, plain_http_origin, web_link
from tracker.web.dashboard.render import FlashMessage, PageGroup, page_links
from tracker.web.http.responses import invalid, not_found

PAGE_SIZE: Final = 50
CALLBACKS: Final = 10
"""Callbacks on the page of a run, the newest ones, with their bodies."""
MAX_SHOWN: Final = 300
"""Outputs, inputs and events (the newest ones) on the page of a run."""

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
PERIODS: Final = {
    "1h": ("Last hour", timedelta(hours=1)),
    "24h": ("Last 24 hours", timedelta(hours=24)),
    "7d": ("Last 7 days", timedelta(days=7)),
    "30d": ("Last 30 days", timedelta(days=30)),
}
_FILTERS: Final = (
    *("text", "state", "technique", "workspace", "project", "tag", "advice", "within"),
    *("from", "to"),
)


class RunPages(PageGroup):
    """The list, one run, and its action."""

    def routes(self) -> list[Route]:
        return [
            Route("/runs", self.list, methods=["GET"]),
            Route("/runs/{run_id:any}/check", self.check, methods=["GET", "POST"]),
            Route("/runs/{run_id:any}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of the runs that match the filters, newest first."""
        filters = {name: query_field(request, name) for name in _FILTERS}
        cursor = query_field(request, "cursor")
        within = query_choice(request, "within", PERIODS)
        since, until = _moment("from", filters["from"]), _moment("to", filters["to"])
        fields = {"from": _local_field(since), "to": _local_field(until)}
        if since is None and within is not None:
            since = self._services.clock() - PERIODS[within][1]
        wanted = Wanted(
            state=query_choice(request, "state", STATES),
            advice=query_choice(request, "advice", ADVICE_NAMES),
            technique_id=filters["technique"],
            workspace_id=filters["workspace"],
            project_id=filters["project"],
            tag=_tag(filters["tag"]),
            since=since,
            until=until,
            text=filters["text"],
        )
        found = await search_runs(self._database, wanted, cursor=cursor, limit=PAGE_SIZE)
        names = {row.technique_id: row.name for row in await techniques.list_all(self._database)}
        ids = [one.workspace_id for one in self._services.workspaces if one.workspace_id]
        return self._render(
            request,
            "runs.html",
            filters=filters,
            date_fields=fields,
            filtered=any(filters.values()) or cursor is not None,
            found=found,
            states=STATE_NAMES,
            advices=ADVICE_NAMES,
            periods={value: name for value, (name, _) in PERIODS.items()},
            names=names,
            techniques=_with_chosen(names, filters["technique"]),
            workspaces=_with_chosen({one: one for one in ids}, filters["workspace"]),
            has_key=self._has_key,
            **page_links("/runs", cursor=cursor, next_cursor=found.next_cursor, **filters),
        )

    async def show(self, request: Request) -> Response:
        """One run."""
        return await self._page(request, await self._record(request))

    async def check(self, request: Request) -> Response:
        """Polls the run now and shows it."""
        if request.method == "GET":  # the page after an action was reloaded
            run_id = quote(request.path_params["run_id"], safe="")
            return RedirectResponse(f"/runs/{run_id}", status_code=303)
        await check_csrf(request)
        before = await self._record(request)
        reason = self._cannot_check(before)
        if reason is not None:  # the button of an older page
            flash = FlashMessage("good" if before.run.settled else "bad", reason)
            return await self._page(request, before, flash=flash)
        after = await self._services.poller.read_now(before)
        return await self._page(request, after, flash=_check_result(before, after))

    async def _page(
        self, request: Request, record: Record, *, flash: FlashMessage | None = None
    ) -> Response:
        database, run = self._database, record.run
        explanation = await self._services.explainer.explain(run.run_id)
        events = await read.events(database, run.run_id)
        outputs = run.outputs or ()
        media_origin = plain_http_origin(self._services.settings.flora_base_url)
        return self._render(
            request,
            "run.html",
            record=record,
            names=await technique_names(database, [run.technique_id] if run.technique_id else []),
            flash=flash,
            cannot_check=self._cannot_check(record),
            outputs=output_views(outputs[:MAX_SHOWN], media_origin=media_origin),
            inputs=[_input(one) for one in (record.inputs or ())[:MAX_SHOWN]],
            events=events[-MAX_SHOWN:],
            truncated=max(len(events), len(outputs)) > MAX_SHOWN,
            deliveries=await _callbacks(database, run.run_id),
            sentences=explanation.sentences[-MAX_SHOWN:] if explanation else (),
        )

    async def _record(self, request: Request) -> Record:
        run_id, usable = path_id(request, "run_id")
        record = await read.get_run(self._database, run_id) if usable else None
        if record is None:
            raise not_found(
                f"Run {run_id} is not tracked here. If it was started elsewhere, track it with the "
                "command tracker runs track."
            )
        return record

    def _cannot_check(self, record: Record) -> str | None:
        """Why the run cannot be polled now; `None` where it can."""
        if record.tracking is Tracking.SETTLED:
            return "Final" if record.recheck_at is None else "Settled; the bill is checked again."
        workspace = self._services.workspaces.of(record.run.workspace_id)
        if workspace is None or workspace.client is None:
            return "No FLORA API key is set for this workspace."
        return None


async def _callbacks(database: Database, run_id: str) -> list[DeliveryRow]:
    rows, _ = await read.list_deliveries(database, run_id=run_id, limit=CALLBACKS)
    with_body = [await read.get_delivery(database, row.delivery_id) for row in rows]
    return [row for row in with_body if row is not None]


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
