"""How long something took, without the time in which the machine stood still."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Self

from tracker.core.waiting import cancel

PAUSE: Final = 0.02
"""Seconds between two questions."""
ALIVE: Final = 0.25
"""Seconds in which what works answers."""


class Standstills:
    """Within the block asks the same again and again: `ask` has to wait for nothing, so that a late
    answer shows that this process, or what it asks, stood still."""

    def __init__(self, ask: Callable[[], Awaitable[object]]) -> None:
        self._ask = ask
        self._beats: list[tuple[float, float]] = []
        self._began = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._began = time.monotonic()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._beats.append((self._began, time.monotonic()))
        await cancel(self._task)

    async def _watch(self) -> None:
        while True:
            await self._ask()
            await asyncio.sleep(PAUSE)
            ended = time.monotonic()
            self._beats.append((self._began, ended))
            self._began = ended

    def worked(self, began: float, ended: float) -> float:
        """For how many seconds between two monotonic times all of it could work."""
        still = (
            min(end, ended) - max(begin, began) - ALIVE
            for begin, end in self._beats
            if end - begin > 2 * ALIVE
        )
        return ended - began - sum(each for each in still if each > 0)
