"""The target for downloads: raw answers of a file's server."""

import asyncio
import hashlib
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx

from tests.delivering.far_end import far_end
from tracker.delivering.addresses import MediaError
from tracker.delivering.fetch import Fetcher

LARGEST = 100_000
"""Maximum size of a file in bytes."""
MOST = 4
"""Maximum number of answers, one for each request; the last one repeats."""


class _ToTestServer(httpx.AsyncBaseTransport):
    """Sends every request to the test's server; other tests cover the permitted addresses."""

    def __init__(self) -> None:
        self.port = 0
        self._inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url.copy_with(scheme="http", host="127.0.0.1", port=self.port)
        here = httpx.Request(request.method, url, headers=request.headers, stream=request.stream)
        return await self._inner.handle_async_request(here)

    async def aclose(self) -> None:
        await self._inner.aclose()


@asynccontextmanager
async def files() -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """A file is stored complete under its name, or one error describes why not.

    An input is one answer or several, divided by `====`; their line ends are HTTP's.
    """
    here = _ToTestServer()
    fetcher = Fetcher(max_bytes=LARGEST, stall=2.0, connect=2.0, sleep=_no_wait)
    fetcher._new_http = partial(httpx.AsyncClient, transport=here)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        async def check(data: bytes) -> None:
            replies = [_raw_answer(one) for one in data.split(b"\n====\n")[:MOST]]
            async with far_end(*replies) as end:
                here.port = end.port
                await _is_complete_or_refused(fetcher, end.url("/file.part"), folder)
            for path in folder.iterdir():
                path.unlink()

        yield check


def _raw_answer(answer: bytes) -> bytes:
    head, line, body = answer.partition(b"\n\n")
    return re.sub(rb"\r?\n", b"\r\n", head) + (b"\r\n\r\n" if line else b"") + body


async def _is_complete_or_refused(fetcher: Fetcher, link: str, folder: Path) -> None:
    try:
        fetched = await fetcher.fetch(link, folder, "file", output_type="imageUrl")
    except MediaError:
        assert {path.name for path in folder.iterdir()} <= {"file.part", "file.part.json"}
        return
    assert [path.name for path in folder.iterdir()] == [fetched.path.name]
    assert re.fullmatch(r"file\.(?!part$)[a-z0-9+-]+", fetched.path.name), fetched.path.name
    content = fetched.path.read_bytes()
    assert len(content) == fetched.size <= LARGEST
    assert hashlib.sha256(content).hexdigest() == fetched.sha256


async def _no_wait(seconds: float) -> None:
    await asyncio.sleep(0)
