"""The simulator's own routes: true records, what was asked of it, its faults, the media files."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from weakref import finalize

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tracker.simulator.kinds import seconds
from tracker.simulator.media import CONTENT_TYPES, media_bytes
from tracker.simulator.options import SECRETS
from tracker.simulator.problems import Problem
from tracker.simulator.validation import parse_body
from tracker.simulator.world import World


class Control:
    """What no FLORA has: a look behind the scenes, without a key."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._files = Path()
        self._remove_files: Callable[[], object] | None = None

    def routes(self) -> list[Route]:
        """All routes, from the root."""
        return [
            Route("/simulator/runs", self.runs, methods=["GET"]),
            Route("/simulator/requests", self.requests, methods=["GET"]),
            Route("/simulator/deliveries", self.deliveries, methods=["GET"]),
            Route("/simulator/faults", self.faults, methods=["GET"]),
            Route("/simulator/faults", self.change_faults, methods=["POST"]),
            Route("/simulator/bills", self.bills, methods=["GET"]),
            Route("/simulator/colleague", self.colleague, methods=["POST"]),
            Route("/simulator/deletions", self.delete, methods=["POST"]),
            Route("/media/{name}", self.media, methods=["GET"]),
        ]

    async def runs(self, request: Request) -> Response:
        """Every run's true record, oldest first."""
        return JSONResponse({"runs": self._world.records()})

    async def requests(self, request: Request) -> Response:
        """How often each route gave each status; 0 stands for a cut connection."""
        counts = sorted(self._world.counts.items())
        return JSONResponse(
            {
                "total": self._world.counts.total(),
                "requests": [
                    {"route": route, "status": status, "count": count}
                    for (route, status), count in counts
                ],
            }
        )

    async def deliveries(self, request: Request) -> Response:
        """Every attempt at a callback, oldest first."""
        return JSONResponse({"deliveries": [asdict(sent) for sent in self._world.deliveries]})

    async def bills(self, request: Request) -> Response:
        """What every run really costs, and what reads show of it now, oldest first."""
        return JSONResponse({"bills": self._world.bills()})

    async def colleague(self, request: Request) -> Response:
        """Starts `{"technique": …, "count"?: 1}` as another program would, without callback."""
        try:
            body = parse_body(await request.body())
            count = range(int(body.get("count", 1)))
            runs = [self._world.start_colleague(str(body.get("technique"))) for _ in count]
        except Problem as problem:
            return problem.response()
        except (LookupError, TypeError, ValueError) as exc:
            return Problem.invalid(("technique", str(exc))).response()
        return JSONResponse({"run_ids": [run.run_id for run in runs]})

    async def delete(self, request: Request) -> Response:
        """Deletes runs at FLORA: `{"run_ids": [...]}`."""
        try:
            run_ids = parse_body(await request.body()).get("run_ids")
        except Problem as problem:
            return problem.response()
        if not isinstance(run_ids, list) or not all(isinstance(one, str) for one in run_ids):
            return Problem.invalid(("run_ids", "must be a list of identifiers")).response()
        self._world.delete(run_ids)
        return JSONResponse({"deleted": sorted(self._world.deleted)})

    async def faults(self, request: Request) -> Response:
        """The options that hold now and may be changed, without secrets."""
        shown = self._world.options.changeable
        return JSONResponse({name: shown[name] for name in shown if name not in SECRETS})

    async def change_faults(self, request: Request) -> Response:
        """Takes new values, `{"drop": 0.4, "errors": "10%"}`, and answers with all that hold now.

        `?after=60` changes them 60 seconds later, `?seconds=30` for 30 seconds, both by the
        simulator's clock.
        """
        query = request.query_params
        try:
            changes = parse_body(await request.body())
            after, lasting = (seconds(query.get(name, "0")) for name in ("after", "seconds"))
            self._world.change(changes, after=after, seconds=lasting or None)
        except Problem as problem:
            return problem.response()
        except ValueError as exc:
            name, _, reason = str(exc).partition(": ")
            return Problem.invalid((name, reason or name)).response()
        return await self.faults(request)

    async def media(self, request: Request) -> Response:
        """The file behind an output's link, whole or the range that is asked for."""
        output_id, _, extension = request.path_params["name"].partition(".")
        if not extension or self._world.media_extension(output_id) != extension:
            return Problem(404, "not_found", "There is no such output.").response()
        file = self._directory() / f"{output_id}.{extension}"
        if not file.exists():
            file.write_bytes(media_bytes(output_id, extension))
        return FileResponse(file, media_type=CONTENT_TYPES[extension])

    def close(self) -> None:
        """Removes the media files."""
        if self._remove_files is not None:
            self._remove_files()
            self._remove_files = None

    def _directory(self) -> Path:
        if self._remove_files is None:
            self._files = Path(mkdtemp(prefix="flora-simulator-"))
            # Also where nobody closes: when this object goes, or the process ends.
            self._remove_files = finalize(self, rmtree, self._files, ignore_errors=True)
        return self._files
