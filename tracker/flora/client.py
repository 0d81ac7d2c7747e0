"""FLORA's public API: techniques, runs and generations, as observations and catalogue entries.

::

    async with FloraClient(base_url=…, api_key=…) as flora:
        started = await flora.start_run("cctv-cam", body=start_body(…), idempotency_key="…")
        seen = await flora.get_run("cctv-cam", started.run_id)

One client stands for one key, and so for one workspace: everything that calls shares its request
limit, breaker and connections. A call without a usable answer raises a `FloraError`
(`tracker.errors` draws the tree); none takes longer than `deadline` seconds.
"""

import hashlib
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import httpx

from tracker import __version__
from tracker.core.clock import Clock, utc_now
from tracker.core.contact import ContactState, OngoingTrouble, Trouble
from tracker.core.errors import (
    FieldFault,
    FloraError,
    FloraUnreadable,
    InvalidRequest,
    KeyRefused,
    NotFound,
    SettingsError,
)
from tracker.core.net import is_loopback
from tracker.core.observation import Observation, Source
from tracker.core.run import RunType
from tracker.core.starts import TechniqueDefinition, is_empty_text
from tracker.flora import parse
from tracker.flora.caller import Caller, FloraAnswer, FloraCall
from tracker.flora.http import NoCookies
from tracker.flora.parse import LONGEST_ID, Page, circular, technique

DEADLINE: Final = 60.0
START_SECONDS: Final = 90.0
"""How long the answer to a start is waited for once it is written: longer than the usual gateways
in front of an API wait."""
HistoryPage = Page[Observation]
T = TypeVar("T")

_TIMEOUT: Final = httpx.Timeout(20.0, connect=5.0)
_KEEP_ALIVE: Final = 2.0
"""Seconds; common servers hang up after five, and a start must not meet a closing connection: it
would be in doubt. Its fence is passed after the connection was chosen, and may wait as long."""
_KEY: Final = re.compile(r"[!-~]{1,500}")
_IDEMPOTENCY_KEY: Final = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")
_LISTS: Final = {
    "technique": ("technique-runs", "technique_runs"),
    "generation": ("generations", "generations"),
}


class FloraClient(Caller):
    """The calls that the tracker makes. `deadline` is in seconds, for a call with all repetitions.

    `workspace_id` is the workspace that the settings name: of a key that sees several, its runs
    alone are listed. Tests pass a `transport`; `options` are those of `Caller`. Proxies of the
    environment are used, but never to this machine itself. Reads of runs that have just ended are
    `fresh`: the request limit favours them. A read with `answer_seconds` is sent once, and its
    answer waited for so long. Raises `SettingsError` for an invalid base URL or key.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        workspace_id: str | None = None,
        concurrency: int = 2,
        deadline: float = DEADLINE,
        clock: Clock = utc_now,
        transport: httpx.AsyncBaseTransport | None = None,
        start_seconds: float = START_SECONDS,
        **options: Any,
    ) -> None:
        self._workspace_id = workspace_id
        self._sees: set[str] = set()  # the workspaces that FLORA has listed for the key
        self._start_seconds = start_seconds
        self.key_fingerprint = ""
        """Identifies the key without revealing it."""
        self._urls = FloraUrls(base_url)
        trust_env = not self._urls.on_loopback
        # Once, because it takes long.
        tls = transport is not None or httpx.create_ssl_context(trust_env=trust_env)

        def new_http() -> httpx.AsyncClient:
            return httpx.AsyncClient(
                headers={
                    "accept": "application/json",
                    "accept-encoding": "gzip, deflate",
                    "user-agent": f"flora-run-tracker/{__version__}",
                },
                cookies=NoCookies(),
                timeout=_TIMEOUT,
                limits=httpx.Limits(
                    max_connections=concurrency,
                    max_keepalive_connections=concurrency,
                    keepalive_expiry=_KEEP_ALIVE,
                ),
                follow_redirects=False,
                trust_env=trust_env,
                transport=transport,
                verify=tls,
            )

        super().__init__(
            new_http,
            concurrency=concurrency,
            deadline=deadline,
            clock=clock,
            traced=transport is None,
            **options,
        )
        self.rotate_key(api_key)

    def rotate_key(self, api_key: str) -> None:
        """Use another key of the same workspace, and forget that one was refused.

        Raises `SettingsError` for an invalid key.
        """
        if not _KEY.fullmatch(api_key):
            raise SettingsError("FLORA_API_KEY holds characters that no key has, such as spaces")
        authorization = f"Bearer {api_key}"
        if self.http.headers.get("authorization") != authorization:
            self.http.headers["authorization"] = authorization
            self.breaker.accepted()
            self.contact.checked_workspace(None)
            self._sees.clear()
            self.key_fingerprint = hashlib.sha256(b"flora-api-key:" + api_key.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"FloraClient({str(self._urls.base)!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def state(self) -> ContactState | None:
        """Whether FLORA answers and accepts the key, as far as this client has seen; `None` before
        its first request."""
        state, since = self.contact.state, self.breaker.since
        if state is None or since is None:
            return state
        refused = OngoingTrouble(Trouble.KEY_REFUSED, since, self.breaker.reason or "")
        return replace(state, trouble=refused)

    async def list_techniques(
        self, *, cursor: str | None = None, limit: int = 100
    ) -> Page[TechniqueDefinition]:
        """A page of the catalogue, of at most `limit` (1 to 100) techniques."""
        url = self._urls.of(
            "techniques", workspace_id=self._only_workspace, cursor=cursor, limit=limit
        )
        answer = await self.call(FloraCall(endpoint="GET /techniques", url=url, lists=True))
        return answer.read(partial(parse.page, key="techniques", read=technique, limit=limit))

    async def get_technique(
        self, id_or_slug: str, *, deadline: float | None = None
    ) -> TechniqueDefinition:
        url = self._urls.of("techniques", id_or_slug)
        call = FloraCall(endpoint="GET /techniques/{id}", url=url)
        answer = await self.call(call, deadline=deadline)
        return answer.read(technique)

    async def list_workspaces(self, *, deadline: float | None = None) -> list[str]:
        """The ids of the workspaces that the key can read: as documented its own, and no other."""
        call = FloraCall(endpoint="GET /workspaces", url=self._urls.of("workspaces"))
        answer = await self.call(call, deadline=deadline)
        ids = answer.read(partial(parse.page, key="workspaces", read=parse.workspace_id)).items
        self._sees.update(ids)
        return ids

    async def sees(self, workspace_id: str, *, deadline: float | None = None) -> bool:
        """Whether FLORA lists this workspace for the key; it is asked until it has answered.

        Raises `FloraError`.
        """
        if not self._sees:
            await self.list_workspaces(deadline=deadline)
        return workspace_id in self._sees

    async def start_run(
        self,
        technique_id: str,
        *,
        body: str,
        idempotency_key: str,
        deadline: float | None = None,
        fence: Callable[[], Awaitable[None]] | None = None,
    ) -> Observation:
        """Start a run of a technique (its id or slug), which costs money; the run, also where
        FLORA repeats its answer to an earlier request.

        `body` is made by `start_body`. The key is sent in both forms that FLORA documents. `fence`
        is awaited directly before the request is written, and prevents that by raising; the answer
        is then waited for `start_seconds`. Raises `InvalidRequest` for a key that no header can
        hold.
        """
        check_idempotency_key(idempotency_key)
        call = FloraCall(
            endpoint="POST /techniques/{id}/runs",
            url=self._urls.of("techniques", technique_id, "runs"),
            method="POST",
            headers={"content-type": "application/json", "idempotency-key": idempotency_key},
            content=body.encode(),
            spends=True,
            fence=fence,
            answer_seconds=self._start_seconds,
        )
        answer = await self.call(call, deadline=deadline)
        known_id = technique_id if technique_id.startswith("tech_") else None
        read = self._reader(
            answer, source=Source.START, run_type="technique", technique_id=known_id
        )
        return answer.read(read)

    async def get_run(
        self,
        technique_id: str,
        run_id: str,
        *,
        deadline: float | None = None,
        fresh: bool = False,
        answer_seconds: float | None = None,
    ) -> Observation:
        """A run of a technique (its id or slug).

        The observation does not hold the technique: the caller names it, not FLORA.
        """
        url = self._urls.of("techniques", technique_id, "runs", run_id)
        call = FloraCall(
            endpoint="GET /techniques/{id}/runs/{id}",
            url=url,
            fresh=fresh,
            answer_seconds=answer_seconds,
        )
        return await self._read_run(call, run_id, deadline, run_type="technique")

    async def get_any_run(
        self,
        run_id: str,
        *,
        deadline: float | None = None,
        fresh: bool = False,
        answer_seconds: float | None = None,
    ) -> Observation:
        """A run of either kind, without its technique."""
        url = self._urls.of("runs", run_id)
        call = FloraCall(
            endpoint="GET /runs/{id}", url=url, fresh=fresh, answer_seconds=answer_seconds
        )
        return await self._read_run(call, run_id, deadline)

    async def follow(
        self,
        poll_url: str,
        run_id: str,
        *,
        deadline: float | None = None,
        fresh: bool = False,
        answer_seconds: float | None = None,
    ) -> Observation:
        """The run of a `poll_url`.

        Raises `PollUrlRefused`, before anything is sent, if that is on another origin than the base
        URL: it comes from outside, and the request carries the key. It may lead to something else
        than the API: a 401 says nothing about the key, and raises `FloraUnreadable`.
        """
        call = FloraCall(
            endpoint="GET poll_url",
            url=self._urls.follow(poll_url),
            fresh=fresh,
            is_foreign=True,
            answer_seconds=answer_seconds,
        )
        try:
            return await self._read_run(call, run_id, deadline)
        except KeyRefused as error:
            raise FloraUnreadable(f"the poll_url does not show the run: {error}") from error

    def is_address_of(self, poll_url: str | None, technique_id: str, run_id: str) -> bool:
        """Whether `follow` and `get_run` read the same address."""
        try:
            own = self._urls.of("techniques", technique_id, "runs", run_id)
            return poll_url is not None and self._urls.follow(poll_url) == own
        except (NotFound, PollUrlRefused):
            return False

    async def history(
        self,
        *,
        kind: RunType = "technique",
        cursor: str | None = None,
        limit: int = 100,
        technique_id: str | None = None,
        deadline: float | None = None,
        fresh: bool = False,
        answer_seconds: float | None = None,
    ) -> HistoryPage:
        """A page of the workspace's runs, newest first, of at most `limit` (1 to 100) runs.

        It has no status filter: a run that leaves the filter while pages are read moves another
        one past the reader. If it shows runs of another workspace, FLORA is asked which ones the
        key sees; with several, the page is read again for the one in the settings.
        """
        path, key = _LISTS[kind]

        async def read() -> HistoryPage:
            call = FloraCall(
                endpoint=f"GET /{path}",
                url=self._urls.of(
                    path,
                    workspace_id=self._only_workspace,
                    technique_id=technique_id,
                    cursor=cursor,
                    limit=limit,
                ),
                # A filter, or a kind that a workspace may not have, says nothing about the key.
                lists=technique_id is None and kind == "technique",
                fresh=fresh,
                answer_seconds=answer_seconds,
            )
            answer = await self.call(call, deadline=deadline)
            run = self._reader(answer, source=Source.HISTORY, run_type=kind)
            return answer.read(partial(parse.page, key=key, read=run, limit=limit))

        page, own = await read(), self._workspace_id
        if own is None or all(item.workspace_id in (None, own) for item in page.items):
            return page
        with suppress(FloraError):
            await self.sees(own, deadline=deadline)
        return page if self._only_workspace is None else await read()

    @property
    def _only_workspace(self) -> str | None:
        """The workspace to which lists are narrowed, if the key sees several."""
        own = self._workspace_id
        return own if own in self._sees and len(self._sees) > 1 else None

    async def _read_run(
        self, call: FloraCall, run_id: str, deadline: float | None, *, run_type: str | None = None
    ) -> Observation:
        answer = await self.call(call, deadline=deadline)
        return answer.read(
            self._reader(answer, source=Source.POLL, expect_run_id=run_id, run_type=run_type)
        )

    def _reader(self, answer: FloraAnswer, **options: Any) -> Callable[[object], Observation]:
        return partial(
            parse.run,
            at=self.clock(),
            sent_at=answer.sent_at,
            clock_offset=self.clock_offset,
            **options,
        )


class PollUrlRefused(FloraError):
    """A `poll_url` leads away from the configured FLORA; the key is not sent there."""


class FloraUrls:
    """The URLs to which the API key may be sent: those below one base URL.

    Raises `SettingsError` for a base URL that is not `https` (`http` only on this machine itself),
    or that holds more than an origin and a path.
    """

    def __init__(self, base_url: str) -> None:
        try:
            self.base = httpx.URL(base_url.strip().rstrip("/"))
        except (httpx.InvalidURL, ValueError) as exc:
            raise SettingsError("FLORA_BASE_URL is not a URL") from exc
        self.on_loopback = is_loopback(self.base.raw_host.decode())
        """Whether FLORA is on this machine, a simulator."""
        secure = self.base.scheme == "https" or (self.base.scheme == "http" and self.on_loopback)
        if not secure or not self.base.raw_host:
            raise SettingsError("FLORA_BASE_URL must be https (http only for a loopback host)")
        if self.base.userinfo or self.base.query or self.base.fragment:
            raise SettingsError("FLORA_BASE_URL must have no user, query or fragment in it")

    def of(self, *segments: str, **params: str | int | None) -> httpx.URL:
        """The URL of a path below the base; a parameter that is `None` is left out.

        Raises `NotFound` for a segment that can be no id, `FloraUnreadable` for a cursor that is
        too long.
        """
        path = "/".join(_segment(segment) for segment in segments)
        query = {name: value for name, value in params.items() if value is not None}
        try:
            return httpx.URL(f"{self.base}/{path}").copy_merge_params(query)
        except httpx.InvalidURL as exc:
            raise FloraUnreadable("FLORA's cursor is too long to be sent back") from exc

    def follow(self, poll_url: str) -> httpx.URL:
        """The URL of a `poll_url`. Raises `PollUrlRefused` if it is on another origin.

        The parser that checks it is the one that the request uses.
        """
        try:
            url = self.base.join(poll_url).copy_with(fragment=None)
        except (httpx.InvalidURL, ValueError) as exc:
            raise PollUrlRefused("the poll_url is not a URL, so it is not followed") from exc
        if _origin(url) != _origin(self.base) or url.userinfo:
            raise PollUrlRefused("the poll_url is not below FLORA_BASE_URL's origin: not followed")
        return url


def _origin(url: httpx.URL) -> tuple[str, bytes, int | None]:
    return (url.scheme, url.raw_host, url.port)


def _segment(value: str) -> str:
    """One segment of a path, which it cannot leave. Nothing is sent for what can be no id."""
    if value in ("", ".", "..") or len(value) > LONGEST_ID:
        raise NotFound(status=404, code="not_found", message=f"{value[:80]!r} can be no id")
    return quote(value, safe="", errors="replace")


def start_body(
    inputs: list[dict[str, Any]], *, idempotency_key: str, callback_url: str | None = None
) -> str:
    """The body of a start, as it is stored for repetitions: ASCII, without empty texts."""
    sent = [one for one in inputs if not is_empty_text(one)]
    body: dict[str, Any] = {"inputs": sent, "mode": "async", "idempotency_key": idempotency_key}
    if callback_url is not None:
        body["callback_url"] = callback_url
    return json.dumps(body)


def check_idempotency_key(key: str) -> None:
    """Raise `InvalidRequest` for an idempotency key that no header can hold."""
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        fault = FieldFault("idempotency_key", "must be 1 to 255 visible ASCII characters")
        raise InvalidRequest("the idempotency key cannot be sent", [fault])


async def pages(
    read: Callable[[str | None], Awaitable[Page[T]]],
) -> AsyncGenerator[Page[T], None]:
    """Every page of the list that `read(cursor)` reads.

    Raises `FloraUnreadable` if a cursor comes twice: in a circle the end of the list cannot be told
    from a gap in it.
    """
    seen: set[str] = set()
    cursor: str | None = None
    while True:
        page = await read(cursor)
        yield page
        cursor = page.next_cursor
        if cursor is None:
            return
        if cursor in seen:
            raise circular()
        seen.add(cursor)
