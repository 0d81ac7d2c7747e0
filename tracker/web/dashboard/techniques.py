"""`/techniques`: FLORA's catalogue as last synced, and how long each technique takes."""

import re
import shlex
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from tracker.core.formatting import csv_text
from tracker.starting.rows import BOM
from tracker.store.queries import runs as read
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow
from tracker.web.dashboard import PageGroup, attachment, page, query_field, read_filters
from tracker.web.http.responses import not_found

PAGE_SIZE: Final = 60
RECENT_RUNS: Final = 10
NAME_COLUMN: Final = "SKU"
"""The column of a sheet that is no input: files are named by it."""
_EXAMPLES: Final = {
    "text": "…",
    "imageUrl": "https://…/image.png",
    "videoUrl": "https://…/video.mp4",
}
"""A value of each input type that can be started."""


class TechniquePages(PageGroup):
    """The list, and one technique."""

    @page("/techniques")
    async def list(self, request: Request) -> Response:
        filters = read_filters(request, {"text": None, "gone": None})
        rows, next_cursor = await techniques.page(
            self._database,
            query=filters["text"] or "",
            gone=filters["gone"] is not None,
            cursor=query_field(request, "cursor"),
            limit=PAGE_SIZE,
        )
        durations = await read.durations_of(self._database, [one.technique_id for one in rows])
        return self._list(
            request,
            "techniques.html",
            next_cursor,
            filters,
            rows=[(row, durations[row.technique_id]) for row in rows],
            has_key=self._has_key,
        )

    @page("/techniques/{technique_id:any}")
    async def show(self, request: Request) -> Response:
        """One technique: inputs, outputs, price, how long its runs take, and how to start them."""
        row = await self._row(request)
        (known,) = (await read.durations_of(self._database, [row.technique_id])).values()
        recent, _ = await read.list_runs(
            self._database, technique_id=row.technique_id, limit=RECENT_RUNS
        )
        return self._render(
            request,
            "technique.html",
            row=row,
            durations=known,
            recent=recent,
            command=_command(row),
            batch=_batch_command(row),
            columns=_columns(row),
        )

    @page("/techniques/{technique_id:any}/sheet.csv")
    async def sheet(self, request: Request) -> Response:
        """A sheet for the command `batch`, which has the columns and no row yet."""
        row = await self._row(request)
        if not (columns := _columns(row)):
            raise not_found(
                f"The inputs of {row.name} are not known here, or not all can be given."
            )
        content = BOM + csv_text([columns])  # by the mark Excel knows that it is UTF-8
        return Response(content, media_type="text/csv", headers=attachment(_sheet_name(row)))

    async def _row(self, request: Request) -> TechniqueRow:
        """The technique of the path: in the catalogue, or known from a run."""
        database = self._database
        technique_id = request.path_params["technique_id"]
        row = await techniques.get(database, technique_id)
        row = row or await techniques.by_slug(database, technique_id)
        if row is None:
            known, _ = await read.list_runs(database, technique_id=technique_id, limit=1)
            row = TechniqueRow(technique_id=technique_id, name=technique_id) if known else None
        if row is None:
            raise not_found(
                f"Technique {technique_id[:255]} is not in the catalogue. The command tracker "
                "techniques sync updates it."
            )
        return row


def _command(row: TechniqueRow) -> str | None:
    """The command that starts a run; `None` where an input has a type that it cannot give."""
    if not _columns(row):
        return None
    words = ["tracker", "runs", "start", row.slug or row.technique_id]
    for port in row.inputs:
        words += ["--input", f"{port.get('id')}={_EXAMPLES[str(port.get('type'))]}"]
    return shlex.join([*words, "--wait"])


def _batch_command(row: TechniqueRow) -> str:
    """The command that runs a sheet and saves the outputs under the names of its rows."""
    sheet = _sheet_name(row)
    folder = sheet.removesuffix(".csv")
    words = ["tracker", "batch", row.slug or row.technique_id, sheet]
    return shlex.join([*words, "--download", folder, "--name-by", NAME_COLUMN])


def _columns(row: TechniqueRow) -> list[str]:
    """The columns of a sheet: one to name the files by, and the inputs. None where an input has no
    id, or a type that a sheet cannot give."""
    names = [str(port.get("id") or "") for port in row.inputs]
    types = {str(port.get("type")) for port in row.inputs}
    if not names or "" in names or not types <= _EXAMPLES.keys():
        return []
    return [*(name for name in (NAME_COLUMN,) if name not in names), *names]


def _sheet_name(row: TechniqueRow) -> str:
    name = re.sub(r"[^\w.-]+", "-", row.slug or row.technique_id).strip(".-")
    return f"{name or 'sheet'}.csv"
