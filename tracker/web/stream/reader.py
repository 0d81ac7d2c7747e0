"""One reader of the stream: which runs it follows, and its bounded queue of events."""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from tracker.core.events import RunFilter
from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.waiting import wait_for
from tracker.store.queries.runs import EventLine
from tracker.views import event_json, run_json
from tracker.web.http.responses import to_json

_LINE_ENDS: Final = re.compile(b"\xc2\x85|\xe2\x80[\xa8\xa9]")
"""NEXT LINE, LINE SEPARATOR and PARAGRAPH SEPARATOR in UTF-8: line ends to some clients."""

SEND_BYTES: Final = 256 * 1024

log = get_logger(__name__)


@dataclass(frozen=True)
class Change:
    """A changed run. `event` is its new event; `None` where it changed without one (it was lost,
    or came back)."""

    record: Record
    event: EventLine | None

    @cached_property
    def frame(self) -> bytes:
        """`event: run` with `{"event", "run"}`, built once for all readers."""
        event, number, shown = self.event, b"", None
        if event is not None:
            number = b"id: %d\n" % event.id
            shown = event_json(event)
        data = to_json({"event": shown, "run": run_json(self.record)})
        data = _LINE_ENDS.sub(lambda end: b"\\u%04x" % ord(end[0].decode()), data)
        return b"%bevent: run\ndata: %b\n\n" % (number, data)


def reset_frame(number: int) -> bytes:
    """Asks the client to reload what it shows; the stream continues after `number`."""
    return b"id: %d\nevent: reset\ndata: {}\n\n" % number


class StreamReader:
    """A bounded queue between the broadcaster and one connection.

    The broadcaster never waits for a reader. One whose queue is full is disconnected; a browser
    reconnects with the last id that it has received.
    """

    def __init__(
        self, runs: RunFilter, *, queue_size: int, on_close: Callable[["StreamReader"], None]
    ) -> None:
        self.runs = runs
        self.position = 0
        """All events up to this number have been queued or skipped."""
        self.ended = False
        self._live = False
        self._queue_size = queue_size
        self._on_close = on_close
        self._queue: deque[Change | bytes] = deque()
        self._filled = asyncio.Event()

    def go_live(self, number: int) -> None:
        """Accept what is offered after `number` from now on."""
        self.position = number
        self._live = True

    def offer(self, change: Change) -> None:
        """Queue a change, if it is followed and new to this reader."""
        if not self._live or self.ended:
            return
        if change.event is not None:
            if change.event.id <= self.position:
                return
            self.position = change.event.id
        if self.runs.matches(change.record):
            self._add(change)

    def restart(self, number: int) -> None:
        """Events are numbered anew, and continue after `number`."""
        if self._live and not self.ended:
            self.position = number
            self._add(reset_frame(number))

    def _add(self, one: Change | bytes) -> None:
        if len(self._queue) < self._queue_size:
            self._queue.append(one)
            self._filled.set()
        else:
            log.info("stream.reader_dropped", behind=self._queue_size)
            self.end()

    def end(self) -> None:
        """Disconnect; what is queued is dropped."""
        self.ended = True
        self._queue.clear()
        self._filled.set()
        self.close()

    def close(self) -> None:
        """Give the place back to the broadcaster."""
        self._on_close(self)

    async def next(self, timeout: float) -> bytes | None:
        """The first queued frames, `SEND_BYTES` and the last frame at most; empty after `timeout`
        seconds, `None` at the end.

        Those left in the queue are shared with the other readers, what is being sent is not.
        """
        await self._wait(timeout)
        frames, size = [], 0
        while self._queue and size < SEND_BYTES:
            one = self._queue.popleft()
            frames.append(one if isinstance(one, bytes) else one.frame)
            size += len(frames[-1])
        return None if self.ended else b"".join(frames)

    async def take(self, timeout: float) -> list[Change | bytes] | None:
        """All queued changes and the frames between them; else like `next`."""
        await self._wait(timeout)
        taken = list(self._queue)
        self._queue.clear()
        return None if self.ended else taken

    async def _wait(self, timeout: float) -> None:
        """Until something is queued or the end has come, `timeout` seconds at most."""
        if not self._queue and not self.ended:
            self._filled.clear()
            await wait_for(self._filled, timeout)
