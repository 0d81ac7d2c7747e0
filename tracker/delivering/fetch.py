"""One link becomes one file: complete, of the announced size, under its name only then.

A retry resumes the previous attempt if the server confirms the same validator; otherwise it starts
over. Only stalling is limited, not the total time.
"""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from mimetypes import MimeTypes
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import httpx

from tracker import __version__
from tracker.core.clock import utc_now
from tracker.delivering.addresses import (
    Address,
    GuardedTransport,
    LinkRefused,
    MediaError,
    MediaUnavailable,
    Resolver,
    connect_failure,
    resolve,
)
from tracker.delivering.files import PARTIAL_ENDING, PartialFile, ResumeKey
from tracker.flora.http import CONNECTION_ERRORS, NoCookies, http_date, is_bounded, retry_after_of

MAX_BYTES: Final = 2 * 1024**3
ATTEMPTS: Final = 5
"""Consecutive attempts without progress before a file is given up."""
_REDIRECTS: Final = 5
_LONGEST_PAUSE: Final = 60.0
_STALL_BYTES: Final = 16 * 1024
"""Progress: an attempt that brings fewer bytes within the stall time counts as stalled."""
_GONE: Final = (401, 403, 404, 410)
_TEMPORARY: Final = (408, 425, 429)
_RANGE: Final = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)", re.ASCII)
_VALIDATES_AFTER: Final = timedelta(seconds=60)
"""Age from which a Last-Modified identifies one state of a file (it has whole seconds)."""

Sleep = Callable[[float], Awaitable[None]]
OnBytes = Callable[[int, int | None], None]
"""Called with the bytes received so far and the total, if known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedFile:
    """A complete file. `size` is in bytes, `sha256` in hex."""

    path: Path
    size: int
    sha256: str
    content_type: str | None = None


OnComplete = Callable[[FetchedFile], None]
"""Called in a thread when a file is complete, before it gets its name."""


class LinkExpired(MediaError):
    """The server does not give the file, or not to this link."""


class Fetcher:
    """Fetches files.

    `allow_private` permits links into this network or machine. `stall` is how many seconds a
    connection may make no progress, `connect` how many seconds connecting may take. A file is given
    up after `attempts` without progress.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        max_bytes: float = MAX_BYTES,
        stall: float = 60.0,
        connect: float = 10.0,
        attempts: int = ATTEMPTS,
        resolver: Resolver = resolve,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._max_bytes = max_bytes
        self._attempts = attempts
        self._stall = stall
        self._sleep = sleep
        tls, reached = httpx.create_ssl_context(), dict[str, Address]()

        def new_http() -> httpx.AsyncClient:
            return httpx.AsyncClient(
                transport=GuardedTransport(
                    allow_private=allow_private, resolver=resolver, tls=tls, reached=reached
                ),
                headers={
                    "accept": "*/*",
                    "accept-encoding": "identity",  # so that sizes can be checked and parts resumed
                    "user-agent": f"flora-run-tracker/{__version__}",
                },
                cookies=NoCookies(),
                timeout=httpx.Timeout(stall, connect=connect, pool=None),
                follow_redirects=False,
                trust_env=False,
            )

        # One for each attempt: a request that is cancelled may leave a connection (see
        # `ReplaceableClient`), and none is used twice anyway.
        self._new_http = new_http

    async def fetch(
        self,
        link: str,
        folder: Path,
        stem: str,
        *,
        output_type: str = "",
        on_bytes: OnBytes | None = None,
        on_complete: OnComplete | None = None,
    ) -> FetchedFile:
        """Fetch `link` into `folder`, as a file named `stem` plus an ending.

        Raises `LinkRefused` or `MediaError` if that cannot succeed, `MediaUnavailable` if several
        attempts failed (a partial file may remain), `OSError` if the file cannot be written.
        """
        part = PartialFile(folder, stem)
        fruitless, furthest = 0, 0
        try:
            while True:
                try:
                    response = await self._attempt(link, part, on_bytes)
                    break
                except MediaUnavailable as trouble:
                    progress = part.size >= furthest + _STALL_BYTES
                    fruitless = 0 if progress else fruitless + 1
                    furthest = max(furthest, part.size)
                    if fruitless >= self._attempts:
                        raise
                    await self._sleep(_pause(fruitless, trouble.retry_after))
            content_type = response.headers.get("content-type")
            target = folder / f"{stem}{file_ending(content_type, str(response.url), output_type)}"
            file = FetchedFile(
                path=target, size=part.size, sha256=part.sha256, content_type=content_type
            )

            def finish() -> None:
                if on_complete is not None:
                    on_complete(file)
                part.finish(target)

            await asyncio.to_thread(finish)
        finally:
            part.close()
        return file

    async def _attempt(
        self, link: str, part: PartialFile, on_bytes: OnBytes | None
    ) -> httpx.Response:
        """Receive the whole file into `part`; the response."""
        left = await asyncio.to_thread(part.resumable)
        async with AsyncExitStack() as stack:
            try:
                http = await stack.enter_async_context(self._new_http())
                response = await self._open(http, link, left, stack)
                total = await self._begin(link, response, part, left)
                await self._receive(response, part, total, on_bytes)
            except CONNECTION_ERRORS as exc:
                raise MediaUnavailable(_connection_error(exc, part.size)) from exc
            except (httpx.InvalidURL, UnicodeError) as exc:
                raise LinkRefused("the link is not a URL") from exc
            except httpx.DecodingError as exc:
                raise MediaError("the server's answer is not encoded as it says") from exc
        return response

    async def _open(
        self,
        http: httpx.AsyncClient,
        link: str,
        left: tuple[ResumeKey, int] | None,
        stack: AsyncExitStack,
    ) -> httpx.Response:
        """The response after redirects; asks for the remaining bytes if the file is resumable."""
        request = http.build_request("GET", link)
        if left is not None and left[0].link == _without_query(request.url):
            request.headers["range"] = f"bytes={left[1]}-"
            request.headers["if-range"] = left[0].validator
        for _ in range(_REDIRECTS + 1):
            try:
                async with asyncio.timeout(self._stall):
                    response = await http.send(request, stream=True)
            except TimeoutError as exc:
                raise MediaUnavailable(f"no answer within {self._stall:g} s") from exc
            if response.next_request is None:
                stack.push_async_callback(response.aclose)
                return response
            await response.aclose()
            # Each redirect passes the address check again and keeps the range headers.
            request = response.next_request
        raise LinkRefused(f"more than {_REDIRECTS} redirects")

    async def _begin(
        self,
        link: str,
        response: httpx.Response,
        part: PartialFile,
        left: tuple[ResumeKey, int] | None,
    ) -> int | None:
        """Prepare `part` for the body, which may be the rest of what is there; the total size if
        known."""
        status = response.status_code
        if status in (200, 206) and not is_bounded(response.headers.get("content-encoding")):
            raise MediaError("the server packed the file in a way that was not asked for")
        if status == 206 and left is not None and "range" in response.request.headers:
            wanted, size = left
            content_range = _RANGE.fullmatch(response.headers.get("content-range", ""))
            tag = response.headers.get("etag")
            same = tag is None or not wanted.validator.startswith('"') or tag == wanted.validator
            if content_range is not None and int(content_range[1]) == size and same:
                _, last, whole = content_range.groups()
                total = int(last) + 1 if whole == "*" else int(whole)
                self._check_size(total)
                await asyncio.to_thread(part.resume)
                return total
        if status in (206, 416):
            await asyncio.to_thread(part.discard)
            raise MediaUnavailable("the server sent another range than requested")
        if status in _GONE:
            raise LinkExpired(f"the link has expired, or the file is gone (HTTP {status})")
        if status in _TEMPORARY or status >= 500:
            wait = retry_after_of(response.headers, now=utc_now(), longest=_LONGEST_PAUSE)
            raise MediaUnavailable(f"the server answered HTTP {status}", retry_after=wait)
        if status != 200:
            raise MediaError(f"the server answered HTTP {status}")
        packed = response.headers.get("content-encoding", "identity").lower() != "identity"
        length = response.headers.get("content-length")
        announced = None if length is None or packed else int(length)
        if announced is not None:
            self._check_size(announced)
        validator = None if packed else _validator(response)
        key = None if validator is None else ResumeKey(_without_query(httpx.URL(link)), validator)
        await asyncio.to_thread(part.start, key)
        return announced

    async def _receive(
        self,
        response: httpx.Response,
        part: PartialFile,
        total: int | None,
        on_bytes: OnBytes | None,
    ) -> None:
        """Write the body, and check that it is complete."""
        loop = asyncio.get_running_loop()
        packed = "content-encoding" in response.headers
        moved = part.size
        try:
            async with asyncio.timeout(self._stall) as limit:
                async for data in response.aiter_bytes() if packed else response.aiter_raw():
                    part.write(data)
                    if part.size > self._max_bytes:
                        part.discard()
                    self._check_size(part.size)
                    if part.size - moved >= _STALL_BYTES:
                        moved = part.size
                        limit.reschedule(loop.time() + self._stall)
                    if on_bytes is not None:
                        on_bytes(part.size, total)
        except TimeoutError as exc:
            raise MediaUnavailable(
                f"stalled for {self._stall:g} s after {part.size} bytes"
            ) from exc
        if total is not None and part.size != total:
            if part.size > total:
                part.discard()
            raise MediaUnavailable(f"received {part.size} of {total} bytes")

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise MediaError(f"the file is larger than the {self._max_bytes:.0f} bytes allowed")


def _without_query(url: httpx.URL) -> str:
    return str(url.copy_with(query=None, fragment=None))


def _validator(response: httpx.Response) -> str | None:
    """What identifies this state of the file for certain; `None` if nothing does."""
    tag: str | None = response.headers.get("etag")
    if tag is not None:
        return tag if tag.startswith('"') else None
    modified: str = response.headers.get("last-modified", "")
    changed, now = http_date(modified), http_date(response.headers.get("date", ""))
    is_old = changed is not None and now is not None and now - changed >= _VALIDATES_AFTER
    return modified if is_old else None


def _pause(fruitless: int, retry_after: float | None) -> float:
    """Seconds before the next attempt: as the server asked, else exponential with jitter."""
    if retry_after is not None:
        return retry_after
    wait: float = min(0.5 * 2**fruitless, _LONGEST_PAUSE)
    return wait * random.uniform(0.8, 1.0)


def _connection_error(error: Exception, size: int) -> str:
    """What happened to the connection, without the link, which may be signed."""
    if failure := connect_failure(error):
        return failure
    match error:
        case httpx.TimeoutException():
            return f"timed out after {size} bytes"
        case httpx.UnsupportedProtocol():
            return "the link redirects to something that is not http(s)"
    return f"the connection was cut after {size} bytes"


_ENDINGS: Final = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/avif": ".avif",
    "image/gif": ".gif",
    "image/svg+xml": ".svg",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "audio/mpeg": ".mp3",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/wave": ".wav",
    "audio/vnd.wave": ".wav",
    "audio/mp4": ".m4a",
    "audio/ogg": ".ogg",
    "audio/flac": ".flac",
    "application/pdf": ".pdf",
    "application/json": ".json",
    "text/plain": ".txt",
    "text/markdown": ".md",
}
_ENDINGS_OF_OUTPUTS: Final = {
    "imageUrl": ".png",
    "videoUrl": ".mp4",
    "audioUrl": ".wav",
    "documentUrl": ".pdf",
    "text": ".txt",
}
_UNSPECIFIC: Final = ("application/octet-stream", "binary/octet-stream", "application/binary")
_IN_LINK: Final = re.compile(r"\.[A-Za-z0-9]{1,8}")
_RUN_BY_A_CLICK: Final = """
exe com scr pif cpl msi msix msp mst appx msc dll ocx sys drv bat cmd ps1 psm1 psd1 ps1xml vbs
vbe vb js jse ws wsf wsh wsc sct hta chm hlp reg inf ins isp lnk url scf appref-ms gadget job
rgs xbap xll jnlp settingcontent library search

app command tool workflow action pkg mpkg dmg scpt scptd terminal webloc inetloc fileloc
sh bash zsh csh ksh fish run elf so out deb rpm apk appimage snap desktop service

py pyc pyw pyz pl pm rb php phtml phar lua tcl jar class war swf mjs cjs ipynb
html htm xhtml xht shtml mht mhtml xml xsl xslt svgz
docm dotm xlsm xltm xlam pptm potm ppam ppsm sldm iso img vhd vhdx
"""
_EXECUTABLE: Final = frozenset(_RUN_BY_A_CLICK.split())
"""What a double click might run: programs and scripts of Windows, macOS, Linux, interpreters and
browsers, documents with macros, and disk images. Such a file is saved as `.bin`."""
# Only Python's own table, not the machine's: the same everywhere.
_KNOWN: Final = MimeTypes(filenames=())


def file_ending(content_type: str | None, link: str, output_type: str) -> str:
    """The ending of a file's name, with its dot: by Content-Type, else by link, else by output.

    `content_type` is the header's value, `link` the URL after redirects, `output_type` FLORA's
    word (`imageUrl`, …). What a double click could run ends in `.bin`.
    """
    found = (
        _ending_of_type(content_type)
        or _ending_of_link(link)
        or _ENDINGS_OF_OUTPUTS.get(output_type, ".bin")
    )
    return ".bin" if found[1:] in _EXECUTABLE else found


def _ending_of_type(content_type: str | None) -> str | None:
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if not media_type or media_type in _UNSPECIFIC:
        return None
    return _ENDINGS.get(media_type) or _KNOWN.guess_extension(media_type, strict=False)


def _ending_of_link(link: str) -> str | None:
    try:
        name = unquote(urlsplit(link).path).rpartition("/")[2]
    except ValueError:
        return None
    stem, dot, last = name.rpartition(".")
    ending = f".{last}".lower()
    usable = stem and dot and _IN_LINK.fullmatch(ending) and ending != PARTIAL_ENDING
    return ending if usable else None
