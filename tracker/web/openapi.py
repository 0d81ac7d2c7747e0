"""`/openapi.json`: the API described by the very models that validate what is asked of it.

`operations` lists what there is; here it becomes an OpenAPI 3.1 document. The schemas of requests
are those of `schemas`, the schemas of answers those of `shapes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker import __version__
from tracker.web.answers import Json
from tracker.web.operations import ERROR, OPERATIONS, REFUSALS, Answer, Operation
from tracker.web.schemas import KeyHeader
from tracker.web.services import Services

_REF: Final = "#/components/schemas/{model}"
_ABOUT: Final = (
    "Runs of FLORA techniques: started once, tracked to their true end, and shown. Times are ISO "
    "8601 in UTC, costs are USD. Errors have FLORA's own shape."
)


class Description:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._document = document(OPERATIONS, with_token=len(services.settings.access_tokens) > 0)

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/openapi.json", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """The document."""
        return Json(self._document)


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
