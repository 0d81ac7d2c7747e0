"""`/techniques`: FLORA's catalogue as it was last read, and how long each technique takes."""

import shlex
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.services import Services
from tracker.store.queries import runs as read
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.paths import ANY
from tracker.web.dashboard.render import Renderer, query
from tracker.web.http.errors import not_found

PAGE: Final = 60
_STARTABLE: Final = ("text", "imageUrl", "videoUrl")
_EXAMPLES: Final = {"imageUrl": "https://…/image.png", "videoUrl": "https://…/video.mp4"}


class TechniquesPage:
    """The list, and one technique."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """Both routes; an id may hold any character, slashes too."""
        return [
            Route("/techniques", self.list, methods=["GET"]),
            Route(f"/techniques/{{technique_id:{ANY}}}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """A page of the catalogue, by name."""
        text, gone, cursor = (given(request, name) for name in ("text", "gone", "cursor"))
        rows, next_cursor = await techniques.page(
            self._services.database,
            query=text or "",
            gone=gone is not None,
            cursor=cursor,
            limit=PAGE,
        )
        first = query("/techniques", text=text, gone=gone)
        older = query("/techniques", text=text, gone=gone, cursor=next_cursor)
        return self._render.page(
            request,
            "techniques.html",
            filters={"text": text, "gone": gone},
            rows=rows,
            has_key=any(one.client is not None for one in self._services.workspaces),
            older=older if next_cursor else None,
            newest=first if cursor else None,
        )

    async def show(self, request: Request) -> Response:
        """One technique: what it takes, gives, costs, and how long it takes."""
        technique_id = request.path_params["technique_id"]
        database = self._services.database
        row = None
        if "\0" not in technique_id and len(technique_id) <= 255:
            row = await techniques.get(database, technique_id)
            row = row or await techniques.by_slug(database, technique_id)
            if (
                row is None
                and (await read.list_runs(database, technique_id=technique_id, limit=1))[0]
            ):
                row = TechniqueRow(technique_id=technique_id, name=technique_id)
        if row is None:
            raise not_found(
                f"No technique {technique_id[:255]} is in the catalogue here; "
                "`tracker techniques sync` reads it anew."
            )
        recent, _ = await read.list_runs(database, technique_id=row.technique_id, limit=10)
        return self._render.page(
            request,
            "technique.html",
            row=row,
            durations=await read.durations(database, row.technique_id),
            recent=recent,
            command=_command(row),
        )


def _command(row: TechniqueRow) -> str | None:
    """How to start one; `None` where it takes what a start cannot give."""
    words = ["tracker", "runs", "start", row.slug or row.technique_id]
    for port in row.inputs:
        kind = str(port.get("type"))
        if kind not in _STARTABLE:
            return None
        words += ["--input", f"{port.get('id')}={_EXAMPLES.get(kind, '…')}"]
    return shlex.join([*words, "--wait"]) if row.inputs else None
