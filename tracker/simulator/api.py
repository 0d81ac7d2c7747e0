"""All routes: FLORA's under `/api/v1`, and the simulator's own, for records, faults and files."""

import base64
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from email.utils import formatdate
from functools import partial
from pathlib import Path
from random import Random
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, Final
from weakref import finalize

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tracker.simulator.callbacks import CallbackSender
from tracker.simulator.catalogue import CONTENT_TYPES, SimulatedTechnique, make_file
from tracker.simulator.faults import CutConnection, ErrorAnswer, GatewayFault, RequestFault
from tracker.simulator.options import CODES, SECRETS, Number, Options, SimulatedWorkspace, fault_of
from tracker.simulator.runs import RunType, SimulatedRun, digest
from tracker.simulator.starts import (
    StartHandler,
    check_generation_start,
    check_technique_start,
    parse_body,
)
from tracker.simulator.world import RequestRecord, World

STATUSES: Final = ("pending", "running", "completed", "failed")
FILTERS: Final = ("status", "technique_id", "project_id")

_DEFAULT_LIMIT: Final = 20
_MAX_LIMIT: Final = 100
_NUMBER: Final = TypeAdapter[float](Number)

Handler = Callable[[Request, SimulatedWorkspace], Awaitable[Response]]


class SimulatedApi:
    """The API of one world."""

    def __init__(self, world: World, sender: CallbackSender) -> None:
        self._world = world
        self._sender = sender
        self._starts = StartHandler(world, sender)

    def routes(self) -> list[Route]:
        """All routes, below `/api/v1`."""
        one = "/techniques/{technique}"
        runs = partial(self._list_runs, "technique", "technique_runs")
        generations = partial(self._list_runs, "generation", "generations")
        return [
            self._route("workspaces.list", "GET", "/workspaces", self._list_workspaces),
            self._route("techniques.list", "GET", "/techniques", self._list_techniques),
            self._route("techniques.get", "GET", one, self._get_technique),
            self._route("runs.start", "POST", f"{one}/runs", self._start_run),
            self._route("runs.get", "GET", f"{one}/runs/{{run}}", self._get_technique_run),
            self._route("runs.list", "GET", "/technique-runs", runs),
            self._route("runs.get_any", "GET", "/runs/{run}", self._get_run),
            self._route("generations.start", "POST", "/generate", self._start_generation),
            self._route("generations.list", "GET", "/generations", generations),
        ]

    async def _list_workspaces(self, request: Request, workspace: SimulatedWorkspace) -> Response:
        seen = [one.workspace_id for one in self._world.options.seen_by(workspace)]
        shown = [{"workspace_id": one, "name": one} for one in seen]
        return JSONResponse({"workspaces": shown, "meta": {"next_cursor": None}})

    async def _list_techniques(self, request: Request, workspace: SimulatedWorkspace) -> Response:
        query = request.query_params
        self._asked_for(query, workspace)
        text = query.get("query", "").casefold()
        found = [
            technique
            for technique in self._world.techniques()
            if text in f"{technique.slug} {technique.name} {technique.description}".casefold()
        ]
        bounds, next_cursor = _page_bounds(
            query, len(found), self._world.options, self._world.now_ms()
        )
        return JSONResponse(
            {
                "techniques": [technique.list_item() for technique in found[bounds]],
                "meta": {"next_cursor": next_cursor},
            }
        )

    async def _get_technique(self, request: Request, workspace: SimulatedWorkspace) -> Response:
        return JSONResponse(self._technique(request).definition())

    async def _start_run(self, request: Request, workspace: SimulatedWorkspace) -> Response:
        # Where each value of an input makes a run, the answer is the first of these runs, as FLORA
        # documents no other shape. All of them are in the history, and each sends its callback.
        technique = self._technique(request)
        body = parse_body(await request.body())
        per_value = self._world.options.run_per_value
        start = await check_technique_start(body, technique, run_per_value=per_value)
        return await self._starts.answer(start, request, workspace)

    async def _start_generation(self, request: Request, workspace: SimulatedWorkspace) -> Response:
        body = parse_body(await request.body())
        start = await check_generation_start(body, workspace.workspace_id)
        return await self._starts.answer(start, request, workspace)

    async def _get_technique_run(self, request: Request, workspace: SimulatedWorkspace) -> Response:
        technique = self._technique(request)
        run = self._find(request, workspace)
        if run.technique is None or run.technique.technique_id != technique.technique_id:
            raise ErrorAnswer.not_found("run")
        return self._show(request, run)

    async def _get_run(self, request: Request, workspace: SimulatedWorkspace) -> Response:
        return self._show(request, self._find(request, workspace))

    async def _list_runs(
        self, run_type: RunType, name: str, request: Request, workspace: SimulatedWorkspace
    ) -> Response:
        world, query, now_ms = self._world, request.query_params, self._world.now_ms()
        options = world.options
        workspaces = self._asked_for(query, workspace)
        filters = {one: query.get(one) for one in FILTERS}
        statuses = (*STATUSES, options.queued_name, options.cancelled_name)
        if filters["status"] is not None and filters["status"] not in statuses:
            raise ErrorAnswer.invalid(("status", f"must be one of {', '.join(STATUSES)}"))
        found = world.history(run_type, *workspaces, **filters)
        bounds, next_cursor = _page_bounds(query, len(found), options, now_ms)
        runs = found[bounds]
        items = [
            run.history_item(
                now_ms,
                unit=options.time_unit,
                with_outputs=options.history_outputs,
                read=self._link_read(request),
            )
            for run in runs
        ]
        self._apply_page_faults(items, bounds.start)
        if runs and options.deletions:
            random = Random(f"{options.seed}/deletion/{request.state.number}")
            if random.random() < options.deletions:
                world.delete({random.choice(runs).run_id})
        meta = {"next_cursor": next_cursor, "total_estimate": len(found)}
        return JSONResponse({name: items, "meta": meta})

    def _apply_page_faults(self, items: list[dict[str, Any]], offset: int) -> None:
        """Refuses a page that cannot be read, or spoils its items. Raises `ErrorAnswer`."""
        options = self._world.options
        if options.max_offset is not None and offset >= options.max_offset:
            raise ErrorAnswer.invalid(("cursor", f"must not lead beyond {options.max_offset}"))
        for position, item in enumerate(items, offset):
            if position == options.bad_offset or item["run_id"] in options.bad_runs:
                if not options.bad_bytes and not options.bad_fields:
                    code = options.bad_code
                    raise ErrorAnswer(CODES[code], code, "The list cannot be read.")
                item["notes"] = "x" * options.bad_bytes
                item |= dict.fromkeys(options.bad_fields)

    def _find(self, request: Request, workspace: SimulatedWorkspace) -> SimulatedRun:
        seen = self._world.options.seen_by(workspace)
        run = self._world.find(request.path_params["run"], *seen)
        if run is None:
            raise ErrorAnswer.not_found("run")
        return run

    def _technique(self, request: Request) -> SimulatedTechnique:
        technique = self._world.technique(request.path_params["technique"])
        if technique is None:
            raise ErrorAnswer.not_found("technique")
        return technique

    def _show(self, request: Request, run: SimulatedRun) -> Response:
        unit = self._world.options.time_unit
        return JSONResponse(run.as_read(self._world.now_ms(), unit, self._link_read(request)))

    def _link_read(self, request: Request) -> int | None:
        """The number that signs the links of this read; None where links are not signed."""
        number: int = request.state.number
        return number if self._world.options.signed_links else None

    def _route(self, name: str, method: str, path: str, handler: Handler) -> Route:
        """A route with what all have in common: faults, the gateway, the key, the request log."""

        async def endpoint(request: Request) -> Response:
            world = self._world
            world.requests += 1
            request.state.number = number = world.requests
            options, at_ms = world.options, world.now_ms()
            fault, gateway = RequestFault(options, number), GatewayFault(options, name, number)
            if gateway.strikes:
                await request.body()  # read in full: the peer may be gone while the work goes on
                response = await gateway.answer(
                    lambda: self._answer(request, name, handler, fault),
                    self._sender.run_in_background,
                    world.true_ms(),
                )
            else:
                response = await self._answer(request, name, handler, fault)
                request_id = digest(world.options.seed, "request", number)
                response.headers["request-id"] = f"req_{request_id}"
                # By FLORA's clock, not the server's: clients measure their offset from it.
                date_ms = world.now_ms() + world.options.date_offset * 1000
                response.headers["date"] = formatdate(date_ms / 1000, usegmt=True)
            status = 0 if isinstance(response, CutConnection) else response.status_code
            world.counts[name, status] += 1
            run_id = request.path_params.get("run")
            world.request_log.append(RequestRecord(name, run_id, at_ms, status))
            return response

        return Route(path, endpoint, methods=[method], name=name)

    async def _answer(
        self, request: Request, route: str, handler: Handler, fault: RequestFault
    ) -> Response:
        try:
            workspace = self._authenticate(request)
            if fault.name == "cut_before":
                return CutConnection()
            if fault.name == "rate_limited":
                return fault.too_many(self._world.now_ms())
            if fault.name == "error":
                return fault.server_error()
            self._check_refusal(request, route)
            response = await handler(request, workspace)
        except ErrorAnswer as error:
            response = error.response(details=self._world.options.field_details)
        if fault.name == "cut_after":
            return CutConnection()
        if fault.name == "cut_within":
            return CutConnection(response)
        return response

    def _check_refusal(self, request: Request, route: str) -> None:
        """Raises `ErrorAnswer` for the routes that `refuse` names."""
        options = self._world.options
        code = options.refuse.get(route)
        if code is None and any(map(request.query_params.get, FILTERS)):
            code = options.refuse.get("filtered")
        if code is None:
            return
        if Random(f"{options.seed}/refusal/{request.state.number}").random() < options.refusals:
            raise ErrorAnswer(CODES[code], code, f"Refused by the simulator: {code}.")

    def _authenticate(self, request: Request) -> SimulatedWorkspace:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ErrorAnswer(401, "unauthorized", "An API key is required.")
        workspace = self._world.workspace_of(key.strip())
        if workspace is None:
            raise ErrorAnswer(401, "invalid_api_key", "The API key is not valid.")
        return workspace

    def _asked_for(
        self, query: Mapping[str, str], workspace: SimulatedWorkspace
    ) -> Sequence[SimulatedWorkspace]:
        """The workspaces that a list is about. Raises `ErrorAnswer` for one that the key does not
        see."""
        seen, wanted = self._world.options.seen_by(workspace), query.get("workspace_id")
        asked_for = [one for one in seen if wanted in (None, one.workspace_id)]
        if not asked_for:
            raise ErrorAnswer(403, "forbidden", "This key does not belong to that workspace.")
        return asked_for


def _page_bounds(
    query: Mapping[str, str], count: int, options: Options, now_ms: int
) -> tuple[slice, object]:
    """Which of `count` items `cursor` and `limit` ask for, and the cursor of the next page.

    Raises `ErrorAnswer` where `limit` is not a number from 1 to 100 or the cursor is not ours.
    """
    text = query.get("limit", str(_DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= _MAX_LIMIT):
        raise ErrorAnswer.invalid(("limit", f"must be a number from 1 to {_MAX_LIMIT}"))
    cursor = query.get("cursor")
    start = decode_cursor(cursor, options, now_ms) if cursor else 0
    end = start + int(text)
    return slice(start, end), encode_cursor(end, options, now_ms) if end < count else None


def encode_cursor(offset: int, options: Options, now_ms: int) -> object:
    """The cursor that stands for an offset: as at FLORA, base64url of `{"offset":N}`.

    With `opaque_cursors` the offset is hidden, and the cursor contains its age. Other types are
    the offset itself, or an object that holds it.
    """
    if options.cursor_type != "text":
        return offset if options.cursor_type == "number" else {"offset": offset}
    content = b'{"offset":%d}' % offset
    if options.opaque_cursors:
        opened = json.dumps([offset, now_ms, options.cursor_epoch]).encode()
        content = _masked(opened, options.seed)
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii")


def decode_cursor(cursor: str, options: Options, now_ms: int) -> int:
    """The offset that a cursor stands for.

    Raises `ErrorAnswer` for what `encode_cursor` never made, and for opaque cursors that are too
    old or of another epoch.
    """
    if options.cursor_type == "number" and cursor.isdecimal():
        return int(cursor)
    try:
        content = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        if options.opaque_cursors:
            offset, made_ms, epoch = json.loads(_masked(content, options.seed))
            age = (now_ms - made_ms) / 1000
            valid = epoch == options.cursor_epoch and age <= (options.cursor_seconds or math.inf)
        else:
            offset, valid = json.loads(content)["offset"], True
    except (ValueError, KeyError, TypeError, RecursionError):
        offset, valid = None, False
    if not valid or type(offset) is not int or offset < 0:
        raise ErrorAnswer.invalid(("cursor", "is not a cursor of this list"))
    return offset


def _masked(content: bytes, seed: int) -> bytes:
    """The content made unreadable, or readable again."""
    mask = hashlib.shake_128(b"cursor/%d" % seed).digest(len(content))
    return bytes(a ^ b for a, b in zip(content, mask, strict=True))


class ControlRoutes:
    """Routes that FLORA does not have, without a key."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._files: Path | None = None

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
        """The true cost of every run, and the cost that reads show now, oldest first."""
        return JSONResponse({"bills": self._world.bills()})

    async def colleague(self, request: Request) -> Response:
        """Starts `{"technique": …, "count"?: 1}` as another program, without callback."""
        body = parse_body(await request.body())
        try:
            wanted = self._world.sample_request(str(body.get("technique")))
            count = int(body.get("count", 1))
        except (LookupError, TypeError, ValueError) as exc:
            raise ErrorAnswer.invalid(("technique", str(exc))) from None
        runs = [self._world.start(wanted, colleague=True) for _ in range(count)]
        return JSONResponse({"run_ids": [run.run_id for run in runs]})

    async def delete(self, request: Request) -> Response:
        """Deletes runs at FLORA: `{"run_ids": [...]}`."""
        run_ids = parse_body(await request.body()).get("run_ids")
        if not isinstance(run_ids, list) or not all(isinstance(one, str) for one in run_ids):
            raise ErrorAnswer.invalid(("run_ids", "must be a list of identifiers"))
        self._world.delete(run_ids)
        return JSONResponse({"deleted": sorted(self._world.deleted)})

    async def faults(self, request: Request) -> Response:
        """The present options that may be changed, without secrets."""
        shown = self._world.options.changeable
        return JSONResponse({name: shown[name] for name in shown if name not in SECRETS})

    async def change_faults(self, request: Request) -> Response:
        """Sets new values, `{"drop": 0.4, "errors": "10%"}`, and answers with the present options.

        `?after=60` changes them 60 seconds later, `?seconds=30` for 30 seconds, both by the
        simulator's clock.
        """
        query = request.query_params
        changes = parse_body(await request.body())
        try:
            after, lasting = (
                _NUMBER.validate_python(query.get(name, "0")) for name in ("after", "seconds")
            )
            self._world.change(changes, after=after, seconds=lasting or None)
        except ValueError as exc:
            name, _, reason = fault_of(exc).partition(": ")
            raise ErrorAnswer.invalid((name, reason or name)) from None
        return await self.faults(request)

    async def media(self, request: Request) -> Response:
        """The file behind an output's link, whole or the requested range."""
        name = request.path_params["name"]
        if name not in self._world.media_files:
            raise ErrorAnswer.not_found("output")
        output_id, _, extension = name.partition(".")
        file = self._directory() / name
        if not file.exists():
            file.write_bytes(make_file(output_id, extension))
        return FileResponse(file, media_type=CONTENT_TYPES[extension])

    def close(self) -> None:
        if self._files is not None:
            rmtree(self._files, ignore_errors=True)

    def _directory(self) -> Path:
        if self._files is None:
            self._files = Path(mkdtemp(prefix="flora-simulator-"))
            # Also without `close`: when this object is collected, or the process ends.
            finalize(self, rmtree, self._files, ignore_errors=True)
        return self._files
