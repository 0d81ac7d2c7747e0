"""FLORA's public API: techniques, runs and generations, as observations and catalogue entries.

::

    async with FloraClient(base_url=…, api_key=…) as flora:
        answer = await flora.start_run("cctv-cam", inputs=[…], idempotency_key="…")
        seen = await flora.get_run("cctv-cam", answer.observation.run_id)

One client stands for one key, and so for one workspace: its budget, its breaker and its connections
are shared by everything that calls. A call that does not end in a usable answer raises a
`FloraError` (`tracker.core.errors` draws the tree); none takes longer than `deadline` seconds.
"""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal, Self

import httpx

from tracker import __version__
from tracker.core.clock import Clock, utc_now
from tracker.core.errors import FieldFault, InvalidRequest, SettingsError
from tracker.core.inputs import is_empty_text
from tracker.core.observation import Observation, Source
from tracker.flora import parse
from tracker.flora.addresses import Addresses
from tracker.flora.caller import Breaker, Call, Caller, OnRequest
from tracker.flora.contact import Contact
from tracker.flora.parse import Page, as_text
from tracker.flora.request_limit import Budget, SharedWaits
from tracker.flora.technique import Technique, technique

DEADLINE: Final = 60.0
START_SECONDS: Final = 90.0
"""How long the answer to a start is waited for, once it is written: longer than the gateways that
are usual in front of an API do."""
HistoryPage = Page[Observation]

_TIMEOUT: Final = httpx.Timeout(20.0, connect=5.0)
_KEEP_ALIVE: Final = 4.0
"""Seconds; common servers hang up after five, and a start must not meet a closing connection."""
_KEY: Final = re.compile(r"[!-~]{1,500}")
_IDEMPOTENCY_KEY: Final = re.compile(r"[!-~]([ -~]{0,253}[!-~])?")
_LISTS: Final = {
    "technique": ("technique-runs", "technique_runs"),
    "generation": ("generations", "generations"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StartAnswer:
    """The answer to a start. `replayed` tells that FLORA gave an earlier start's answer again."""

    observation: Observation
    replayed: bool


class FloraClient:
    """The calls that the tracker makes. `deadline` is in seconds, for a call with all repetitions.

    `on_request(endpoint, status, seconds)` is told of every request. Tests pass a `transport`, a
    `monotonic` clock and a `sleep`; `shared_waits` is how processes with one key tell each other
    that FLORA asked them to wait. `find_new_key` is called where FLORA refuses the key, and may
    call `rotate_key`: the request is then sent once more. Proxies of the environment are used, but
    never to this machine itself. Raises `SettingsError` for a base URL or a key that cannot be
    right.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        concurrency: int = 2,
        deadline: float = DEADLINE,
        clock: Clock = utc_now,
        on_request: OnRequest | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        shared_waits: SharedWaits | None = None,
        find_new_key: Callable[[], object] = lambda: None,
    ) -> None:
        self._fresh = False
        self.key_fingerprint = ""
        """Tells keys apart, and leads back to none."""
        self._addresses = Addresses(base_url)
        self._clock = clock
        self._http = httpx.AsyncClient(
            headers={
                "accept": "application/json",
                "accept-encoding": "gzip, deflate",
                "user-agent": f"flora-run-tracker/{__version__}",
            },
            timeout=_TIMEOUT,
            limits=httpx.Limits(
                max_connections=concurrency,
                max_keepalive_connections=concurrency,
                keepalive_expiry=_KEEP_ALIVE,
            ),
            follow_redirects=False,
            trust_env=not self._addresses.on_loopback,
            transport=transport,
        )
        self._caller = Caller(
            self._http,
            concurrency=concurrency,
            deadline=deadline,
            clock=clock,
            on_request=on_request,
            monotonic=monotonic,
            sleep=sleep,
            shared=shared_waits,
            find_new_key=find_new_key,
            traced=transport is None,
        )
        self.rotate_key(api_key)

    def rotate_key(self, api_key: str) -> None:
        """Go on with another key of the same workspace, and forget that one was refused.

        Raises `SettingsError` for a key that cannot be right.
        """
        if not _KEY.fullmatch(api_key):
            raise SettingsError("FLORA_API_KEY holds characters that no key has, such as spaces")
        authorization = f"Bearer {api_key}"
        if self._http.headers.get("authorization") != authorization:
            self._http.headers["authorization"] = authorization
            self.breaker.accepted()
            self.contact.reads(None)
            self.key_fingerprint = hashlib.sha256(b"flora-api-key:" + api_key.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"FloraClient({str(self._addresses.base)!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def for_fresh(self) -> Self:
        """This very client for reads of runs that have just ended: the budget keeps a share for
        them."""
        same = copy(self)
        same._fresh = True
        return same

    @property
    def budget(self) -> Budget:
        """The workspace's request budget."""
        return self._caller.budget

    @property
    def breaker(self) -> Breaker:
        """Open while FLORA refuses the key."""
        return self._caller.breaker

    @property
    def contact(self) -> Contact:
        """Whether FLORA answers, and base URL and key fit."""
        return self._caller.contact

    @property
    def clock_offset(self) -> timedelta | None:
        """FLORA's clock minus ours, as its last answer told."""
        return self._caller.clock_offset

    @property
    def clock_bounds(self) -> tuple[timedelta, timedelta] | None:
        """The least and the most that FLORA's clock minus ours can be, by all its answers."""
        return self._caller.clock_bounds

    @property
    def request_id(self) -> str | None:
        """By which FLORA's support finds its last answer."""
        return self._caller.request_id

    async def list_techniques(
        self,
        *,
        query: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
        deadline: float | None = None,
    ) -> Page[Technique]:
        """A page of the catalogue, of at most `limit` (1 to 100) techniques."""
        call = Call(
            endpoint="GET /techniques",
            url=self._addresses.url("techniques", query=as_text(query), cursor=cursor, limit=limit),
            lists=True,
        )
        answer = await self._caller.call(call, deadline=deadline)
        return answer.read(partial(parse.page, key="techniques", read=technique))

    async def get_technique(self, id_or_slug: str, *, deadline: float | None = None) -> Technique:
        """One technique."""
        url = self._addresses.url("techniques", id_or_slug)
        call = Call(endpoint="GET /techniques/{id}", url=url)
        answer = await self._caller.call(call, deadline=deadline)
        return answer.read(technique)

    async def list_workspaces(self, *, deadline: float | None = None) -> list[str]:
        """The ids of the workspaces that the key sees: its own, and no other."""
        call = Call(endpoint="GET /workspaces", url=self._addresses.url("workspaces"))
        answer = await self._caller.call(call, deadline=deadline)
        return answer.read(partial(parse.page, key="workspaces", read=parse.workspace_id)).items

    async def start_run(
        self,
        technique_id: str,
        *,
        body: str,
        idempotency_key: str,
        deadline: float | None = None,
        fence: Callable[[], Awaitable[None]] | None = None,
    ) -> StartAnswer:
        """Start a run of a technique (its id or slug), which costs money.

        `body` is made by `start_body`. The key goes out in both forms that FLORA documents. `fence`
        is awaited directly before the request is written, and keeps it back by raising; then the
        answer is waited for `START_SECONDS`. Raises `InvalidRequest` for a key that no header can
        carry.
        """
        check_idempotency_key(idempotency_key)
        call = Call(
            endpoint="POST /techniques/{id}/runs",
            url=self._addresses.url("techniques", technique_id, "runs"),
            method="POST",
            headers={"content-type": "application/json", "idempotency-key": idempotency_key},
            content=body.encode(),
            spends=True,
            fence=fence,
            answer_seconds=START_SECONDS,
        )
        answer = await self._caller.call(call, deadline=deadline)
        read = partial(
            parse.started,
            at=self._clock(),
            sent_at=answer.sent_at,
            clock_offset=self.clock_offset,
            technique_id=_known_id(technique_id),
        )
        return StartAnswer(
            observation=answer.read(read),
            replayed=answer.headers.get("idempotent-replayed", "").lower() == "true",
        )

    async def get_run(
        self, technique_id: str, run_id: str, *, deadline: float | None = None
    ) -> Observation:
        """A run of a technique (its id or slug).

        That the run is of this technique is the caller's word, not FLORA's, and no part of what was
        seen.
        """
        return await self._read_run(
            "GET /techniques/{id}/runs/{id}",
            self._addresses.url("techniques", technique_id, "runs", run_id),
            run_id,
            deadline,
            run_type="technique",
        )

    async def get_any_run(self, run_id: str, *, deadline: float | None = None) -> Observation:
        """A run of whichever kind, where its technique is not known."""
        url = self._addresses.url("runs", run_id)
        return await self._read_run("GET /runs/{id}", url, run_id, deadline)

    async def follow(
        self, poll_url: str, run_id: str, *, deadline: float | None = None
    ) -> Observation:
        """The run that a `poll_url` names.

        Raises `PollUrlRefused`, before anything is sent, where that is on another origin than the
        base URL: it comes from outside, and the request carries the key.
        """
        url = self._addresses.follow(poll_url)
        return await self._read_run("GET poll_url", url, run_id, deadline)

    async def history(
        self,
        *,
        kind: Literal["technique", "generation"] = "technique",
        cursor: str | None = None,
        limit: int = 100,
        technique_id: str | None = None,
        deadline: float | None = None,
    ) -> HistoryPage:
        """A page of the workspace's runs, newest first, of at most `limit` (1 to 100) runs.

        It is never filtered by status: runs that leave the filter while pages are read pull others
        over the edge of a page, unseen.
        """
        path, key = _LISTS[kind]
        call = Call(
            endpoint=f"GET /{path}",
            url=self._addresses.url(path, technique_id=technique_id, cursor=cursor, limit=limit),
            # A filter, or a kind that a workspace may not have, says nothing about the key.
            lists=technique_id is None and kind == "technique",
            fresh=self._fresh,
        )
        answer = await self._caller.call(call, deadline=deadline)
        read = partial(
            parse.run,
            source=Source.HISTORY,
            at=self._clock(),
            sent_at=answer.sent_at,
            clock_offset=self.clock_offset,
            run_type=kind,
        )
        return answer.read(partial(parse.page, key=key, read=read))

    async def _read_run(
        self,
        endpoint: str,
        url: httpx.URL,
        run_id: str,
        deadline: float | None,
        *,
        run_type: str | None = None,
    ) -> Observation:
        call = Call(endpoint=endpoint, url=url, fresh=self._fresh)
        answer = await self._caller.call(call, deadline=deadline)
        return answer.read(
            partial(
                parse.run,
                source=Source.POLL,
                at=self._clock(),
                sent_at=answer.sent_at,
                clock_offset=self.clock_offset,
                expect_run_id=run_id,
                run_type=run_type,
            )
        )


def start_body(
    inputs: list[dict[str, Any]], *, idempotency_key: str, callback_url: str | None = None
) -> str:
    """The body of a start, as it is kept for repetitions: ASCII. An empty text is left out."""
    said = [one for one in inputs if not is_empty_text(one)]
    body: dict[str, Any] = {"inputs": said, "mode": "async", "idempotency_key": idempotency_key}
    if callback_url is not None:
        body["callback_url"] = callback_url
    return json.dumps(body)


def check_idempotency_key(key: str) -> None:
    """Raise `InvalidRequest` for an idempotency key that no header can carry."""
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        fault = FieldFault("idempotency_key", "must be 1 to 255 visible ASCII characters")
        raise InvalidRequest("the idempotency key cannot be sent", [fault])


def _known_id(id_or_slug: str) -> str | None:
    return id_or_slug if id_or_slug.startswith("tech_") else None
