"""`/techniques`: FLORA's catalogue as last synced, and how long each technique takes."""

import shlex
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.store.queries import runs as read
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow
from tracker.web.dashboard.forms import path_id, query_field
from tracker.web.dashboard.render import PageGroup, page_links
from tracker.web.http.responses import not_found

PAGE_SIZE: Final = 60
RECENT_RUNS: Final = 10
_EXAMPLES: Final = {
    "text": "…",
    "imageUrl": "https://…/image.png",
    "videoUrl": "https://…/video.mp4",
}
"""A value of each input type that can be started."""


class TechniquePages(PageGroup):
    """The list, and one technique."""

    def routes(self) -> list[Route]:
        return [
            Route("/techniques", self.list, methods=["GET"]),
            Route("/techniques/{technique_id:any}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of the catalogue, by name."""
        filters = {name: query_field(request, name) for name in ("text", "gone")}
        cursor = query_field(request, "cursor")
        rows, next_cursor = await techniques.page(
            self._database,
            query=filters["text"] or "",
            gone=filters["gone"] is not None,
            cursor=cursor,
            limit=PAGE_SIZE,
        )
        return self._render(
            request,
            "techniques.html",
            filters=filters,
            rows=rows,
            has_key=self._has_key,
            **page_links("/techniques", cursor=cursor, next_cursor=next_cursor, **filters),
        )

    async def show(self, request: Request) -> Response:
        """One technique: inputs, outputs, price, and how long its runs take."""
        database = self._database
        technique_id, usable = path_id(request, "technique_id")
        row = None
        if usable:
            row = await techniques.get(database, technique_id)
            row = row or await techniques.by_slug(database, technique_id)
            if row is None:
                known, _ = await read.list_runs(database, technique_id=technique_id, limit=1)
                row = TechniqueRow(technique_id=technique_id, name=technique_id) if known else None
        if row is None:
            raise not_found(
                f"Technique {technique_id} is not in the catalogue. The command tracker techniques "
                "sync updates it."
            )
        recent, _ = await read.list_runs(database, technique_id=row.technique_id, limit=RECENT_RUNS)
        return self._render(
            request,
            "technique.html",
            row=row,
            durations=await read.durations(database, row.technique_id),
            recent=recent,
            command=_command(row),
        )


def _command(row: TechniqueRow) -> str | None:
    """The command that starts a run; `None` where an input has a type that it cannot give."""
    words = ["tracker", "runs", "start", row.slug or row.technique_id]
    for port in row.inputs:
        example = _EXAMPLES.get(str(port.get("type")))
        if example is None:
            return None
        words += ["--input", f"{port.get('id')}={example}"]
    return shlex.join([*words, "--wait"]) if row.inputs else None
