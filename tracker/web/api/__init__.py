"""The JSON API under `/api`: operations, and the OpenAPI 3.1 document that describes them.

An operation is a handler with the decorator `Operation`. As in FastAPI, its docstring is the
summary and the description, and the annotations of its parameters `query` and `body` are the models
that validate a request and describe it.

    routes.py     the operations, but those on batches, and `/openapi.json`
    batches.py    the operations on batches, and their responses
    requests.py   the models of bodies and queries, and how a request is validated
    responses.py  the models of all other responses
"""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from starlette.responses import Response

from tracker import __version__
from tracker.settings.tokens import Scope
from tracker.web.api.requests import KeyHeader, PageQuery
from tracker.web.api.responses import Error, Meta, ResponseModel, schema_name
from tracker.web.http.responses import Json

H = TypeVar("H", bound=Callable[..., Awaitable[Response]])
_Json = dict[str, Any]


class Answer(NamedTuple):
    """A successful response; without a model its body is text. `headers` are OpenAPI objects."""

    description: str
    model: type[BaseModel] | None = None
    headers: Mapping[str, _Json] = {}
    content_type: str = "application/json"


def page_of(name: str, model: type[ResponseModel], description: str) -> Answer:
    """A page of a list that is called `name`; `description` says what it lists, in which order."""
    fields: Any = {name: (list[model], ...), "meta": (Meta, ...)}  # type: ignore[valid-type]
    page: type[ResponseModel] = create_model(
        f"{schema_name(model)}Page", __base__=ResponseModel, __doc__=description, **fields
    )
    return Answer(f"{description.rstrip('.').partition(',')[0]}.", page)


def page_json(name: str, items: Iterable[_Json], next_cursor: str | None) -> Response:
    """A response as `page_of` describes it."""
    return Json({name: list(items), "meta": {"next_cursor": next_cursor}})


OPERATIONS: "Final[list[Operation]]" = []
"""All operations, in the order in which their paths are matched: `routes` adds them."""


class Operation:
    """Decorates the handler of a method and path, as in `GET /api/runs`.

    `errors` are statuses of `ERRORS`, besides those that every operation with such parameters may
    answer; `scope` is what a token needs, by default `read` for `GET`, else `admin`; `takes_key` is
    true if it takes the header `Idempotency-Key`; `most` is the limit of its body. The default tag
    is the second part of the path.
    """

    handler: Callable[..., Awaitable[Response]]
    name: str
    query: type[BaseModel] | None
    body: type[BaseModel] | None

    def __init__(
        self,
        endpoint: str,
        answers: Answer | Mapping[int, Answer],
        errors: tuple[int, ...] = (),
        *,
        scope: Scope | None = None,
        tag: str | None = None,
        takes_key: bool = False,
        most: Literal["api_bytes", "batch_bytes"] = "api_bytes",
    ) -> None:
        self.method, self.path = endpoint.split()
        self.scope = scope or (Scope.READ if self.method == "GET" else Scope.ADMIN)
        self.tag = tag or self.path.split("/")[2]
        self.answers = {200: answers} if isinstance(answers, Answer) else answers
        self.errors = frozenset(errors)
        self.takes_key = takes_key
        self.most = most

    def __call__(self, handler: H) -> H:
        first, *words = handler.__name__.split("_")
        parameters = inspect.signature(handler).parameters
        self.handler = handler
        self.name = first + "".join(map(str.capitalize, words))
        self.query, self.body = (
            parameters[name].annotation if name in parameters else None
            for name in ("query", "body")
        )
        if "{" in self.path:
            self.errors |= {404}
        if self.query is not None:
            self.errors |= {400}
        if self.body is not None:
            self.errors |= {400, 408, 413}
        OPERATIONS.append(self)
        return handler


def _header(description: str, **schema: str) -> _Json:
    return {"description": description, "required": True, "schema": {"type": "string", **schema}}


REPLAYED: Final = {"Idempotent-Replayed": _header("Nothing new was started.", const="true")}
ERRORS: Final[dict[int, tuple[str, str, dict[str, _Json]]]] = {
    400: ("Invalid", "The request is invalid; `fields` lists each fault.", {}),
    401: (
        "Unauthorized",
        "The token is missing, wrong or expired.",
        {"WWW-Authenticate": _header("The authentication scheme.", const="Bearer")},
    ),
    402: (
        "NoCredits",
        "FLORA: the workspace has no credits left. `budget_exceeded`, `max_cost_exceeded`: the "
        "price exceeds what is left of a budget, or the maximum; nothing was sent.",
        {},
    ),
    403: (
        "Forbidden",
        "The token lacks the scope. Where no token is set, only this machine is served.",
        {},
    ),
    404: ("NotFound", "It does not exist.", {}),
    408: ("TooSlow", "The body did not arrive in time.", {}),
    409: ("Unresolved", "Whether FLORA started it is unknown; it is not sent again.", {}),
    413: ("TooLarge", "The body is longer than 1 MiB; that of a batch, than 8 MiB.", {}),
    422: (
        "Conflict",
        "The idempotency key was used for another body. `invalid_rows`: `fields` lists each cause "
        "with its rows. `definition_changed`: the technique's inputs differ from those of the "
        "batch so far.",
        {},
    ),
    429: (
        "TooManyWrongTokens",
        "Too many wrong tokens came from this address; a valid token is accepted at any time.",
        {"Retry-After": _header("Seconds to wait.", pattern="^[0-9]+$")},
    ),
    502: ("FloraFailed", "FLORA cannot be reached, or refuses the API key.", {}),
    503: ("Unavailable", "The database or FLORA is unavailable, or a setting is missing.", {}),
    504: (
        "FloraTimeout",
        "FLORA did not answer in time. `start_pending`: the start was sent and its outcome is not "
        "known yet; the same key returns it later.",
        {},
    ),
}
"""Name, description and headers of each error, by status."""

_PATH_PARAMETERS: Final = {
    "run_id": ("FLORA's `run_…` identifier.", "run_abc123"),
    "batch_id": ("The batch's `bat_…` identifier.", "bat_0123456789abcdef"),
    "technique": ("Its id or its slug.", "icon-pack"),
    "delivery_id": ("FLORA's `whd_…` identifier.", "whd_abc123"),
    "message_id": ("The `webhook-id` of the message.", "msg_abc123"),
}
_SCHEMAS: Final = "#/components/schemas/{model}"
_SECURITY: Final = {
    "type": "http",
    "scheme": "bearer",
    "description": "TRACKER_API_TOKEN, or one of [[tokens]] with the scope `read`; with the scope "
    "`start` for what starts or tracks runs, `admin` for what resends messages.",
}


class _SchemaGenerator(GenerateJsonSchema):
    def normalize_name(self, name: str) -> str:
        """The name under which others refer to the schema; see `schema_name`."""
        return super().normalize_name(name).removesuffix("Response")


def document(operations: Iterable[Operation], *, with_token: bool) -> _Json:
    """The OpenAPI document. `with_token`: whether requests need a token."""
    operations = list(operations)
    named: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {(Error, "serialization"): None}
    for one in operations:
        if one.body is not None:
            named[one.body, "validation"] = None
        for answer in one.answers.values():
            if answer.model is not None:
                named[answer.model, "serialization"] = None
    refs, definitions = models_json_schema(
        list(named), ref_template=_SCHEMAS, schema_generator=_SchemaGenerator
    )

    def content(model: type[BaseModel], mode: JsonSchemaMode) -> _Json:
        return {"application/json": {"schema": dict(refs[model, mode])}}

    def response(answer: Answer) -> _Json:
        described: _Json = {"description": answer.description}
        if answer.model is not None:
            described["content"] = content(answer.model, "serialization")
        else:
            described["content"] = {answer.content_type: {"schema": {"type": "string"}}}
        return described | ({"headers": dict(answer.headers)} if answer.headers else {})

    always = (401, 403, 429, 503) if with_token else (403, 503)
    paths: dict[str, _Json] = {}
    for one in operations:
        summary, _, description = (inspect.getdoc(one.handler) or "").partition("\n\n")
        if one.scope is Scope.ADMIN:
            description = f"{description}\n\nNeeds a token with the scope `admin`.".strip()
        paths.setdefault(one.path, {})[one.method.lower()] = {
            "operationId": one.name,
            "tags": [one.tag],
            "summary": summary.removesuffix("."),
            **({"description": description.replace("\n", " ")} if description else {}),
            "parameters": list(_parameters(one)),
            **(
                {"requestBody": {"required": True, "content": content(one.body, "validation")}}
                if one.body
                else {}
            ),
            "responses": {
                **{str(status): response(answer) for status, answer in one.answers.items()},
                **{
                    str(status): {"$ref": f"#/components/responses/{ERRORS[status][0]}"}
                    for status in sorted({*one.errors, *always})
                },
            },
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FLORA run tracker",
            "version": __version__,
            "description": "Runs of FLORA techniques: started once, tracked to their final "
            "status, outputs and cost. Times are ISO 8601 in UTC, costs are USD.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "responses": {
                name: response(Answer(description, Error, headers))
                for name, description, headers in ERRORS.values()
            },
            **({"securitySchemes": {"token": _SECURITY}} if with_token else {}),
        },
        **({"security": [{"token": []}]} if with_token else {}),
    }


def _parameters(one: Operation) -> Iterable[_Json]:
    for name, (description, example) in _PATH_PARAMETERS.items():
        if f"{{{name}}}" in one.path:
            yield {
                "name": name,
                "in": "path",
                "required": True,
                "description": description,
                "schema": {"type": "string", "minLength": 1, "maxLength": 255},
                "example": example,
            }
    for where, model in (("query", one.query), ("header", KeyHeader if one.takes_key else None)):
        if model is not None:
            properties = model.model_json_schema()["properties"]
            # The page comes last: some generated clients have parameters by position.
            for name in sorted(properties, key=PageQuery.model_fields.__contains__):
                schema = properties[name]
                described = {key: schema.pop(key) for key in ("description",) if key in schema}
                schema.pop("title", None)
                if schema.get("default", 0) is None:
                    del schema["default"]
                yield {"name": name, "in": where, "required": False, **described, "schema": schema}
