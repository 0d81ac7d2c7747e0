"""`/openapi.json`: the API described by the very models that validate what is asked of it.

`operations` lists what there is; here it becomes an OpenAPI 3.1 document. The schemas of requests
are those of `schemas`, the schemas of answers those of `shapes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker import __version__
from tracker.services import Services
from tracker.web.api import responses as shapes
from tracker.web.api.requests import (
    KeyHeader,
    ListQuery,
    SpendingQuery,
    StartBody,
    StartsQuery,
    TechniqueQuery,
    TrackBody,
)
from tracker.web.http.answers import Json
from tracker.web.stream.endpoint import StreamQuery

# What can be done under `/api`: one entry for each method of each route.
#
# A test holds this list to the routes, so a new route is described here as well.


ERROR: Final = shapes.Error


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. `headers` gives each header's description and schema."""

    description: str
    shape: type[BaseModel] | None = None
    content_type: str = "application/json"
    headers: Mapping[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An error that several operations share, by its name in the document."""

    name: str
    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one route.

    `in_path` gives description and example of each part of the path; `refusals` are statuses of
    `REFUSALS`, beside those that every operation has.
    """

    method: str
    path: str
    name: str
    tag: str
    summary: str
    answers: Mapping[int, Answer]
    description: str = ""
    in_path: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    takes_key: bool = False
    refusals: tuple[int, ...] = ()


def _error(description: str, **headers: tuple[str, dict[str, Any]]) -> Answer:
    named = {name.replace("_", "-"): told for name, told in headers.items()}
    return Answer(description=description, shape=ERROR, headers=named)


_SECONDS: Final = {"type": "string", "pattern": "^[0-9]+$"}

REFUSALS: Final = {
    400: Refusal(name="Invalid", answer=_error("What was asked is wrong; `fields` says where.")),
    401: Refusal(
        name="Unauthorized",
        answer=_error(
            "The token is missing, wrong or expired.",
            WWW_Authenticate=("How to show it.", {"type": "string", "const": "Bearer"}),
        ),
    ),
    402: Refusal(
        name="NoCredits",
        answer=_error(
            "FLORA: the workspace has no credits left. `budget_exceeded`: the price does not fit "
            "what a budget has left; nothing was sent."
        ),
    ),
    403: Refusal(
        name="Forbidden",
        answer=_error("The token lacks the scope; where none is set, only this machine is served."),
    ),
    404: Refusal(name="NotFound", answer=_error("There is no such thing.")),
    408: Refusal(name="TooSlow", answer=_error("The body did not come in time.")),
    409: Refusal(
        name="Unresolved",
        answer=_error("It cannot be told whether FLORA started it; nothing is sent again."),
    ),
    413: Refusal(name="TooLarge", answer=_error("The body is longer than a mebibyte.")),
    422: Refusal(name="KeyConflict", answer=_error("The key was used for another body.")),
    429: Refusal(
        name="TooManyWrongTokens",
        answer=_error(
            "Too many wrong tokens came from this address; a right one is taken at any time.",
            Retry_After=("Seconds to wait.", _SECONDS),
        ),
    ),
    502: Refusal(name="FloraFailed", answer=_error("FLORA cannot be used, or refuses the key.")),
    503: Refusal(name="Unavailable", answer=_error("Something is down or busy, or not set up.")),
    504: Refusal(
        name="FloraTimeout",
        answer=_error(
            "FLORA gave no answer in time; `start_pending`: a start was sent and its outcome is "
            "not known yet, the same key tells later what came of it."
        ),
    ),
}

_RUN_ID: Final = {"run_id": ("FLORA's `run_…` identifier.", "run_abc123")}
_TECHNIQUE: Final = {"technique": ("Its id or its slug.", "icon-pack")}
_OF_BODIES: Final = (400, 408, 413)
_OF_FLORA: Final = (502, 504)

OPERATIONS: Final = (
    Operation(
        method="GET",
        path="/api/runs",
        name="listRuns",
        tag="runs",
        summary="List runs, newest first",
        query=ListQuery,
        answers={200: Answer(description="A page of runs.", shape=shapes.RunPage)},
        refusals=(400,),
    ),
    Operation(
        method="POST",
        path="/api/runs",
        name="startRun",
        tag="runs",
        summary="Start a run, once for each key",
        description="The inputs are checked against the technique's definition before anything is "
        "paid for. What FLORA itself refuses comes through as it said it.",
        body=StartBody,
        takes_key=True,
        answers={
            201: Answer(description="The run that was started.", shape=shapes.Run),
            200: Answer(
                description="The run that this key had started before.",
                shape=shapes.Run,
                headers={
                    "Idempotent-Replayed": (
                        "Nothing new was started.",
                        {"type": "string", "const": "true"},
                    )
                },
            ),
        },
        refusals=(*_OF_BODIES, 402, 404, 409, 422, *_OF_FLORA),
    ),
    Operation(
        method="POST",
        path="/api/runs/track",
        name="trackRun",
        tag="runs",
        summary="Track a run that was started elsewhere",
        description="What is said of its state is not believed: the run is read at once.",
        body=TrackBody,
        answers={
            201: Answer(description="The run, tracked from now on.", shape=shapes.Run),
            200: Answer(description="The run, which was tracked already.", shape=shapes.Run),
        },
        refusals=_OF_BODIES,
    ),
    Operation(
        method="GET",
        path="/api/runs/{run_id}",
        name="showRun",
        tag="runs",
        summary="Show a run with its outputs",
        in_path=_RUN_ID,
        answers={200: Answer(description="The run.", shape=shapes.Run)},
        refusals=(404,),
    ),
    Operation(
        method="GET",
        path="/api/runs/{run_id}/events",
        name="showEvents",
        tag="runs",
        summary="Show what was seen of a run, and by whom",
        in_path=_RUN_ID,
        answers={200: Answer(description="Its timeline.", shape=shapes.Timeline)},
        refusals=(404,),
    ),
    Operation(
        method="GET",
        path="/api/starts",
        name="listStarts",
        tag="starts",
        summary="List starts, by default those whose outcome is not known",
        query=StartsQuery,
        answers={200: Answer(description="A page of starts.", shape=shapes.StartPage)},
        refusals=(400,),
    ),
    Operation(
        method="GET",
        path="/api/spending",
        name="showSpending",
        tag="spending",
        summary="Show what was spent, and how far each budget is used",
        query=SpendingQuery,
        answers={200: Answer(description="What the runs cost.", shape=shapes.SpendingReport)},
        refusals=(400,),
    ),
    Operation(
        method="GET",
        path="/api/techniques",
        name="listTechniques",
        tag="techniques",
        summary="Search the catalogue",
        query=TechniqueQuery,
        answers={200: Answer(description="A page of techniques.", shape=shapes.TechniquePage)},
        refusals=(400,),
    ),
    Operation(
        method="GET",
        path="/api/techniques/{technique}",
        name="showTechnique",
        tag="techniques",
        summary="Show a technique with its inputs and outputs",
        description="FLORA is asked where the definition is not known, or an hour old.",
        in_path=_TECHNIQUE,
        answers={200: Answer(description="The technique.", shape=shapes.Technique)},
        refusals=(404, *_OF_FLORA),
    ),
    Operation(
        method="GET",
        path="/api/stream",
        name="followRuns",
        tag="runs",
        summary="Follow changes of runs as they happen",
        description="Server-sent events, one for each change of a run; `Last-Event-ID` goes on "
        "where a connection broke off.",
        query=StreamQuery,
        answers={
            200: Answer(
                description="Events, for as long as the connection lasts.",
                content_type="text/event-stream",
            )
        },
        refusals=(400,),
    ),
)


_REF: Final = "#/components/schemas/{model}"
_ABOUT: Final = (
    "Runs of FLORA techniques: started once, tracked to their true end, and shown. Times are ISO "
    "8601 in UTC, costs are USD. Errors have FLORA's own shape."
)


class Description:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._with_token = len(services.settings.access_tokens) > 0

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/openapi.json", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """The document."""
        return Json(self._document)

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(OPERATIONS, with_token=self._with_token)  # takes 25 ms, so not at the start


def document(operations: Iterable[Operation], *, with_token: bool) -> dict[str, Any]:
    """The OpenAPI document. `with_token` tells whether requests have to show one."""
    operations = list(operations)
    schemas = _Schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described = _operation(operation, schemas, with_token=with_token)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    components: dict[str, Any] = {
        "schemas": schemas.definitions,
        "responses": {
            refusal.name: _answer(refusal.answer, schemas) for refusal in REFUSALS.values()
        },
    }
    told: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "FLORA run tracker",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": components,
    }
    if with_token:
        components["securitySchemes"] = {
            "token": {
                "type": "http",
                "scheme": "bearer",
                "description": "TRACKER_API_TOKEN, or one of [[tokens]] with the scope read, for "
                "what starts or tracks runs the scope start.",
            }
        }
        told["security"] = [{"token": []}]
    return told


@dataclass(slots=True)
class _Schemas:
    """The schemas of all models that operations name, each under one name."""

    operations: Sequence[Operation]
    definitions: dict[str, Any] = field(init=False)
    _refs: Mapping[Any, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        named: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {(ERROR, "serialization"): None}
        for operation in self.operations:
            if operation.body is not None:
                named[operation.body, "validation"] = None
            for answer in operation.answers.values():
                if answer.shape is not None:
                    named[answer.shape, "serialization"] = None
        self._refs, rest = models_json_schema(list(named), ref_template=_REF)
        self.definitions = rest["$defs"]

    def of(self, model: type[BaseModel], mode: JsonSchemaMode) -> dict[str, Any]:
        """A reference to the model's schema."""
        return dict(self._refs[model, mode])


def _operation(operation: Operation, schemas: _Schemas, *, with_token: bool) -> dict[str, Any]:
    refusals = {*operation.refusals, *((401, 403, 429) if with_token else (403,)), 503}
    told: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": list(_parameters(operation)),
        "responses": {
            **{str(code): _answer(one, schemas) for code, one in operation.answers.items()},
            **{
                str(code): {"$ref": f"#/components/responses/{REFUSALS[code].name}"}
                for code in sorted(refusals)
            },
        },
    }
    if operation.description:
        told["description"] = operation.description
    if operation.body is not None:
        schema = schemas.of(operation.body, "validation")
        told["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return told


def _parameters(operation: Operation) -> Iterable[dict[str, Any]]:
    """What stands in the path, in the query and in the headers."""
    for name, (description, example) in operation.in_path.items():
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": description,
            "schema": {"type": "string", "minLength": 1, "maxLength": 255},
            "example": example,
        }
    if operation.query is not None:
        for name, schema in operation.query.model_json_schema()["properties"].items():
            yield _parameter(name, "query", schema)
    if operation.takes_key:
        schema = KeyHeader.model_json_schema()["properties"]["key"]
        schema["description"] = "As the field `idempotency_key`."
        yield _parameter("Idempotency-Key", "header", schema)


def _parameter(name: str, where: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter that may be left out."""
    kept = {key: value for key, value in schema.items() if key not in ("title", "description")}
    if kept.get("default", 0) is None:
        del kept["default"]
    described = {"description": schema["description"]} if "description" in schema else {}
    return {"name": name, "in": where, "required": False, **described, "schema": kept}


def _answer(answer: Answer, schemas: _Schemas) -> dict[str, Any]:
    told: dict[str, Any] = {"description": answer.description}
    if answer.shape is not None:
        schema = schemas.of(answer.shape, "serialization")
        told["content"] = {answer.content_type: {"schema": schema}}
    elif answer.content_type != "application/json":
        told["content"] = {answer.content_type: {"schema": {"type": "string"}}}
    if answer.headers:
        told["headers"] = {
            name: {"description": description, "required": True, "schema": schema}
            for name, (description, schema) in answer.headers.items()
        }
    return told
