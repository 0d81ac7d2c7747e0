"""`/batches` and `/starts`: the batches, and starts whose outcome is unknown."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.store.queries import batches, sheet_rows, starts
from tracker.store.queries.overview import technique_names
from tracker.store.queries.starts import LISTED
from tracker.web.dashboard.batch import split_of
from tracker.web.dashboard.forms import query_choice, query_field
from tracker.web.dashboard.media import output_views
from tracker.web.dashboard.render import PageGroup, page_links

PAGE_SIZE: Final = 50
PICTURES: Final = 4
"""Outputs that are shown of each batch."""


class BatchListPages(PageGroup):
    """The list of batches, and the open starts."""

    def routes(self) -> list[Route]:
        return [
            Route("/batches", self.list, methods=["GET"]),
            Route("/starts", self.starts, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of batches, newest first."""
        database, cursor = self._database, query_field(request, "cursor")
        rows, next_cursor = await batches.list_batches(database, cursor=cursor, limit=PAGE_SIZE)
        ids = [one.batch_id for one in rows]
        counts = await batches.batch_counts(database, ids)
        outputs = await sheet_rows.first_outputs(database, ids, most=PICTURES)
        return self._render(
            request,
            "batches.html",
            batches=rows,
            counts=counts,
            splits={batch_id: split_of(found) for batch_id, found in counts.items()},
            views={
                batch_id: output_views(found, media_origin=self._media_origin)
                for batch_id, found in outputs.items()
            },
            names=await technique_names(database, sorted({one.technique_id for one in rows})),
            **page_links("/batches", cursor=cursor, next_cursor=next_cursor),
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
