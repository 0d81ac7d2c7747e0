"""`/batches`: what was run for every row of a sheet, and what became of each row."""

from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.services import Services
from tracker.starting.batch_rows import states_of
from tracker.store.queries import batches
from tracker.store.queries.overview import technique_names
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.paths import ANY
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http.errors import invalid, not_found

BATCHES: Final = 50
ROWS: Final = 100


class BatchesPage:
    """The list, and one batch."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """Both routes."""
        return [
            Route("/batches", self.list, methods=["GET"]),
            Route(f"/batches/{{batch_id:{ANY}}}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of batches."""
        database, cursor = self._services.database, given(request, "cursor")
        found, next_cursor = await batches.list_batches(database, cursor=cursor, limit=BATCHES)
        return self._render.page(
            request,
            "batches.html",
            batches=found,
            tallies=await batches.tallies(database, [one.batch_id for one in found]),
            names=await technique_names(database, sorted({one.technique_id for one in found})),
            older=query("/batches", cursor=next_cursor) if next_cursor else None,
            newest="/batches" if cursor else None,
        )

    async def show(self, request: Request) -> Response:
        """One batch, with a page of its rows."""
        database = self._services.database
        batch_id, after = request.path_params["batch_id"], _position(given(request, "after"))
        usable = "\0" not in batch_id and len(batch_id) <= 255
        batch = await batches.get(database, batch_id) if usable else None
        if batch is None:
            raise not_found(f"No batch {batch_id[:255]} is kept here.")
        entries = await batches.entries(database, batch_id, after=after, limit=ROWS + 1)
        page = entries[:ROWS]
        states = await states_of(database, batch.workspace_slot, page)
        address = f"/batches/{quote(batch_id, safe='')}"
        more = len(entries) > ROWS
        return self._render.page(
            request,
            "batch.html",
            batch=batch,
            tally=(await batches.tallies(database, [batch_id]))[batch_id],
            names=await technique_names(database, [batch.technique_id]),
            rows=[states[entry.key] for entry in page],
            older=query(address, after=str(page[-1].position)) if more else None,
            newest=address if after else None,
        )


def _position(text: str | None) -> int:
    """The number of a row; raises `Fault` 400."""
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise invalid(FieldFault("after", "must be the number of a row"))
    return int(text)
