"""FLORA's errors, and the faults of requests: errors, cut connections, a gateway in front."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from email.utils import formatdate
from random import Random
from typing import Any, Final, Literal

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tracker.simulator.options import Options


class ErrorAnswer(Exception):
    """A handler raises it to answer with one of FLORA's errors.

    `fields` are pairs of a field's name and what is wrong with it.
    """

    def __init__(
        self, status: int, code: str, message: str, fields: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.fields = fields

    @classmethod
    def invalid(cls, *fields: tuple[str, str]) -> "ErrorAnswer":
        """A 400 for input that cannot be used, with the fields at fault."""
        return cls(400, "input_validation_error", "The input is not valid.", fields)

    @classmethod
    def not_found(cls, what: str) -> "ErrorAnswer":
        return cls(404, "not_found", f"There is no such {what}.")

    def response(self, *, details: bool = False) -> JSONResponse:
        """The answer in FLORA's shape; with `details` each field has a code and valid values."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.fields:
            error["fields"] = [
                {"field": name, "message": text} | (_details(text) if details else {})
                for name, text in self.fields
            ]
        return JSONResponse({"error": error}, self.status)


def _details(message: str) -> dict[str, Any]:
    start, _, values = message.partition("must be one of ")
    if not start and values:
        return {"code": "invalid_value", "valid_values": values.split(", ")}
    return {"code": "required" if message == "is required" else "invalid"}


FaultName = Literal["cut_before", "cut_after", "cut_within", "rate_limited", "error"]
Work = Coroutine[Any, Any, Response]

_CUTS: Final[Sequence[FaultName]] = ("cut_before", "cut_after", "cut_within")
_RATE_LIMITED: Final = ErrorAnswer(429, "rate_limited", "Too many requests for this workspace.")
_SERVER_ERRORS: Final = (
    ErrorAnswer(500, "internal_error", "Something went wrong on our side."),
    ErrorAnswer(500, "unknown_error", "Something went wrong on our side."),
    ErrorAnswer(503, "service_unavailable", "The service is not available."),
)
_NO_JSON: Final = (
    (500, "text/plain; charset=utf-8", "Internal Server Error"),
    (503, "text/html; charset=utf-8", "<html><body><h1>503 Service Unavailable</h1></body></html>"),
    (503, "application/json", '{"error":{"code":"service_un'),
)
_GATEWAY_TITLES: Final = {
    "502": "Bad Gateway",
    "503": "Service Temporarily Unavailable",
    "504": "Gateway Time-out",
    "404": "Not Found",
    "page": "Welcome",
}


class RequestFault:
    """The fault of one request, if any, and its answers."""

    def __init__(self, options: Options, number: int) -> None:
        self._retry_after = options.retry_after
        self._random = Random(f"{options.seed}/request/{number}")
        cut, rate_limit, errors = (self._random.random() for _ in range(3))
        self.name: FaultName | None = None
        if cut < options.cut:
            self.name = self._random.choice(_CUTS)
        elif rate_limit < options.rate_limit:
            self.name = "rate_limited"
        elif errors < options.errors:
            self.name = "error"

    def too_many(self, now_ms: int) -> Response:
        """A 429: half of them name seconds, a quarter a date, a quarter nothing."""
        response = _RATE_LIMITED.response()
        style, wait = self._random.random(), self._retry_after
        if style < 0.5:
            response.headers["retry-after"] = str(wait)
        elif style < 0.75:
            # A date has no fractions: rounded up, so that it never names a moment too early.
            response.headers["retry-after"] = formatdate(-(-now_ms // 1000) + wait, usegmt=True)
        return response

    def server_error(self) -> Response:
        """A 500 or 503; four in ten have a body that is no JSON."""
        if self._random.random() < 0.4:
            status, media_type, text = self._random.choice(_NO_JSON)
            return Response(text, status, media_type=media_type)
        return self._random.choice(_SERVER_ERRORS).response()


class GatewayFault:
    """Whether a gateway in front of FLORA answers one request, and how.

    FLORA may execute the request all the same.
    """

    def __init__(self, options: Options, route: str, number: int) -> None:
        kind = "reads"
        if route.endswith(".start"):
            kind = "starts"
        elif route.endswith(".list"):
            kind = "pages"
        rate: float = max(options.gateway, getattr(options, f"gateway_{kind}"))
        random = Random(f"{options.seed}/gateway/{number}")
        self.strikes = random.random() < rate
        self._works = random.random() < options.gateway_works
        self._answer = random.choice(options.gateway_answers or ("502",))
        seconds = options.gateway_seconds
        self._patience = None if seconds is None else seconds / options.speed

    async def answer(
        self,
        work: Callable[[], Work],
        run_in_background: Callable[[Work], asyncio.Task[Any]],
        now_ms: int,
    ) -> Response:
        """The gateway's answer; the work goes on where the request reaches FLORA."""
        if self._works:
            await asyncio.wait({run_in_background(work())}, timeout=self._patience)
        headers = {"date": formatdate(now_ms / 1000, usegmt=True), "server": "nginx"}
        if self._answer == "empty":
            return Response(status_code=200, headers=headers)
        status = 200 if self._answer == "page" else int(self._answer)
        title = _GATEWAY_TITLES[self._answer]
        if status != 200:
            title = f"{status} {title}"
        html = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
        return Response(html, status, headers, media_type="text/html")


class CuttableProtocol(H11Protocol):
    """The server's protocol; requests find their connection in `scope["state"]`, to cut it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = self.app_state | {"transport": transport}


class CutConnection(Response):
    """Instead of an answer, the end of the connection, perhaps in the middle of an answer."""

    def __init__(self, begun: Response | None = None) -> None:
        super().__init__(status_code=500)
        self._begun = begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `ConnectionAbortedError` where the server's protocol is not `CuttableProtocol`."""
        if self._begun is not None:
            body = bytes(self._begun.body)
            headers = self._begun.raw_headers
            status = self._begun.status_code
            await send({"type": "http.response.start", "status": status, "headers": headers})
            half = body[: len(body) // 2]
            await send({"type": "http.response.body", "body": half, "more_body": True})
        transport = scope["state"].get("transport")
        if transport is None:
            raise ConnectionAbortedError("the connection was cut")
        transport.abort()
        # The server logs a return without an answer as an error, unless the peer is gone.
        while (await receive())["type"] != "http.disconnect":
            pass
