"""`/deliveries`: the callbacks received, and another try for those that were not understood."""

from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from tracker.core.record import DeliveryOutcome
from tracker.receiving.replay import Replay
from tracker.store.queries import runs as read
from tracker.store.queries.runs import DeliveryRow
from tracker.web.dashboard.forms import check_csrf, path_id, query_choice, query_field
from tracker.web.dashboard.render import FlashMessage, PageGroup, page_links
from tracker.web.http.responses import not_found

PAGE_SIZE: Final = 50


class DeliveryPages(PageGroup):
    """The list, one delivery, and its action."""

    def routes(self) -> list[Route]:
        return [
            Route("/deliveries", self.list, methods=["GET"]),
            Route("/deliveries/{delivery_id:any}/replay", self.replay, methods=["GET", "POST"]),
            Route("/deliveries/{delivery_id:any}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of deliveries, newest first."""
        outcome = query_choice(request, "outcome", DeliveryOutcome)
        run_id, cursor = query_field(request, "run"), query_field(request, "cursor")
        rows, next_cursor = await read.list_deliveries(
            self._database, outcome=outcome, run_id=run_id, cursor=cursor, limit=PAGE_SIZE
        )
        filters = {"outcome": outcome, "run": run_id}
        return self._render(
            request,
            "deliveries.html",
            filters=filters,
            rows=rows,
            has_secret=any(one.secrets for one in self._services.workspaces),
            callback_url=self._services.settings.callback_url,
            **page_links("/deliveries", cursor=cursor, next_cursor=next_cursor, **filters),
        )

    async def show(self, request: Request) -> Response:
        """One delivery with its body."""
        return await self._page(request, await self._row(request))

    async def replay(self, request: Request) -> Response:
        """Applies a quarantined delivery again and shows it."""
        if request.method == "GET":  # the page after an action was reloaded
            delivery_id = quote(request.path_params["delivery_id"], safe="")
            return RedirectResponse(f"/deliveries/{delivery_id}", status_code=303)
        await check_csrf(request)
        row = await self._row(request)
        replay = await self._services.replayer.replay(row.delivery_id)
        return await self._page(request, await self._row(request), flash=_replay_result(replay))

    async def _page(
        self, request: Request, row: DeliveryRow, *, flash: FlashMessage | None = None
    ) -> Response:
        run = await read.get_run(self._database, row.run_id) if row.run_id else None
        return self._render(
            request, "delivery.html", row=row, flash=flash, run_known=run is not None
        )

    async def _row(self, request: Request) -> DeliveryRow:
        delivery_id, usable = path_id(request, "delivery_id", longest=512)
        row = await read.get_delivery(self._database, delivery_id) if usable else None
        if row is None:
            raise not_found(f"Delivery {delivery_id[:255]} is not stored here.")
        return row


def _replay_result(replay: Replay) -> FlashMessage:
    if replay.already:
        return FlashMessage("good", f"Nothing to do: {replay.reason}.")
    if replay.outcome is DeliveryOutcome.APPLIED:
        return FlashMessage("good", f"Replayed: applied to run {replay.run_id}.")
    return FlashMessage("warn", f"Still quarantined: {replay.reason}.")
