"""The worker as a process of its own, without an HTTP port: runs until SIGTERM or SIGINT."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import structlog

from tracker.worker.scheduler import Worker, WorkerServices

log = structlog.get_logger(__name__)

S = TypeVar("S", bound=WorkerServices)


def run(open_services: Callable[[], AbstractAsyncContextManager[S]]) -> int:
    """Work until told to stop; returns 0. Raises what `open_services` raises."""
    asyncio.run(_run(open_services))
    return 0


async def _run(open_services: Callable[[], AbstractAsyncContextManager[S]]) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    async with open_services() as services:
        worker = Worker(services)
        await worker.start()
        log.info("working", workspaces=len(services.workspaces))
        try:
            await told.wait()
        finally:
            log.info("stopping")
            await worker.stop()
