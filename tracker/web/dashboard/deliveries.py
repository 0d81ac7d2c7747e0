"""`/deliveries`: the callbacks as they came, and another try for those that were not understood."""

from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.core.record import DeliveryOutcome
from tracker.receiving.replay import Replay
from tracker.services import Services
from tracker.store.queries import runs as read
from tracker.store.queries.runs import DeliveryRow
from tracker.web.dashboard.forms import check_action, given
from tracker.web.dashboard.paths import ANY
from tracker.web.dashboard.render import Renderer, query
from tracker.web.dashboard.said import Said
from tracker.web.http.errors import Fault, invalid, not_found

PAGE: Final = 50


class DeliveriesPage:
    """The list, one delivery, and its one action."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """All three; an id may hold any character, slashes too."""
        return [
            Route("/deliveries", self.list, methods=["GET"]),
            Route(
                f"/deliveries/{{delivery_id:{ANY}}}/replay", self.replay, methods=["GET", "POST"]
            ),
            Route(f"/deliveries/{{delivery_id:{ANY}}}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of deliveries."""
        outcome, run_id = given(request, "outcome"), given(request, "run")
        if outcome is not None and outcome not in list(DeliveryOutcome):
            raise invalid(FieldFault("outcome", "must be waiting, applied or quarantined"))
        cursor = given(request, "cursor")
        rows, next_cursor = await read.list_deliveries(
            self._services.database, outcome=outcome, run_id=run_id, cursor=cursor, limit=PAGE
        )
        first = query("/deliveries", outcome=outcome, run=run_id)
        older = query("/deliveries", outcome=outcome, run=run_id, cursor=next_cursor)
        return self._render.page(
            request,
            "deliveries.html",
            filters={"outcome": outcome, "run": run_id},
            rows=rows,
            has_secret=any(one.secrets for one in self._services.workspaces),
            callback_url=self._services.settings.callback_url,
            older=older if next_cursor else None,
            newest=first if cursor else None,
        )

    async def show(self, request: Request) -> Response:
        """One delivery with its body."""
        return await self._page(request, await self._row(request))

    async def replay(self, request: Request) -> Response:
        """Reads a quarantined delivery again; then the delivery as it is now."""
        if request.method == "GET":  # the page after an action, loaded again
            delivery_id = quote(request.path_params["delivery_id"], safe="")
            return RedirectResponse(f"/deliveries/{delivery_id}", status_code=303)
        await check_action(request)
        row = await self._row(request)
        replay = await self._services.replayer.replay(row.delivery_id)
        return await self._page(request, await self._row(request), said=_told(replay))

    async def _page(
        self, request: Request, row: DeliveryRow, *, said: Said | None = None
    ) -> Response:
        known = row.run_id is not None and await read.get_run(self._services.database, row.run_id)
        return self._render.page(
            request, "delivery.html", row=row, said=said, run_known=bool(known)
        )

    async def _row(self, request: Request) -> DeliveryRow:
        delivery_id = request.path_params["delivery_id"]
        if "\0" not in delivery_id and len(delivery_id) <= 512:
            row = await read.get_delivery(self._services.database, delivery_id)
            if row is not None:
                return row
        raise _unknown(delivery_id)


def _told(replay: Replay) -> Said:
    if replay.already:
        return Said("good", f"Nothing to do: {replay.reason}.")
    if replay.outcome is DeliveryOutcome.APPLIED:
        return Said("good", f"It is understood now, and applied to run {replay.run_id}.")
    return Said("warn", f"It stays in quarantine: {replay.reason}.")


def _unknown(delivery_id: str) -> Fault:
    return not_found(f"No delivery {delivery_id[:255]} is kept here.")
