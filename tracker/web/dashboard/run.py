"""`/runs/{run_id}`: everything that is known of one run, and a look at FLORA's word for it now."""

from typing import Any, Final, Literal
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tracker.core.record import Record
from tracker.core.run import Tracking
from tracker.services import Services
from tracker.store.queries import runs as read
from tracker.store.queries.overview import technique_names
from tracker.store.queries.runs import DeliveryRow
from tracker.web.dashboard.forms import check_action
from tracker.web.dashboard.outputs import Gallery, web_link
from tracker.web.dashboard.paths import ANY
from tracker.web.dashboard.render import Renderer
from tracker.web.dashboard.said import Said
from tracker.web.http.errors import not_found

CALLBACKS: Final = 10
"""So many callbacks of a run are shown with their bodies, the newest ones."""
MOST: Final = 300
"""So many outputs, inputs, and events, the newest ones, are on the page."""


class RunPage:
    """The page, and its one action."""

    def __init__(self, services: Services, render: Renderer, gallery: Gallery) -> None:
        self._services = services
        self._render = render
        self._gallery = gallery

    def routes(self) -> list[Route]:
        """Both routes; an id may hold any character, slashes too."""
        return [
            Route(f"/runs/{{run_id:{ANY}}}/check", self.check, methods=["GET", "POST"]),
            Route(f"/runs/{{run_id:{ANY}}}", self.show, methods=["GET"]),
        ]

    async def show(self, request: Request) -> Response:
        """The run as it is known."""
        return await self._page(request, await self._record(request))

    async def check(self, request: Request) -> Response:
        """Reads the run from FLORA now; then the run as it is known."""
        if request.method == "GET":  # the page after an action, loaded again
            run_id = quote(request.path_params["run_id"], safe="")
            return RedirectResponse(f"/runs/{run_id}", status_code=303)
        await check_action(request)
        before = await self._record(request)
        why_not = self._why_not(before)
        if why_not is not None:  # the button of a page from before that
            kind: Literal["good", "bad"] = "good" if before.run.settled else "bad"
            return await self._page(request, before, said=Said(kind, why_not))
        after = await self._services.poller.read_now(before)
        return await self._page(request, after, said=_told(before, after))

    async def _page(
        self, request: Request, record: Record, *, said: Said | None = None
    ) -> Response:
        database, run = self._services.database, record.run
        explanation = await self._services.explainer.explain(run.run_id)
        why_not = self._why_not(record)
        events = await read.events(database, run.run_id)
        names = await technique_names(database, [run.technique_id] if run.technique_id else [])
        return self._render.page(
            request,
            "run.html",
            record=record,
            names=names,
            said=said,
            checkable=why_not is None,
            why_not=why_not,
            outputs=self._gallery.shown((run.outputs or ())[:MOST]),
            inputs=[_input(one) for one in (record.inputs or ())[:MOST]],
            events=events[-MOST:],
            hidden=max(0, len(events) - MOST, len(run.outputs or ()) - MOST),
            deliveries=await self._callbacks(run.run_id),
            story=explanation.sentences[-MOST:] if explanation else (),
        )

    async def _record(self, request: Request) -> Record:
        run_id = request.path_params["run_id"]
        if "\0" not in run_id and len(run_id) <= 255:
            record = await read.get_run(self._services.database, run_id)
            if record is not None:
                return record
        raise not_found(
            f"No run {run_id[:255]} is tracked here. If it was started elsewhere, "
            "`tracker runs track` tracks it."
        )

    def _why_not(self, record: Record) -> str | None:
        """Why it cannot be read now; `None` where it can."""
        if record.tracking is Tracking.SETTLED:
            return "Its end and its details have been read; they do not change any more."
        workspace = self._services.workspaces.of(record.run.workspace_id)
        if workspace is None or workspace.client is None:
            return "No FLORA key is set for its workspace."
        return None

    async def _callbacks(self, run_id: str) -> list[DeliveryRow]:
        database = self._services.database
        rows, _ = await read.list_deliveries(database, run_id=run_id, limit=CALLBACKS)
        whole = [await read.get_delivery(database, row.delivery_id) for row in rows]
        return [row for row in whole if row is not None]


def _told(before: Record, after: Record) -> Said:
    """What the look has brought."""
    run = after.run
    if after.last_error is not None and after.checks >= before.checks and not run.settled:
        return Said("bad", f"FLORA could not tell: {after.last_error}")
    if run.settled:
        return Said("good", f"FLORA says that it has {run.status}; its details are read.")
    if run == before.run:
        return Said("good", f"Nothing new: FLORA says that it is {run.status}.")
    return Said("good", f"FLORA says that it is {run.status}, at {run.progress:g} %.")


def _input(given: dict[str, Any]) -> dict[str, Any]:
    value = str(given.get("value", ""))
    return {
        "id": str(given.get("id", "")),
        "type": str(given.get("type", "")),
        "value": value,
        "link": web_link(value) if given.get("type") != "text" else None,
    }
