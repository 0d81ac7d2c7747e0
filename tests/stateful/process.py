"""One process of the tracker, real except for FLORA, which can crash at any commit or request.

A crash has the effect of SIGKILL: from one moment on, nothing of the process reaches the database
or FLORA. The process freezes at that point; then its tasks are cancelled, and what their `finally`
blocks write is refused.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, NoReturn, Self, TypeVar

import httpx
from sqlalchemy import Connection

from tests.stateful.clocks import Clocks
from tests.stateful.flora import BASE, ModelFlora
from tracker.core.errors import StoreError
from tracker.flora.client import FloraClient
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.web.app import build_app

T = TypeVar("T")

POINTS: Final = ("before a commit", "after a commit", "before a request", "after a request")
"""Where a process dies: before or after a transaction is committed, or a request is answered."""
PUBLIC_URL: Final = "http://127.0.0.1:9"


class Crashed(StoreError):
    """The process is dead."""


class Process:
    """A tracker over a database. `doom` is the point where it dies, and how often it passes it."""

    services: Services
    http: httpx.AsyncClient
    """A client of its web application."""
    key: str
    """Its key for FLORA: the valid one at its start."""

    def __init__(self) -> None:
        self.doom: tuple[str, int] | None = None
        self._stack = AsyncExitStack()
        self._dead = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(
        cls,
        database_url: str,
        clocks: Clocks,
        flora: ModelFlora,
        *,
        secrets: Sequence[str],
        workspace_id: str | None,
    ) -> Self:
        """Start a process; without `workspace_id` it has to learn the workspace's id."""
        process = cls()
        process.key = flora.key
        settings = Settings(
            flora_base_url=BASE,
            flora_api_key=process.key,
            flora_workspace_id=workspace_id,
            flora_webhook_secret=" ".join(secrets),
            tracker_database_url=database_url,
            tracker_public_url=PUBLIC_URL,
            tracker_api_token="a-token-of-the-tests",
            tracker_api_concurrency=1,  # so that an order of events has one outcome
            tracker_history_since="365d",
        )
        enter = process._stack.enter_async_context
        services = await enter(open_services(settings, wall=clocks.ours, seconds=clocks.monotonic))
        database = services.database
        database._transactions = _CrashingWriter(database._transactions, process)  # type: ignore[assignment]
        services.starter.sleep = clocks.sleep
        # The world decides when the inbox is applied.
        services.applier.wake = lambda: None  # type: ignore[method-assign]
        services.starter.monotonic = clocks.monotonic
        (workspace,) = services.workspaces
        workspace.client = await enter(
            FloraClient(
                base_url=BASE,
                api_key=process.key,
                concurrency=1,
                deadline=25.0,
                clock=clocks.ours,
                monotonic=clocks.monotonic,
                sleep=clocks.sleep,
                transport=_CrashingTransport(flora, process),
            )
        )
        process.services = services
        ours = httpx.ASGITransport(app=build_app(services))
        process.http = await enter(
            httpx.AsyncClient(
                transport=ours,
                base_url="http://127.0.0.1",
                trust_env=False,
                headers={"authorization": "Bearer a-token-of-the-tests"},
            )
        )
        return process

    @property
    def holder(self) -> str:
        """The name under which it claims runs."""
        return self.services.poller.process

    async def do(self, work: Awaitable[T]) -> T:
        """Run a coroutine in the process. Raises `Crashed` where it dies meanwhile."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, self._dead], return_when=asyncio.FIRST_COMPLETED)
        if self._dead.done():
            await self._discard()
            raise Crashed
        return await task

    async def stop(self) -> None:
        """Stop it in order."""
        self.doom = None
        await self._stack.aclose()

    async def reach(self, point: str) -> None:
        """Mark that the process reaches a point; it freezes where it dies there."""
        if self._dead.done():
            raise Crashed
        if self.doom is not None and self.doom[0] == point:
            self.doom = (point, self.doom[1] - 1)
            if self.doom[1] < 0:
                self._dead.set_result(None)
                await _freeze()

    async def _discard(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()  # closes connections; writes are refused


class _CrashingWriter:
    """The database's writer."""

    def __init__(self, writer: Any, process: Process) -> None:
        self.engine = writer.engine
        self.close = writer.close
        self._writer = writer
        self._process = process

    async def run(self, work: Callable[[Connection], T]) -> T:
        await self._process.reach("before a commit")
        result: T = await self._writer.run(work)
        await self._process.reach("after a commit")
        return result

    async def send(self, statement: str, values: tuple[Any, ...]) -> Any:
        await self._process.reach("before a commit")
        rows = await self._writer.send(statement, values)
        await self._process.reach("after a commit")
        return rows


class _CrashingTransport(httpx.AsyncBaseTransport):
    """The transport to FLORA."""

    def __init__(self, flora: ModelFlora, process: Process) -> None:
        self._flora = flora
        self._process = process

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await self._process.reach("before a request")
        response = await self._flora.handle(request)
        await self._process.reach("after a request")
        return response


async def _freeze() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("a dead process does nothing")
