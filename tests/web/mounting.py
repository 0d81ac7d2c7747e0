"""The application mounted in another one, and a client that sees it as if it were not."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from tracker.web.http.server import listen

PREFIX = "/flora"
LINK = re.compile(r"""\b(href|src|action|formaction|hx-get|hx-post|data-stream)="(/(?!/)[^"]*)""")
"""An attribute of a page, and the path that it leads to."""
_OF_THE_BODY = (b"content-length", b"content-encoding")


@asynccontextmanager
async def hosting(mounted: ASGIApp, port: int = 0) -> AsyncIterator[str]:
    """An application with a page of its own and `mounted` below PREFIX, served by uvicorn."""

    async def home(request: Request) -> PlainTextResponse:
        return PlainTextResponse("the host")

    host = Starlette(routes=[Route("/", home), Mount(PREFIX, mounted)])
    async with plain_uvicorn(host, port) as url:
        yield url


@asynccontextmanager
async def plain_uvicorn(app: ASGIApp, port: int = 0, *, root_path: str = "") -> AsyncIterator[str]:
    """Serves `app` with uvicorn's own connections and defaults in this loop."""
    ready = asyncio.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready.set()

    server = Server(uvicorn.Config(app, log_config=None, server_header=False, root_path=root_path))
    with listen("127.0.0.1", port, local_only=True) as sockets:
        task = asyncio.create_task(server._serve(sockets=sockets))
        try:
            await ready.wait()
            yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


class Unmounted(httpx.AsyncHTTPTransport):
    """Asks below PREFIX, and takes it off the answers; each address in them has to begin with it.

    So a test of the application says the same wherever that is mounted.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """What the application answers, without the prefix."""
        asked = httpx.Request(
            request.method,
            request.url.copy_with(raw_path=PREFIX.encode() + request.url.raw_path),
            headers=[(name, _to_prefix(name.lower(), text)) for name, text in request.headers.raw],
            stream=request.stream,
            extensions=request.extensions,
        )
        answer = await super().handle_async_request(asked)
        headers = [(name, _without_prefix(name.lower(), text)) for name, text in answer.headers.raw]
        if not answer.headers.get("content-type", "").startswith("text/html"):
            return httpx.Response(
                answer.status_code,
                headers=headers,
                stream=answer.stream,
                extensions=answer.extensions,
            )
        page = LINK.sub(_link_without_prefix, (await answer.aread()).decode())
        return httpx.Response(
            answer.status_code,
            headers=[one for one in headers if one[0].lower() not in _OF_THE_BODY],
            content=page.encode(),
            extensions=answer.extensions,
        )


def _path_without_prefix(path: str) -> str:
    assert path == PREFIX or path.startswith(f"{PREFIX}/"), path
    return path.removeprefix(PREFIX) or "/"


def _link_without_prefix(found: re.Match[str]) -> str:
    return f'{found[1]}="{_path_without_prefix(found[2])}'


def _to_prefix(name: bytes, value: bytes) -> bytes:
    if name == b"cookie":
        value = value.replace(b"tracker_session=", b"tracker_session-flora=")
        return value.replace(b"__Host-", b"__Secure-")
    if name == b"hx-current-url":
        return re.sub(rb"^(\w+://[^/]*)?/", rb"\1" + PREFIX.encode() + b"/", value)
    return value


def _without_prefix(name: bytes, value: bytes) -> bytes:
    if name in (b"location", b"hx-redirect"):
        return _path_without_prefix(value.decode()).encode()
    if name == b"set-cookie":
        assert f"; Path={PREFIX};" in value.decode()
        value = value.replace(f"; Path={PREFIX};".encode(), b"; Path=/;")
        value = value.replace(b"tracker_session-flora=", b"tracker_session=")
        return value.replace(b"__Secure-", b"__Host-")
    return value
