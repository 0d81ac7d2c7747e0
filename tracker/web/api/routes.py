"""The JSON API under `/api`: its operations, and `/openapi.json`, which describes them.

Nothing is decided here: a request is validated, a service is called, and its result is returned.
"""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import cached_property, partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tracker import views
from tracker.core.errors import FieldFault
from tracker.flora.parse import as_id, as_object
from tracker.receiving.apply import UnknownDelivery
from tracker.services import Services
from tracker.settings.tokens import Scope
from tracker.starting.start import StartRequest
from tracker.store.queries import endpoints, runs, spending, starts, techniques
from tracker.store.queries.deliveries import list_deliveries
from tracker.web.api import OPERATIONS, REPLAYED, Answer, Operation, document, page_json, page_of
from tracker.web.api.batches import BatchOperations
from tracker.web.api.requests import (
    DeliveriesQuery,
    MessagesQuery,
    RunsQuery,
    SpendingQuery,
    StartBody,
    StartsQuery,
    TechniquesQuery,
    TrackBody,
    validate,
    validate_key,
    validate_query,
)
from tracker.web.api.responses import (
    DeliveryResponse,
    MessageDetail,
    MessageResponse,
    Replayed,
    RunResponse,
    SpendingReport,
    StartResponse,
    TechniqueResponse,
    Timeline,
)
from tracker.web.auth import ScopedRoute, actor_of, start_logged
from tracker.web.http import Limits
from tracker.web.http.request import prefix_of, read_json
from tracker.web.http.responses import Fault, Json, invalid, not_found
from tracker.web.stream import Stream, StreamQuery


class Api(BatchOperations):
    """The routes of the API."""

    def __init__(self, services: Services, stream: Stream, *, limits: Limits) -> None:
        self._services = services
        self._database = services.database
        self._stream = stream
        self._limits = limits

    def routes(self) -> list[ScopedRoute]:
        """One route for each path, so that a 405 names all of its methods."""
        paths: dict[str, dict[str, Operation]] = {}
        for one in OPERATIONS:
            paths.setdefault(one.path, {})[one.method] = one
        return [
            *(
                ScopedRoute(
                    path,
                    partial(self._answer, methods),
                    {method: one.scope for method, one in methods.items()},
                )
                for path, methods in paths.items()
            ),
            ScopedRoute("/openapi.json", self._describe, {"GET": Scope.READ}),
        ]

    async def _answer(self, methods: Mapping[str, Operation], request: Request) -> Response:
        one = methods["GET" if request.method == "HEAD" else request.method]
        arguments: dict[str, Any] = {**request.path_params}
        if one.query is not None:
            arguments["query"] = validate_query(one.query, request.query_params)
        if one.body is not None:
            body = await read_json(
                request.scope,
                request.receive,
                limit=getattr(self._limits, one.most),
                seconds=self._limits.api_read_seconds,
            )
            arguments["body"] = validate(one.body, body)
        return await one.handler(self, request, **arguments)

    async def _describe(self, request: Request) -> Response:
        servers = [{"url": prefix_of(request.scope) or "/"}]
        return Json({**self._document, "servers": servers})

    @cached_property
    def _document(self) -> dict[str, Any]:  # takes 25 ms, so not at the start
        return document(OPERATIONS, with_token=len(self._services.settings.access_tokens) > 0)

    @Operation("GET /api/runs", page_of("runs", RunResponse, "A page of runs, newest first."))
    async def list_runs(self, request: Request, query: RunsQuery) -> Response:
        """List runs, newest first."""
        technique_id = await techniques.id_of(self._database, query.technique_id)
        wanted = dict(query) | {"technique_id": technique_id}
        records, cursor = await runs.list_runs(self._database, **wanted)
        return page_json("runs", map(views.run_json, records), cursor)

    @Operation(
        "POST /api/runs",
        {
            201: Answer("The run that was started.", RunResponse),
            200: Answer("The run that this key had started before.", RunResponse, REPLAYED),
        },
        (402, 404, 409, 422, 502, 504),
        scope=Scope.START,
        takes_key=True,
    )
    async def start_run(self, request: Request, body: StartBody) -> Response:
        """Start a run, once per idempotency key.

        The inputs are checked against the technique's definition before anything is paid for. If
        FLORA refuses the start, its error is returned unchanged.
        """
        key = validate_key(request.headers.getlist("idempotency-key"))
        if key is not None and body.idempotency_key not in (None, key):
            raise invalid(FieldFault("idempotency_key", "differs from the header Idempotency-Key"))
        start = StartRequest(
            technique=body.technique,
            inputs=[one.model_dump() for one in body.inputs],
            workspace_id=body.workspace_id,
            idempotency_key=key or body.idempotency_key,
            started_by=actor_of(request.scope).name,
            tags=body.tags,
        )
        started = await start_logged(self._services.starter, request.scope, start)
        run = views.run_json(started.record)
        if started.replayed:
            return Json(run, headers={"Idempotent-Replayed": "true"})
        return Json(run, status_code=201)

    @Operation(
        "POST /api/runs/track",
        {
            201: Answer("The run, tracked from now on.", RunResponse),
            200: Answer("The run, which was tracked already.", RunResponse),
        },
        (502, 504),
        scope=Scope.START,
    )
    async def track_run(self, request: Request, body: TrackBody) -> Response:
        """Track a run that was started elsewhere.

        What the body says about the run's state is ignored: the run is polled at once.
        """
        tracked = await self._services.tracker.track(
            body.run_id,
            technique=body.technique_id or as_id(as_object(body.technique).get("technique_id")),
            workspace_id=body.workspace_id,
            poll_url=body.poll_url,
        )
        return Json(views.run_json(tracked.record), status_code=200 if tracked.known else 201)

    @Operation("GET /api/runs/{run_id}", Answer("The run.", RunResponse))
    async def show_run(self, request: Request, run_id: str) -> Response:
        """Show a run with its outputs."""
        record = await runs.get_run(self._database, run_id)
        if record is None:
            raise _unknown(run_id)
        return Json(views.run_json(record))

    @Operation("GET /api/runs/{run_id}/events", Answer("Its timeline.", Timeline))
    async def show_events(self, request: Request, run_id: str) -> Response:
        """Show the timeline of a run, oldest event first."""
        events = await runs.events(self._database, run_id)
        if not events and await runs.get_run(self._database, run_id) is None:
            raise _unknown(run_id)
        return Json({"events": [views.event_json(event) for event in events]})

    @Operation(
        "GET /api/starts", page_of("starts", StartResponse, "A page of starts, newest first.")
    )
    async def list_starts(self, request: Request, query: StartsQuery) -> Response:
        """List starts, newest first; by default those whose outcome is not known."""
        rows, cursor = await starts.list_starts(
            self._database,
            states=[query.state] if query.state else None,
            workspace_id=query.workspace_id,
            cursor=query.cursor,
            limit=query.limit,
        )
        return page_json("starts", map(views.start_json, rows), cursor)

    @Operation(
        "GET /api/deliveries",
        page_of("deliveries", DeliveryResponse, "A page of callbacks, newest first."),
    )
    async def list_deliveries(self, request: Request, query: DeliveriesQuery) -> Response:
        """List callbacks, newest first, without their bodies."""
        rows, cursor = await list_deliveries(self._database, **dict(query))
        return page_json("deliveries", map(views.delivery_json, rows), cursor)

    @Operation("POST /api/deliveries/{delivery_id}/replay", Answer("The result.", Replayed))
    async def replay_delivery(self, request: Request, delivery_id: str) -> Response:
        """Apply a quarantined callback again; 200 also if it stays quarantined, with the reason."""
        try:
            return Json(asdict(await self._services.replayer.replay(delivery_id)))
        except UnknownDelivery:
            raise not_found(f"There is no delivery {delivery_id[:255]}.") from None

    @Operation(
        "GET /api/messages",
        page_of("messages", MessageResponse, "A page of messages, newest first."),
    )
    async def list_messages(self, request: Request, query: MessagesQuery) -> Response:
        """List messages, the events sent to endpoints, newest first."""
        rows, cursor = await endpoints.list_messages(self._database, **dict(query))
        return page_json("messages", map(views.message_json, rows), cursor)

    @Operation("GET /api/messages/{message_id}", Answer("The message.", MessageDetail))
    async def show_message(self, request: Request, message_id: str) -> Response:
        """Show a message with its body and its attempts."""
        return await self._message(message_id)

    @Operation(
        "POST /api/messages/{message_id}/resend",
        Answer("The message, which is due now.", MessageDetail),
    )
    async def resend_message(self, request: Request, message_id: str) -> Response:
        """Send a message again, whatever its state, under the same `webhook-id`."""
        await self._message(message_id)
        await self._services.webhooks.resend(message_id)
        return await self._message(message_id)

    @Operation("GET /api/spending", Answer("What the runs cost.", SpendingReport))
    async def show_spending(self, request: Request, query: SpendingQuery) -> Response:
        """Show what was spent, and how much of each budget is used."""
        since = self._services.clock() - timedelta(days=query.days)
        rows, total = await spending.spending(
            self._database, query.by, since=since, workspace_id=query.workspace_id
        )
        usages = await self._services.budgets.usages()
        return Json(views.spending_json(query.by, since, rows, total, usages))

    @Operation(
        "GET /api/techniques",
        page_of("techniques", TechniqueResponse, "A page of techniques, by name."),
    )
    async def list_techniques(self, request: Request, query: TechniquesQuery) -> Response:
        """Search the catalogue of techniques, sorted by name."""
        rows, cursor = await techniques.page(self._database, **dict(query))
        return page_json("techniques", map(views.technique_json, rows), cursor)

    @Operation(
        "GET /api/techniques/{technique}", Answer("The technique.", TechniqueResponse), (502, 504)
    )
    async def show_technique(self, request: Request, technique: str) -> Response:
        """Show a technique with its inputs and outputs.

        The definition is fetched from FLORA if it is not known or older than an hour.
        """
        row = await self._services.catalogue.find(technique)
        if row is None:
            raise not_found(f"No technique {technique[:255]} is known here or to FLORA.")
        return Json(views.technique_json(row))

    @Operation(
        "GET /api/stream",
        Answer("Events, for as long as the connection lasts.", content_type="text/event-stream"),
        tag="runs",
    )
    async def follow_runs(self, request: Request, query: StreamQuery) -> Response:
        """Follow changes of runs as they happen.

        Server-sent events, one for each change of a run. The header `Last-Event-ID` resumes a
        stream after an interruption.
        """
        return await self._stream.follow(request, query)

    async def _message(self, message_id: str) -> Response:
        row = await endpoints.get_message(self._database, message_id)
        if row is None:
            raise not_found(f"There is no message {message_id[:255]}.")
        attempts = await endpoints.list_attempts(self._database, message_id)
        return Json(views.message_json(row, attempts))


def _unknown(run_id: str) -> Fault:
    return not_found(f"No run {run_id[:255]} is tracked here.")
