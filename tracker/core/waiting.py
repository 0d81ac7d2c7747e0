"""Waiting for events and for tasks that end."""

import asyncio
from typing import Any


async def wait_for(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for an event, at most so many seconds; whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def cancel(*tasks: asyncio.Task[Any] | None, seconds: float | None = None) -> None:
    """Cancel tasks and wait, at most so many seconds, until they have ended, however they do."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running, timeout=seconds)
