"""One link becomes one file: whole, of the size that was announced, under its name only then.

An attempt goes on where the one before broke off, if the server says under the same validator that
it can; else it begins anew. There is no limit on the whole time, only on standing still.
"""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, Self

import httpx

from tracker import __version__
from tracker.core.net import is_bounded
from tracker.delivering.endings import ending
from tracker.delivering.errors import LinkRefused, MediaError, MediaUnavailable
from tracker.delivering.guard import GuardedTransport, Resolver, resolve
from tracker.delivering.part import Mark, Part

MAX_BYTES: Final = 2 * 1024**3
HOPS: Final = 5
ATTEMPTS: Final = 5
"""So many attempts in a row may bring nothing."""
LONGEST_PAUSE: Final = 60.0
STALL_BYTES: Final = 16 * 1024
"""What has to come within the time for standing still; less is as good as nothing."""

_GONE: Final = (401, 403, 404, 410)
_PASSING: Final = (408, 425, 429)
_RANGE: Final = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)", re.ASCII)
_SURE_AFTER: Final = timedelta(seconds=60)
"""A Last-Modified names one state of a file for certain once it is so old."""

Sleep = Callable[[float], Awaitable[None]]
OnBytes = Callable[[int, int | None], None]
"""Told how many bytes are there, and of how many, if that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A file that is there. `size` is in bytes, `sha256` in hex."""

    path: Path
    size: int
    sha256: str
    content_type: str | None = None
    resumed: bool = False


class Fetcher:
    """Fetches files. Used as `async with Fetcher() as fetcher`.

    `allow_private` lets links lead into this network or machine. `stall` is for how many seconds a
    connection may bring (next to) nothing, `connect` how long making one may take.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        max_bytes: int = MAX_BYTES,
        stall: float = 60.0,
        connect: float = 10.0,
        resolver: Resolver = resolve,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._max_bytes = max_bytes
        self._stall = stall
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            transport=GuardedTransport(allow_private=allow_private, resolver=resolver),
            # Bytes as they are, so that their number can be checked and a part be gone on with.
            headers={
                "accept": "*/*",
                "accept-encoding": "identity",
                "user-agent": f"flora-run-tracker/{__version__}",
            },
            timeout=httpx.Timeout(stall, connect=connect, pool=None),
            follow_redirects=False,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def fetch(
        self,
        link: str,
        folder: Path,
        stem: str,
        *,
        output_type: str = "",
        on_bytes: OnBytes | None = None,
    ) -> Fetched:
        """Fetch `link` into `folder`, as a file whose name is `stem` and an ending.

        Raises `LinkRefused` and `MediaError` where it cannot be had, `MediaUnavailable` where it
        could not be had in several attempts (then a part may be left), `OSError` where the file
        cannot be written.
        """
        part = Part(folder, stem)
        fruitless, furthest = 0, 0
        try:
            while True:
                try:
                    return await self._attempt(link, part, folder, stem, output_type, on_bytes)
                except MediaUnavailable as trouble:
                    came_on = part.size >= furthest + STALL_BYTES
                    fruitless = 0 if came_on else fruitless + 1
                    furthest = max(furthest, part.size)
                    if fruitless >= ATTEMPTS:
                        raise
                    await self._sleep(_pause(fruitless, trouble.retry_after))
        finally:
            part.close()

    async def _attempt(
        self,
        link: str,
        part: Part,
        folder: Path,
        stem: str,
        output_type: str,
        on_bytes: OnBytes | None,
    ) -> Fetched:
        left = await asyncio.to_thread(part.mark)
        async with AsyncExitStack() as stack:
            try:
                response = await self._open(link, left, stack)
                resumed, whole = await self._begin(link, response, part, left)
                await self._receive(response, part, whole, on_bytes)
            except httpx.TransportError as exc:
                raise MediaUnavailable(_trouble(exc, part.size)) from exc
            except (httpx.InvalidURL, UnicodeError) as exc:
                raise LinkRefused("the link is not a URL") from exc
            except httpx.DecodingError as exc:
                raise MediaError("what the server gave is not encoded as it says") from exc
            content_type = response.headers.get("content-type")
            target = folder / f"{stem}{ending(content_type, str(response.url), output_type)}"
            await asyncio.to_thread(part.finish, target)
        return Fetched(
            path=target,
            size=part.size,
            sha256=part.sha256,
            content_type=content_type,
            resumed=resumed,
        )

    async def _open(
        self, link: str, left: tuple[Mark, int] | None, stack: AsyncExitStack
    ) -> httpx.Response:
        """The answer to `link`, at the end of its redirects; what is left of it is asked for."""
        request: httpx.Request | None = self._http.build_request("GET", link)
        if request is not None and left is not None and left[0].link == _bare(request.url):
            request.headers["range"] = f"bytes={left[1]}-"
            request.headers["if-range"] = left[0].validator
        for _ in range(HOPS + 1):
            if request is None:
                break
            try:
                async with asyncio.timeout(self._stall):
                    response = await self._http.send(request, stream=True)
            except TimeoutError as exc:
                raise MediaUnavailable(f"no answer came within {self._stall:g} s") from exc
            if not response.has_redirect_location:
                stack.push_async_callback(response.aclose)
                return response
            await response.aclose()
            # Each hop goes through the guard again; what was asked for stays in its headers.
            request = response.next_request
        raise LinkRefused(f"the link leads on more than {HOPS} times")

    async def _begin(
        self, link: str, response: httpx.Response, part: Part, left: tuple[Mark, int] | None
    ) -> tuple[bool, int | None]:
        """Make the part ready for the body: whether it is gone on with, and its whole size if it
        is known."""
        status = response.status_code
        if status in (200, 206) and not is_bounded(response.headers.get("content-encoding")):
            raise MediaError("the server packed the file in a way that it was not asked for")
        if status == 206 and left is not None and "range" in response.request.headers:
            mark, size = left
            given = _RANGE.fullmatch(response.headers.get("content-range", ""))
            tag = response.headers.get("etag")
            same = tag is None or not mark.validator.startswith('"') or tag == mark.validator
            if given is not None and int(given[1]) == size and same:
                total = int(given[2]) + 1 if given[3] == "*" else int(given[3])
                self._check_size(total)
                await asyncio.to_thread(part.go_on)
                return True, total
        if status in (206, 416):
            await asyncio.to_thread(part.discard)
            raise MediaUnavailable("the server gave another part than was asked for")
        if status in _GONE:
            raise MediaError(f"the link has expired, or the file is gone (HTTP {status})")
        if status in _PASSING or status >= 500:
            raise MediaUnavailable(
                f"the server answered HTTP {status}", retry_after=_asked_wait(response)
            )
        if status != 200:
            raise MediaError(f"the server answered HTTP {status}")
        encoded = response.headers.get("content-encoding", "identity").lower() != "identity"
        length = response.headers.get("content-length")
        whole = None if length is None or encoded else int(length)
        if whole is not None:
            self._check_size(whole)
        validator = None if encoded else _validator(response)
        bare = _bare(httpx.URL(link))
        await asyncio.to_thread(part.begin, None if validator is None else Mark(bare, validator))
        return False, whole

    async def _receive(
        self, response: httpx.Response, part: Part, whole: int | None, on_bytes: OnBytes | None
    ) -> None:
        """Write the body, and check that it is whole."""
        loop = asyncio.get_running_loop()
        encoded = "content-encoding" in response.headers
        moved = part.size
        try:
            async with asyncio.timeout(self._stall) as limit:
                async for data in response.aiter_bytes() if encoded else response.aiter_raw():
                    part.write(data)
                    self._check_size(part.size, part)
                    if part.size - moved >= STALL_BYTES:
                        moved = part.size
                        limit.reschedule(loop.time() + self._stall)
                    if on_bytes is not None:
                        on_bytes(part.size, whole)
        except TimeoutError as exc:
            raise MediaUnavailable(
                f"next to nothing came for {self._stall:g} s, after {part.size} bytes"
            ) from exc
        if whole is not None and part.size != whole:
            if part.size > whole:
                part.discard()
            raise MediaUnavailable(f"{part.size} bytes came, and {whole} were announced")

    def _check_size(self, size: int, part: Part | None = None) -> None:
        if size <= self._max_bytes:
            return
        if part is not None:
            part.discard()
        raise MediaError(f"the file is larger than the {self._max_bytes} bytes that are allowed")


def _bare(url: httpx.URL) -> str:
    return str(url.copy_with(query=None, fragment=None))


def _validator(response: httpx.Response) -> str | None:
    """What names this very state of the file; `None` where nothing does for certain."""
    tag: str | None = response.headers.get("etag")
    if tag is not None:
        return tag if tag.startswith('"') else None
    modified: str | None = response.headers.get("last-modified")
    try:
        age = parsedate_to_datetime(response.headers["date"]) - parsedate_to_datetime(
            modified or ""
        )
    except (KeyError, ValueError, TypeError, OverflowError, IndexError):  # whatever it may hold
        return None
    return modified if age >= _SURE_AFTER else None


def _asked_wait(response: httpx.Response) -> float | None:
    asked = response.headers.get("retry-after", "").strip()
    return min(float(asked), LONGEST_PAUSE) if asked.isdecimal() and asked.isascii() else None


def _pause(fruitless: int, asked: float | None) -> float:
    """Seconds before the next attempt: what the server asked for, else growing, with jitter."""
    if asked is not None:
        return asked
    wait: float = min(0.5 * 2**fruitless, LONGEST_PAUSE)
    return wait * random.uniform(0.8, 1.0)


def _trouble(error: httpx.TransportError, size: int) -> str:
    """What happened to the connection, without the link, which may be signed."""
    match error:
        case httpx.ConnectTimeout():
            return "the server could not be reached in time"
        case httpx.ConnectError() if "CERTIFICATE" in str(error):
            return "the server's certificate is not valid for it, or not trusted here"
        case httpx.ConnectError():
            return "the server could not be reached"
        case httpx.TimeoutException():
            return f"nothing came any more, after {size} bytes"
        case httpx.UnsupportedProtocol():
            return "the link leads on to something that is not http(s)"
    return f"the connection was cut after {size} bytes"
