"""One who follows the stream: a bounded queue between the broadcaster and a connection.

The broadcaster never waits for a reader. One whose queue is full has fallen too far behind and is
dropped: its connection is closed, and the browser comes back with the last id that it has seen.
"""

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from tracker.web.stream.events import Change, Wanted, reset

log = structlog.get_logger(__name__)


class Reader:
    """Given out by the broadcaster, and given back with `close`."""

    def __init__(self, wanted: Wanted, *, room: int, on_close: Callable[["Reader"], None]) -> None:
        self.wanted = wanted
        self.position = 0
        """All up to this number has been handed over."""
        self._live = False
        self._room = room
        self._on_close = on_close
        self._queue: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether nothing more comes: it was dropped, or the process stops."""
        return self._ended

    def go_live(self, number: int) -> None:
        """From now on take what is offered beyond that number."""
        self.position = number
        self._live = True

    def offer(self, change: Change) -> None:
        """Take a change, if it is wanted and was not handed over before."""
        if not self._live or self._ended:
            return
        if change.line is not None:
            if change.line.id <= self.position:
                return
            self.position = change.line.id
        if self.wanted.takes(change.record):
            self._add(change.frame)

    def begin_again(self, number: int) -> None:
        """What was handed over counts no more: the numbers begin anew after this one."""
        if self._live and not self._ended:
            self.position = number
            self._add(reset(number))

    def _add(self, frame: bytes) -> None:
        if len(self._queue) < self._room:
            self._queue.append(frame)
            self._filled.set()
        else:
            log.info("stream.reader_dropped", behind=self._room)
            self.end()

    def end(self) -> None:
        """Nothing more comes, and what has not been taken is thrown away."""
        self._ended = True
        self._queue.clear()
        self._filled.set()
        self.close()

    def close(self) -> None:
        """Nobody reads any more."""
        self._on_close(self)

    async def next(self, timeout: float) -> bytes | None:
        """All frames that wait, as one piece; empty after `timeout` seconds, `None` at the end."""
        if not self._queue and not self._ended:
            self._filled.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._filled.wait()
            except TimeoutError:
                return b""
        if self._ended:
            return None
        piece = b"".join(self._queue)
        self._queue.clear()
        return piece
