"""`/api/runs`: runs are started, taken over and shown."""

from datetime import timedelta

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import FieldFault
from tracker.services import Services
from tracker.starting.start import StartRequest
from tracker.store.queries import runs as read
from tracker.store.queries import starts, techniques
from tracker.store.queries.spending import spending
from tracker.views import event_json, run_json, spending_json, start_json, technique_json
from tracker.web.api.requests import (
    ListQuery,
    SpendingQuery,
    StartBody,
    StartsQuery,
    TechniqueQuery,
    TrackBody,
    checked,
    checked_key,
    checked_query,
)
from tracker.web.auth import actor_of
from tracker.web.http.answers import Json
from tracker.web.http.body import read_json
from tracker.web.http.errors import Fault, invalid, not_found
from tracker.web.http.limits import Limits
from tracker.web.http.origin import peer_of

log = structlog.get_logger(__name__)


class Runs:
    """The endpoints."""

    def __init__(self, services: Services, *, limits: Limits) -> None:
        self._services = services
        self._limits = limits

    def routes(self) -> list[Route]:
        """The routes, in the order in which they are to be tried."""
        return [
            Route("/api/runs", self.collection, methods=["GET", "POST"]),
            Route("/api/runs/track", self.track, methods=["POST"]),
            Route("/api/runs/{run_id}", self.show, methods=["GET"]),
            Route("/api/runs/{run_id}/events", self.events, methods=["GET"]),
        ]

    async def collection(self, request: Request) -> Response:
        """`GET` lists, `POST` starts: one route, so that a 405 names both."""
        return await (self.start if request.method == "POST" else self.list)(request)

    async def start(self, request: Request) -> Response:
        """Starts a run: 201, or 200 where this key has started it already."""
        body = checked(StartBody, await self._json(request))
        key = checked_key(request.headers.getlist("idempotency-key"))
        if key is not None and body.idempotency_key not in (None, key):
            raise invalid(FieldFault("idempotency_key", "differs from the header Idempotency-Key"))
        asked = StartRequest(
            technique=body.technique,
            inputs=[one.model_dump() for one in body.inputs],
            workspace_id=body.workspace_id,
            idempotency_key=key or body.idempotency_key,
            started_by=actor_of(request.scope).name,
            tags=body.tags,
        )
        who = {"token": actor_of(request.scope).name, "peer": peer_of(request.scope)}
        # Before anything is sent: whatever becomes of it, the log has who asked for it.
        log.info("run.start_requested", technique=asked.technique, key=asked.idempotency_key, **who)
        started = await self._services.starter.start(asked)
        run = run_json(started.record)
        if started.replayed:
            return Json(run, headers={"Idempotent-Replayed": "true"})
        log.info(
            "run.started",
            run_id=started.record.run.run_id,
            technique_id=started.record.run.technique_id,
            **who,
        )
        return Json(run, status_code=201)

    async def track(self, request: Request) -> Response:
        """Takes over a run that was started elsewhere: 201, or 200 where it was known."""
        body = checked(TrackBody, await self._json(request))
        tracked = await self._services.tracker.track(
            body.run_id,
            technique=body.technique_id,
            workspace_id=body.workspace_id,
            poll_url=body.poll_url,
        )
        return Json(run_json(tracked.record), status_code=200 if tracked.known else 201)

    async def list(self, request: Request) -> Response:
        """One page of runs, newest first."""
        query = checked_query(ListQuery, request.query_params)
        records, next_cursor = await read.list_runs(
            self._services.database,
            status=query.status,
            technique_id=query.technique_id,
            workspace_id=query.workspace_id,
            project_id=query.project_id,
            tag=query.tag,
            tracking=query.tracking,
            retry_advice=query.retry_advice,
            cursor=query.cursor,
            limit=query.limit,
        )
        return Json(
            {
                "runs": [run_json(record) for record in records],
                "meta": {"next_cursor": next_cursor},
            }
        )

    async def show(self, request: Request) -> Response:
        """One run with its outputs."""
        run_id = request.path_params["run_id"]
        record = await read.get_run(self._services.database, _possible(run_id))
        if record is None:
            raise _unknown(run_id)
        return Json(run_json(record))

    async def events(self, request: Request) -> Response:
        """A run's timeline, oldest first."""
        run_id = request.path_params["run_id"]
        events = await read.events(self._services.database, _possible(run_id))
        if not events and await read.get_run(self._services.database, run_id) is None:
            raise _unknown(run_id)
        return Json({"events": [event_json(event) for event in events]})

    async def _json(self, request: Request) -> object:
        return await read_json(
            request.scope,
            request.receive,
            limit=self._limits.api_bytes,
            seconds=self._limits.api_read_seconds,
        )


def _possible(run_id: str) -> str:
    """`run_id`, where a run could have it: no database is asked for one with a NUL in it."""
    if "\0" in run_id or len(run_id) > 255:
        raise _unknown(run_id)
    return run_id


def _unknown(run_id: str) -> Fault:
    return not_found(f"No run {run_id[:255]} is tracked here.")


# `/api/starts`: what was asked of FLORA, and what came of it.


class StartLog:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/api/starts", self.list, methods=["GET"])]

    async def list(self, request: Request) -> Response:
        """One page of starts, newest first; without a state those whose outcome is not known."""
        query = checked_query(StartsQuery, request.query_params)
        rows, next_cursor = await starts.list_starts(
            self._services.database,
            states=[query.state] if query.state else None,
            workspace_id=query.workspace_id,
            cursor=query.cursor,
            limit=query.limit,
        )
        return Json(
            {"starts": [start_json(row) for row in rows], "meta": {"next_cursor": next_cursor}}
        )


# `/api/spending`: what was spent, and how far each budget is used.


class SpendingReport:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/api/spending", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """What the runs of the last days cost, the budgets beside it."""
        query = checked_query(SpendingQuery, request.query_params)
        since = self._services.clock() - timedelta(days=query.days)
        rows, total = await spending(
            self._services.database, query.by, since=since, workspace_id=query.workspace_id
        )
        usages = await self._services.budgets.usages()
        return Json(spending_json(query.by, since, rows, total, usages))


# `/api/techniques`: FLORA's catalogue, as it is known here.


class Techniques:
    """The endpoints."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """The routes, in the order in which they are to be tried."""
        return [
            Route("/api/techniques", self.list, methods=["GET"]),
            Route("/api/techniques/{technique}", self.show, methods=["GET"]),
        ]

    async def list(self, request: Request) -> Response:
        """One page of the techniques that are known, by name."""
        query = checked_query(TechniqueQuery, request.query_params)
        rows, next_cursor = await techniques.page(
            self._services.database,
            query=query.query,
            gone=query.gone,
            cursor=query.cursor,
            limit=query.limit,
        )
        return Json(
            {
                "techniques": [technique_json(row) for row in rows],
                "meta": {"next_cursor": next_cursor},
            }
        )

    async def show(self, request: Request) -> Response:
        """One technique with its inputs and outputs; FLORA is asked where they are not known."""
        technique = request.path_params["technique"]
        row = await self._services.catalogue.find(technique)
        if row is None:
            raise not_found(f"No technique {technique[:255]} is known here or to FLORA.")
        return Json(technique_json(row))
