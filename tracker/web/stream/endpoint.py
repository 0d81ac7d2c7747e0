"""The endpoint: its query, and the response that lasts until the reader or the process leaves."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Annotated, Final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tracker.core.errors import StoreError
from tracker.core.events import RunFilter
from tracker.core.log import get_logger
from tracker.services import Services
from tracker.web.api.requests import NONE_IF_EMPTY, Filter, Query, validate
from tracker.web.auth import AccessControl, Actor, actor_of
from tracker.web.http.limits import Limits
from tracker.web.stream.broadcaster import Broadcaster
from tracker.web.stream.reader import StreamReader, reset_frame

RECONNECT_MILLISECONDS: Final = 2000
"""How long a browser waits before it reconnects."""
STOP_SECONDS: Final = 1.0
"""How long a client that does not read is waited for when the process stops."""

log = get_logger(__name__)


class StreamQuery(Query):
    """The query of `GET /api/stream`. `last_event_id` also comes as the header, which wins."""

    run_id: Filter = None
    technique_id: Filter = None
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
        NONE_IF_EMPTY,
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
        self._broadcaster = Broadcaster(services.database, services.signals, limits)

    def stop(self) -> None:
        """End all streams: the process stops, and they would not end by themselves."""
        self._broadcaster.close()
        self._stopping.set()

    async def follow(self, request: Request, query: StreamQuery) -> Response:
        """Server-sent events, one for each change of a matching run."""
        last = query.last_event_id
        if (header := request.headers.get("last-event-id")) is not None:
            last = validate(StreamQuery, {"last_event_id": header}).last_event_id
        reader = await self._broadcaster.subscribe(
            RunFilter(**query.model_dump(exclude={"last_event_id"}))
        )
        if last is None:
            reader.go_live(self._broadcaster.sent_upto)
        frames = self._frames(reader, last, actor_of(request.scope))
        return EventStream(
            frames if request.method == "GET" else (),
            stopping=self._stopping,
            on_close=reader.close,
        )

    async def _frames(
        self, reader: StreamReader, last: int | None, actor: Actor
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
                frames = await reader.next(min(wait, heartbeat))
                if frames is None:
                    return
                if loop.time() - checked_at >= heartbeat:
                    checked_at = loop.time()
                    if not await self._access.may_read_on(actor):
                        return
                # A comment keeps the connection open.
                yield frames or b": heartbeat\nid: %d\n\n" % reader.position
        except StoreError as error:
            # The client reconnects and gets a 503.
            log.warning("stream.broken_off", error=str(error))

    async def _resume(self, reader: StreamReader, last: int) -> AsyncIterator[bytes]:
        """What the reader missed after event `last`; then it is live."""
        broadcaster = self._broadcaster
        if not await broadcaster.has_reached(last):
            reader.go_live(broadcaster.sent_upto)
            yield reset_frame(reader.position)
            return
        async for changes in broadcaster.missed(last):
            if reader.ended:
                return
            frames = b"".join(one.frame for one in changes if reader.runs.matches(one.record))
            if frames:
                yield frames
        reader.go_live(max(last, broadcaster.sent_upto))
