"""The far end of the client, and a time that passes only when everybody waits for it."""

import asyncio
import heapq
import itertools
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import httpx

from tracker.flora.client import FloraClient

T = TypeVar("T")

NOON = datetime(2026, 6, 11, 12, tzinfo=UTC)
KEY = "sk_test_0123456789"
BASE = "https://flora.test/api/v1"

Reply = httpx.Response | Exception | Callable[[httpx.Request], Awaitable[httpx.Response]]


class VirtualTime:
    """A clock, a monotonic clock and a sleep. `run` lets time jump to the next sleeper's end."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.slept: list[float] = []
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.elapsed)

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.elapsed + seconds, next(self._order), end))
        await end

    async def run(self, work: Awaitable[T]) -> T:
        """Await `work`, and pass time whenever nothing else can go on."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await settle()
            if not task.done():
                self._wake_next()
        return await task

    def _wake_next(self) -> None:
        assert self._sleepers, "everything waits, but not for time"
        when, _, end = heapq.heappop(self._sleepers)
        if not end.done():
            self.elapsed = max(self.elapsed, when)
            end.set_result(None)


async def settle() -> None:
    """Let every task go on until it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


class FarEnd(httpx.AsyncBaseTransport):
    """Gives the replies in their order, the last one for ever, and keeps what was asked."""

    def __init__(self, *replies: Reply) -> None:
        self.requests: list[httpx.Request] = []
        self._replies = list(replies)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, httpx.Response):
            # A response can be read only once; the last one may be given again and again.
            return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)
        return await reply(request)

    @property
    def paths(self) -> list[str]:
        return [request.url.raw_path.decode() for request in self.requests]


def client(far_end: httpx.AsyncBaseTransport, time: VirtualTime, **settings: Any) -> FloraClient:
    """A client in virtual time whose transport is `far_end`."""
    return FloraClient(
        base_url=settings.pop("base_url", BASE),
        api_key=KEY,
        clock=time.now,
        monotonic=time.monotonic,
        sleep=time.sleep,
        transport=far_end,
        **settings,
    )


def ok(payload: Any, **headers: str) -> httpx.Response:
    return httpx.Response(200, json=payload, headers=_dashed(headers))


def refused(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    body = {"error": {"code": code, "message": "some words"}}
    return httpx.Response(status, content=json.dumps(body).encode(), headers=_dashed(headers))


def run_payload(run_id: str = "run_1", status: str = "running", **fields: Any) -> dict[str, Any]:
    return {"run_id": run_id, "status": status, "progress": 0, "created_at": 0, **fields}


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
