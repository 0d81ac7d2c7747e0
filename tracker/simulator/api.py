"""FLORA's routes under `/api/v1`."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import formatdate
from typing import Any, Final, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tracker.simulator.callbacks import Courier
from tracker.simulator.catalogue import Technique, find_technique
from tracker.simulator.fate import digest
from tracker.simulator.faults import Connections, Cut, Throw
from tracker.simulator.idempotency import Answer, fingerprint_of
from tracker.simulator.options import Workspace
from tracker.simulator.pages import page
from tracker.simulator.problems import Problem
from tracker.simulator.runs import SimulatedRun
from tracker.simulator.validation import (
    check_generation_start,
    check_technique_start,
    parse_body,
)
from tracker.simulator.world import Asked, World

STATUSES: Final = ("pending", "running", "completed", "failed")

Handler = Callable[[Request, Workspace], Awaitable[Response]]


class Api:
    """The API of one world."""

    def __init__(self, world: World, courier: Courier, connections: Connections) -> None:
        self._world = world
        self._courier = courier
        self._connections = connections

    def routes(self) -> list[Route]:
        """All routes, below `/api/v1`."""
        one = "/techniques/{technique}"
        return [
            self._route("techniques.list", "GET", "/techniques", self.list_techniques),
            self._route("techniques.get", "GET", one, self.get_technique),
            self._route("runs.start", "POST", f"{one}/runs", self.start_run),
            self._route("runs.get", "GET", f"{one}/runs/{{run}}", self.get_technique_run),
            self._route("runs.list", "GET", "/technique-runs", self.list_technique_runs),
            self._route("runs.get_any", "GET", "/runs/{run}", self.get_run),
            self._route("generations.start", "POST", "/generate", self.start_generation),
            self._route("generations.list", "GET", "/generations", self.list_generations),
        ]

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
        items, next_cursor = page(found, query)
        return JSONResponse(
            {
                "techniques": [technique.list_item() for technique in items],
                "meta": {"next_cursor": next_cursor},
            }
        )

    async def get_technique(self, request: Request, workspace: Workspace) -> Response:
        """`GET /techniques/{techniqueId}`."""
        return JSONResponse(_technique(request).definition())

    # Starts

    async def start_run(self, request: Request, workspace: Workspace) -> Response:
        """`POST /techniques/{techniqueId}/runs`: 200 or 201 and the run, both occur."""
        technique = _technique(request)
        body = parse_body(await request.body())
        start = await check_technique_start(body, technique)
        key = start.idempotency_key
        path = f"techniques/{technique.technique_id}/runs"

        def begin() -> tuple[SimulatedRun, Answer]:
            run = self._world.start_technique(
                technique,
                start.inputs,
                callback_url=start.callback_url,
                workspace=workspace,
                unreachable=start.unreachable,
            )
            shown = run.answer_to_start(self._world.options.time_unit)
            return run, _answer(run, shown)

        return await self._start(request, workspace, path, body, key, begin)

    async def start_generation(self, request: Request, workspace: Workspace) -> Response:
        """`POST /generate`."""
        body = parse_body(await request.body())
        start = await check_generation_start(body, workspace.workspace_id)

        def begin() -> tuple[SimulatedRun, Answer]:
            run = self._world.start_generation(
                start.type, start.model, callback_url=start.callback_url, workspace=workspace
            )
            return run, _answer(run, self._generation_receipt(run))

        key = start.idempotency_key
        return await self._start(request, workspace, "generate", body, key, begin)

    async def _start(
        self,
        request: Request,
        workspace: Workspace,
        path: str,
        body: dict[str, Any],
        body_key: str | None,
        begin: Callable[[], tuple[SimulatedRun, Answer]],
    ) -> Response:
        world, owner = self._world, workspace.workspace_id
        header_key = request.headers.get("idempotency-key")
        # Each of the two accounts of idempotency has its own form of the key; both are understood.
        keys = (body_key, header_key)
        first, second = keys if world.options.idempotency == "replay" else reversed(keys)
        key, fingerprint = first or second, fingerprint_of(path, body)
        if key is not None:
            known = world.keys.recall(owner, key, fingerprint, world.now_ms())
            if known is not None:
                return _respond(known, {"idempotent-replayed": "true"})
        run, answer = begin()
        if key is not None:
            world.keys.keep(owner, key, fingerprint, answer, world.now_ms())
        attempted = self._courier.schedule(run)
        if "early" in run.faults:
            await attempted.wait()
        return _respond(answer)

    # Runs

    async def get_technique_run(self, request: Request, workspace: Workspace) -> Response:
        """`GET /techniques/{techniqueId}/runs/{runId}`."""
        technique = _technique(request)
        run = self._find(request, workspace)
        if run.technique != technique:
            raise _not_found("run")
        return self._show(run)

    async def get_run(self, request: Request, workspace: Workspace) -> Response:
        """`GET /runs/{runId}`: a run of either type."""
        return self._show(self._find(request, workspace))

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
        run_type: Literal["technique", "generation"],
        name: str,
    ) -> Response:
        world, query, now_ms = self._world, request.query_params, self._world.now_ms()
        _check_workspace(query, workspace)
        status, technique_id = query.get("status"), query.get("technique_id")
        if status is not None and status not in STATUSES:
            raise Problem.invalid(("status", f"must be one of {', '.join(STATUSES)}"))
        found: Sequence[SimulatedRun] = [
            run
            for run in world.history(run_type, workspace)
            if query.get("project_id") in (None, run.workspace.project_id)
            and (status is None or run.status(now_ms) == status)
            and (
                technique_id is None
                or (run.technique is not None and run.technique.technique_id == technique_id)
            )
        ]
        items, next_cursor = page(found, query)
        unit, with_outputs = world.options.time_unit, world.options.history_outputs
        shown = [run.history_item(now_ms, unit=unit, with_outputs=with_outputs) for run in items]
        meta = {"next_cursor": next_cursor, "total_estimate": len(found)}
        return JSONResponse({name: shown, "meta": meta})

    def _find(self, request: Request, workspace: Workspace) -> SimulatedRun:
        run = self._world.runs.get(request.path_params["run"])
        if run is None or run.workspace != workspace:
            raise _not_found("run")
        return run

    def _show(self, run: SimulatedRun) -> Response:
        return JSONResponse(run.sight(self._world.now_ms(), self._world.options.time_unit))

    def _generation_receipt(self, run: SimulatedRun) -> dict[str, Any]:
        """What FLORA answers to `POST /generate`, which is not the shape of a run."""
        options = self._world.options
        return {
            "run_id": run.run_id,
            "type": "generation",
            "charged_cost": run.cost,
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
            response = await self._answer(request, handler, Throw(world.options, number))
            status = 0 if isinstance(response, Cut) else response.status_code
            world.counts[name, status] += 1
            world.asked.append(Asked(name, request.path_params.get("run"), at_ms, status))
            response.headers["request-id"] = f"req_{digest(world.options.seed, 'request', number)}"
            # By this world's clock, not the server's: who compares the clocks compares with this.
            response.headers["date"] = formatdate(world.now_ms() / 1000, usegmt=True)
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
            response = await handler(request, workspace)
        except Problem as problem:
            response = problem.response()
        if throw.fault == "cut_after":
            return Cut(self._connections)
        if throw.fault == "cut_within":
            return Cut(self._connections, response)
        return response

    def _authenticate(self, request: Request) -> Workspace:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Problem(401, "unauthorized", "An API key is required.")
        workspace = self._world.workspace_of(key.strip())
        if workspace is None:
            raise Problem(401, "invalid_api_key", "The API key is not valid.")
        return workspace


def _technique(request: Request) -> Technique:
    technique = find_technique(request.path_params["technique"])
    if technique is None:
        raise _not_found("technique")
    return technique


def _check_workspace(query: Mapping[str, str], workspace: Workspace) -> None:
    if query.get("workspace_id", workspace.workspace_id) != workspace.workspace_id:
        raise Problem(403, "forbidden", "This key does not belong to that workspace.")


def _answer(run: SimulatedRun, shown: dict[str, Any]) -> Answer:
    body = json.dumps(shown, separators=(",", ":"), ensure_ascii=False).encode()
    return Answer(201 if run.fate.created else 200, body)


def _respond(answer: Answer, headers: Mapping[str, str] | None = None) -> Response:
    return Response(answer.body, answer.status, headers, media_type="application/json")


def _not_found(what: str) -> Problem:
    return Problem(404, "not_found", f"There is no such {what}.")
