"""`/batches` and `/starts`: each batch with its rows, and starts whose outcome is unknown."""

from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.starting.batch_rows import states_of
from tracker.store.queries import batches, starts
from tracker.store.queries.overview import technique_names
from tracker.store.queries.starts import LISTED
from tracker.web.dashboard.forms import path_id, query_choice, query_field, query_position
from tracker.web.dashboard.render import PageGroup, page_links, query
from tracker.web.http.responses import not_found

PAGE_SIZE: Final = 50
ROWS: Final = 100


class BatchPages(PageGroup):
    """The list, one batch, and the open starts."""

    def routes(self) -> list[Route]:
        return [
            Route("/batches", self.list, methods=["GET"]),
            Route("/batches/{batch_id:any}", self.show, methods=["GET"]),
            Route("/starts", self.starts, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of batches, newest first."""
        database, cursor = self._database, query_field(request, "cursor")
        rows, next_cursor = await batches.list_batches(database, cursor=cursor, limit=PAGE_SIZE)
        return self._render(
            request,
            "batches.html",
            batches=rows,
            counts=await batches.batch_counts(database, [one.batch_id for one in rows]),
            names=await technique_names(database, sorted({one.technique_id for one in rows})),
            **page_links("/batches", cursor=cursor, next_cursor=next_cursor),
        )

    async def show(self, request: Request) -> Response:
        """One batch, with a page of its rows."""
        database = self._database
        batch_id, usable = path_id(request, "batch_id")
        after = query_position(request, "after") or 0
        batch = await batches.get(database, batch_id) if usable else None
        if batch is None:
            raise not_found(f"Batch {batch_id} is not stored here.")
        entries = await batches.entries(database, batch_id, after=after, limit=ROWS + 1)
        page, more = entries[:ROWS], len(entries) > ROWS
        states = await states_of(database, batch.workspace_slot, page)
        address = f"/batches/{quote(batch_id, safe='')}"
        return self._render(
            request,
            "batch.html",
            batch=batch,
            counts=(await batches.batch_counts(database, [batch_id]))[batch_id],
            names=await technique_names(database, [batch.technique_id]),
            rows=[states[entry.key] for entry in page],
            older=query(address, after=str(page[-1].position)) if more else None,
            newest=address if after else None,
        )

    async def starts(self, request: Request) -> Response:
        """A page of the starts whose outcome is unknown."""
        state, cursor = query_choice(request, "state", LISTED), query_field(request, "cursor")
        rows, next_cursor = await starts.list_starts(
            self._database,
            states=None if state is None else [state],
            cursor=cursor,
            limit=PAGE_SIZE,
        )
        return self._render(
            request,
            "starts.html",
            rows=rows,
            state=state,
            states={one.value: one.value.replace("_", " ").capitalize() for one in LISTED},
            **page_links("/starts", cursor=cursor, next_cursor=next_cursor, state=state),
        )
