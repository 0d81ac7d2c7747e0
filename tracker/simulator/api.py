"""FLORA's routes under `/api/v1`."""

import json
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from random import Random
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tracker.simulator.callbacks import Courier
from tracker.simulator.catalogue import Technique
from tracker.simulator.fate import digest
from tracker.simulator.faults import Connections, Cut, Throw
from tracker.simulator.gateway import GatewayFault
from tracker.simulator.idempotency import Answer, fingerprint_of
from tracker.simulator.options import CODES, Workspace
from tracker.simulator.pages import page
from tracker.simulator.preset import RunType
from tracker.simulator.problems import Problem
from tracker.simulator.runs import SimulatedRun
from tracker.simulator.starts import StartRequest, Starts
from tracker.simulator.validation import (
    check_generation_start,
    check_technique_start,
    parse_body,
)
from tracker.simulator.world import Asked, World

STATUSES: Final = ("pending", "running", "completed", "failed")
FILTERS: Final = ("status", "technique_id", "project_id")

Handler = Callable[[Request, Workspace], Awaitable[Response]]


class Api:
    """The API of one world."""

    def __init__(self, world: World, courier: Courier, connections: Connections) -> None:
        self._world = world
        self._courier = courier
        self._connections = connections
        self._starts = Starts(world, courier)

    def routes(self) -> list[Route]:
        """All routes, below `/api/v1`."""
        one = "/techniques/{technique}"
        return [
            self._route("workspaces.list", "GET", "/workspaces", self.list_workspaces),
            self._route("techniques.list", "GET", "/techniques", self.list_techniques),
            self._route("techniques.get", "GET", one, self.get_technique),
            self._route("runs.start", "POST", f"{one}/runs", self.start_run),
            self._route("runs.get", "GET", f"{one}/runs/{{run}}", self.get_technique_run),
            self._route("runs.list", "GET", "/technique-runs", self.list_technique_runs),
            self._route("runs.get_any", "GET", "/runs/{run}", self.get_run),
            self._route("generations.start", "POST", "/generate", self.start_generation),
            self._route("generations.list", "GET", "/generations", self.list_generations),
        ]

    async def list_workspaces(self, request: Request, workspace: Workspace) -> Response:
        """`GET /workspaces`: the one workspace that the key belongs to."""
        shown = {"workspace_id": workspace.workspace_id, "name": workspace.workspace_id}
        return JSONResponse({"workspaces": [shown], "meta": {"next_cursor": None}})

    # Techniques

    async def list_techniques(self, request: Request, workspace: Workspace) -> Response:
        """`GET /techniques`."""
        query = request.query_params
        _check_workspace(query, workspace)
        wanted = query.get("query", "").casefold()
        found = [
            technique
            for technique in self._world.techniques()
            if wanted in f"{technique.slug} {technique.name} {technique.description}".casefold()
        ]
        found_page = page(found, query, self._world.options, self._world.now_ms())
        return JSONResponse(
            {
                "techniques": [technique.list_item() for technique in found_page.items],
                "meta": {"next_cursor": found_page.next_cursor},
            }
        )

    async def get_technique(self, request: Request, workspace: Workspace) -> Response:
        """`GET /techniques/{techniqueId}`."""
        return JSONResponse(self._technique(request).definition())

    # Starts

    async def start_run(self, request: Request, workspace: Workspace) -> Response:
        """`POST /techniques/{techniqueId}/runs`: 200 or 201 and the run, both occur.

        Where an input has several values and each makes a run, the answer is the first of these
        runs: no document of FLORA's knows another shape. All of them are in the history, and each
        sends its callback.
        """
        world, technique = self._world, self._technique(request)
        body = parse_body(await request.body())
        start = await check_technique_start(body, technique)

        def begin() -> tuple[list[SimulatedRun], Answer]:
            runs = [
                world.start_technique(
                    technique,
                    inputs,
                    callback_url=start.callback_url,
                    workspace=workspace,
                    unreachable=start.unreachable,
                )
                for inputs in start.each(technique, apart=world.options.run_per_value)
            ]
            return runs, _answer(runs[0], runs[0].answer_to_start(world.options.time_unit))

        return await self._start(request, workspace, technique, body, start.idempotency_key, begin)

    async def start_generation(self, request: Request, workspace: Workspace) -> Response:
        """`POST /generate`."""
        body = parse_body(await request.body())
        start = await check_generation_start(body, workspace.workspace_id)

        def begin() -> tuple[list[SimulatedRun], Answer]:
            run = self._world.start_generation(
                start.type, start.model, callback_url=start.callback_url, workspace=workspace
            )
            return [run], _answer(run, self._generation_receipt(run))

        return await self._start(request, workspace, None, body, start.idempotency_key, begin)

    async def _start(
        self,
        request: Request,
        workspace: Workspace,
        technique: Technique | None,
        body: dict[str, Any],
        body_key: str | None,
        begin: Callable[[], tuple[list[SimulatedRun], Answer]],
    ) -> Response:
        options, header_key = self._world.options, request.headers.get("idempotency-key")
        if options.key_source == "by_type":
            key = body_key if technique is not None else header_key
        else:
            # Each of the two accounts of idempotency has its own form of the key.
            keys = (body_key, header_key)
            first, second = keys if options.idempotency == "replay" else reversed(keys)
            key = first or second
        technique_id = None if technique is None else technique.technique_id
        path = f"techniques/{technique_id}/runs" if technique_id is not None else "generate"
        start = StartRequest(
            workspace=workspace,
            technique_id=technique_id,
            key=(workspace.workspace_id, key) if key is not None else None,
            fingerprint=fingerprint_of(path, body),
            begin=begin,
        )
        return await self._starts.answer(start, request.state.number)

    # Runs

    async def get_technique_run(self, request: Request, workspace: Workspace) -> Response:
        """`GET /techniques/{techniqueId}/runs/{runId}`."""
        technique = self._technique(request)
        run = self._find(request, workspace)
        if run.technique is None or run.technique.technique_id != technique.technique_id:
            raise _not_found("run")
        return self._show(request, run)

    async def get_run(self, request: Request, workspace: Workspace) -> Response:
        """`GET /runs/{runId}`: a run of either type."""
        return self._show(request, self._find(request, workspace))

    async def list_technique_runs(self, request: Request, workspace: Workspace) -> Response:
        """`GET /technique-runs`."""
        return self._history(request, workspace, "technique", "technique_runs")

    async def list_generations(self, request: Request, workspace: Workspace) -> Response:
        """`GET /generations`."""
        return self._history(request, workspace, "generation", "generations")

    def _history(
        self,
        request: Request,
        workspace: Workspace,
        run_type: RunType,
        name: str,
    ) -> Response:
        world, query, now_ms = self._world, request.query_params, self._world.now_ms()
        options = world.options
        _check_workspace(query, workspace)
        filters = {one: query.get(one) for one in FILTERS}
        statuses = (*STATUSES, options.queued_name, options.cancelled_name)
        if filters["status"] is not None and filters["status"] not in statuses:
            raise Problem.invalid(("status", f"must be one of {', '.join(STATUSES)}"))
        found = world.history(run_type, workspace, **filters)
        items, offset, next_cursor = page(found, query, options, now_ms)
        shown = [
            run.history_item(
                now_ms,
                unit=options.time_unit,
                with_outputs=options.history_outputs,
                read=self._read_of(request),
            )
            for run in items
        ]
        self._spoil(shown, offset)
        if items and options.deletions:
            random = Random(f"{options.seed}/deletion/{request.state.number}")
            if random.random() < options.deletions:
                world.delete({random.choice(items).run_id})
        meta = {"next_cursor": next_cursor, "total_estimate": len(found)}
        return JSONResponse({name: shown, "meta": meta})

    def _spoil(self, shown: list[dict[str, Any]], offset: int) -> None:
        """Refuses a page that cannot be read, or makes it too long. Raises `Problem`."""
        options = self._world.options
        if options.max_offset is not None and offset >= options.max_offset:
            raise Problem.invalid(("cursor", f"must not lead beyond {options.max_offset}"))
        for position, item in enumerate(shown, offset):
            if position == options.bad_offset or item["run_id"] in options.bad_runs:
                if not options.bad_bytes:
                    code = options.bad_code
                    raise Problem(CODES[code], code, "The list cannot be read.")
                item["notes"] = "x" * options.bad_bytes

    def _find(self, request: Request, workspace: Workspace) -> SimulatedRun:
        run = self._world.find(request.path_params["run"], workspace)
        if run is None:
            raise _not_found("run")
        return run

    def _show(self, request: Request, run: SimulatedRun) -> Response:
        world = self._world
        unit = world.options.time_unit
        return JSONResponse(run.as_read(world.now_ms(), unit, self._read_of(request)))

    def _read_of(self, request: Request) -> int | None:
        """The number that signs the links of this read; None where links are not signed."""
        number: int = request.state.number
        return number if self._world.options.signed_links else None

    def _technique(self, request: Request) -> Technique:
        technique = self._world.technique(request.path_params["technique"])
        if technique is None:
            raise _not_found("technique")
        return technique

    def _generation_receipt(self, run: SimulatedRun) -> dict[str, Any]:
        """What FLORA answers to `POST /generate`, which is not the shape of a run."""
        options = self._world.options
        return {
            "run_id": run.run_id,
            "type": "generation",
            "charged_cost": run.cost if run.bill.quote is None else run.bill.quote,
            "estimated_seconds": options.run_seconds / options.speed,
            "model": {"model_id": run.model},
            "poll_url": run.poll_url,
            "project_id": run.workspace.project_id,
        }

    # What every route has in common

    def _route(self, name: str, method: str, path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            world = self._world
            number, at_ms = world.next_request(), world.now_ms()
            request.state.number = number
            throw = Throw(world.options, number)
            gateway = GatewayFault(world.options, name, number)
            if gateway.strikes:
                await request.body()  # read in full: the peer may be gone while the work goes on
                response = await gateway.answer(
                    lambda: self._answer(request, handler, throw),
                    self._courier.background,
                    world.true_ms(),
                )
            else:
                response = await self._answer(request, handler, throw)
                response.headers["request-id"] = (
                    f"req_{digest(world.options.seed, 'request', number)}"
                )
                # By FLORA's clock, not the server's: clients measure its difference from theirs.
                date_ms = world.now_ms() + world.options.date_offset * 1000
                response.headers["date"] = formatdate(date_ms / 1000, usegmt=True)
            status = 0 if isinstance(response, Cut) else response.status_code
            world.counts[name, status] += 1
            world.asked.append(Asked(name, request.path_params.get("run"), at_ms, status))
            return response

        return Route(path, endpoint, methods=[method], name=name)

    async def _answer(self, request: Request, handler: Handler, throw: Throw) -> Response:
        try:
            workspace = self._authenticate(request)
            if throw.fault == "cut_before":
                return Cut(self._connections)
            if throw.fault == "rate_limited":
                return throw.too_many(self._world.now_ms())
            if throw.fault == "error":
                return throw.server_error()
            self._check_refusal(request)
            response = await handler(request, workspace)
        except Problem as problem:
            response = problem.response(details=self._world.options.field_details)
        if throw.fault == "cut_after":
            return Cut(self._connections)
        if throw.fault == "cut_within":
            return Cut(self._connections, response)
        return response

    def _check_refusal(self, request: Request) -> None:
        """Refuses the requests of some routes, where that is wanted. Raises `Problem`."""
        options = self._world.options
        code = options.refuse.get(request.scope["route"].name)
        if code is None and any(map(request.query_params.get, FILTERS)):
            code = options.refuse.get("filtered")
        if code is None:
            return
        if Random(f"{options.seed}/refusal/{request.state.number}").random() < options.refusals:
            raise Problem(CODES[code], code, f"Refused by the simulator: {code}.")

    def _authenticate(self, request: Request) -> Workspace:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Problem(401, "unauthorized", "An API key is required.")
        workspace = self._world.workspace_of(key.strip())
        if workspace is None:
            raise Problem(401, "invalid_api_key", "The API key is not valid.")
        return workspace


def _check_workspace(query: Mapping[str, str], workspace: Workspace) -> None:
    if query.get("workspace_id", workspace.workspace_id) != workspace.workspace_id:
        raise Problem(403, "forbidden", "This key does not belong to that workspace.")


def _answer(run: SimulatedRun, shown: dict[str, Any]) -> Answer:
    body = json.dumps(shown, separators=(",", ":"), ensure_ascii=False).encode()
    return Answer(201 if run.fate.created else 200, body)


def _not_found(what: str) -> Problem:
    return Problem(404, "not_found", f"There is no such {what}.")
