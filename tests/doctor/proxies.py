"""What stands in front of a tracker, and what it does to callbacks on their way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import httpx
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.web.serving import serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """A proxy that passes requests on to `upstream`, and one thing that is wrong with it."""

    upstream: str
    path: str | None = None
    limit: int | None = None
    wait: float = 0
    holds: bool = False
    drops: str = ""
    changes: bool = False
    answers: Response | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        request = Request(scope, receive)
        body = await request.body()
        if self.wait:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.wait):
                    await receive()  # the client hung up
        await (await self._answer(request, body))(scope, receive, send)

    async def _answer(self, request: Request, body: bytes) -> Response:
        if self.answers is not None:
            return self.answers
        if self.limit is not None and len(body) > self.limit:
            return HTMLResponse("<h1>413 Request Entity Too Large</h1>", 413)
        headers = {
            name: value
            for name, value in request.headers.items()
            if name not in ("host", "content-length", self.drops)
        }
        url = self.upstream + (request.url.path if self.path is None else self.path)
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                answer = await http.request(
                    request.method, url, content=body + b" " * self.changes, headers=headers
                )
            except httpx.TransportError:
                return PlainTextResponse("Bad Gateway", 502)
        kept = {name: value for name, value in answer.headers.items() if name != "content-length"}
        if self.holds and answer.is_success:
            await request.receive()  # what was stored is not answered before the client hangs up
        return Response(answer.content, answer.status_code, kept)


@asynccontextmanager
async def in_front(app: ASGIApp) -> AsyncIterator[str]:
    """Serves it on a port of its own, and says where."""
    async with serving(app) as root:
        yield root


def moved(to: str) -> Response:
    """A redirect, as for http to https or for a slash at the end."""
    return RedirectResponse(f"{to}/callbacks/flora/?token=hidden", 308)
