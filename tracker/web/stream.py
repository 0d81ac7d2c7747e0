"""`GET /api/stream`: server-sent events, one for each change of a run, from any process.

The ids are the numbers of `run_events`, so `Last-Event-ID` is all that a client has to remember.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Annotated, Final
from weakref import WeakKeyDictionary

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tracker.core.errors import StoreError
from tracker.core.events import RunFilter
from tracker.core.log import get_logger
from tracker.polling.changes import Change, ChangeReader
from tracker.services import Services
from tracker.store.queries import techniques
from tracker.views import event_json, run_json
from tracker.web.api.requests import Filter, Query, validate
from tracker.web.auth import AccessControl, Actor, actor_of
from tracker.web.http import Limits
from tracker.web.http.responses import to_json, unavailable

RECONNECT_MILLISECONDS: Final = 2000
"""How long a browser waits before it reconnects."""
STOP_SECONDS: Final = 1.0
"""How long a client that does not read is waited for when the process stops."""
SEND_BYTES: Final = 256 * 1024
"""About how much of what is queued is copied for one reader at a time."""
_LINE_ENDS: Final = re.compile(b"\xc2\x85|\xe2\x80[\xa8\xa9]")
"""NEXT LINE, LINE SEPARATOR and PARAGRAPH SEPARATOR in UTF-8: line ends to some clients."""

log = get_logger(__name__)


class StreamQuery(Query):
    """The query of `GET /api/stream`. `last_event_id` also comes as the header, which wins."""

    run_id: Filter = None
    technique_id: Filter = Field(None, description="Its id or its slug.")
    workspace_id: Filter = None
    status: Filter = None
    last_event_id: Annotated[
        int | None,
        Field(
            ge=0,
            le=2**63 - 1,
            description="The id of the last event received; also as the header `Last-Event-ID`, "
            "which browsers send by themselves.",
        ),
    ] = None


class EventStream(StreamingResponse):
    """Streams frames until they end, the client leaves, or `stopping` is set.

    Then `on_close` is called. A client that reads nothing blocks its own task alone, and is cut off
    when the process stops.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncIterator[bytes] | Iterable[bytes],
        *,
        stopping: asyncio.Event,
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(frames, headers={"x-accel-buffering": "no"})
        self._stopping = stopping
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self.stream_response(send))
        tasks: list[asyncio.Task[None]] = [
            sending,
            asyncio.create_task(self.listen_for_disconnect(receive)),
            asyncio.create_task(self._stopped()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_close()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not sending.cancelled():
            sending.result()

    async def _stopped(self) -> None:
        await self._stopping.wait()
        await asyncio.sleep(STOP_SECONDS)


class Stream:
    """`GET /api/stream`."""

    def __init__(self, services: Services, access: AccessControl, *, limits: Limits) -> None:
        self._access = access
        self._limits = limits
        self._stopping = asyncio.Event()
        self._changes = services.changes
        self._database = services.database
        self._readers: set[ChangeReader] = set()

    def stop(self) -> None:
        """End all streams: the process stops, and they would not end by themselves."""
        self._stopping.set()
        for reader in tuple(self._readers):
            reader.end()

    async def follow(self, request: Request, query: StreamQuery) -> Response:
        last = query.last_event_id
        if (header := request.headers.get("last-event-id")) is not None:
            last = validate(StreamQuery, {"last_event_id": header}).last_event_id
        wanted = query.model_dump(exclude={"last_event_id"})
        wanted["technique_id"] = await techniques.id_of(self._database, query.technique_id)
        reader = await self._subscribe(RunFilter(**wanted))
        if last is None:
            reader.go_live(self._changes.sent_upto)
        frames = self._frames(reader, last, actor_of(request.scope))

        def leave() -> None:
            self._readers.discard(reader)
            reader.close()

        return EventStream(
            frames if request.method == "GET" else (), stopping=self._stopping, on_close=leave
        )

    async def _subscribe(self, runs: RunFilter) -> ChangeReader:
        """Raises `Fault` 503 where there are too many readers already, and `StoreUnavailable`."""
        reader = await self._changes.subscribe(runs, queue_size=self._limits.stream_queue)
        most, refusal = self._limits.stream_readers, None
        followed = sum(not one.ended for one in self._readers)  # many may subscribe at once
        if self._stopping.is_set():
            refusal = "The service is shutting down."
        elif followed >= most:
            refusal = f"The maximum of {most} stream readers is reached."
        if refusal is not None:
            reader.close()
            raise unavailable(refusal)
        self._readers.add(reader)
        return reader

    async def _frames(
        self, reader: ChangeReader, last: int | None, actor: Actor
    ) -> AsyncIterator[bytes]:
        """Frames until the time is over, or the reader has signed out or lost its token."""
        loop, heartbeat = asyncio.get_running_loop(), self._limits.stream_heartbeat
        checked_at = loop.time()
        until = checked_at + self._limits.stream_seconds
        try:
            # A browser keeps this id although there is no event with it.
            first = reader.position if last is None else last
            yield b"retry: %d\nid: %d\n\n" % (RECONNECT_MILLISECONDS, first)
            if last is not None:
                async for missed in self._resume(reader, last):
                    yield missed
            while (wait := until - loop.time()) > 0:
                if not await reader.wait(min(wait, heartbeat)):
                    return
                frames = next_frames(reader)
                if loop.time() - checked_at >= heartbeat:
                    checked_at = loop.time()
                    if not await self._access.may_read_on(actor):
                        return
                # A comment keeps the connection open.
                yield frames or b": heartbeat\nid: %d\n\n" % reader.position
        except StoreError as error:
            # The client reconnects and gets a 503.
            log.warning("stream.broken_off", error=str(error))

    async def _resume(self, reader: ChangeReader, last: int) -> AsyncIterator[bytes]:
        """What the reader missed after event `last`; then it is live."""
        if not await self._changes.has_reached(last):
            reader.go_live(self._changes.sent_upto)
            yield frame_of(reader.position)
            return
        async for changes in self._changes.missed(last):
            if reader.ended:
                return
            frames = b"".join(frame_of(one) for one in changes if reader.runs.matches(one.record))
            if frames:
                yield frames
        reader.go_live(max(last, self._changes.sent_upto))


def next_frames(reader: ChangeReader) -> bytes:
    """The first frames of what is queued, `SEND_BYTES` and the last frame at most.

    Those left in the queue are shared with the other readers, what is being sent is not.
    """
    frames, size = [], 0
    while size < SEND_BYTES and (one := reader.next()) is not None:
        frames.append(frame_of(one))
        size += len(frames[-1])
    return b"".join(frames)


_encoded: Final = WeakKeyDictionary[Change, bytes]()


def frame_of(one: Change | int) -> bytes:
    """`event: run` with `{"event", "run"}`, built once for all readers; for a number `event:
    reset`, which asks the client to reload what it shows: the stream continues after it."""
    if isinstance(one, int):
        return b"id: %d\nevent: reset\ndata: {}\n\n" % one
    if (known := _encoded.get(one)) is not None:
        return known
    number, shown = b"", None
    if one.event is not None:
        number, shown = b"id: %d\n" % one.event.id, event_json(one.event)
    data = to_json({"event": shown, "run": run_json(one.record)})
    data = _LINE_ENDS.sub(lambda end: b"\\u%04x" % ord(end[0].decode()), data)
    frame = _encoded[one] = b"%bevent: run\ndata: %b\n\n" % (number, data)
    return frame
