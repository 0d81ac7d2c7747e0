"""The endpoint: who wants to hear what, and from where on."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import structlog
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.errors import StoreError
from tracker.web.api.requests import Filter, checked, checked_query
from tracker.web.auth import Access, Actor, actor_of
from tracker.web.http.limits import Limits
from tracker.web.services import Services
from tracker.web.stream.broadcaster import Broadcaster
from tracker.web.stream.events import Wanted, greeting, heartbeat, reset
from tracker.web.stream.reader import Reader
from tracker.web.stream.response import EventStream

LARGEST: Final = 2**63 - 1

log = structlog.get_logger(__name__)


def _none_if_empty(value: Any) -> Any:
    return value or None


class StreamQuery(BaseModel):
    """The query of `GET /api/stream`. `last_event_id` also comes as the header, which wins."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    run_id: Filter = None
    technique_id: Filter = None
    workspace_id: Filter = None
    status: Filter = None
    last_event_id: Annotated[
        int | None,
        Field(
            ge=0,
            le=LARGEST,
            description="The id of the last event that was seen; as the header `Last-Event-ID`, "
            "which a browser sends by itself.",
        ),
        BeforeValidator(_none_if_empty),
    ] = None


class Stream:
    """`GET /api/stream`."""

    def __init__(self, services: Services, access: Access, *, limits: Limits) -> None:
        self._access = access
        self._limits = limits
        self._stopping = asyncio.Event()
        self._broadcaster = Broadcaster(
            services.database,
            services.signals,
            readers=limits.stream_readers,
            room=limits.stream_room,
        )

    def routes(self) -> list[Route]:
        """The one route."""
        return [Route("/api/stream", self.follow, methods=["GET"])]

    def stop(self) -> None:
        """End all streams now: the process stops, and they would not end by themselves."""
        self._broadcaster.close()
        self._stopping.set()

    async def follow(self, request: Request) -> Response:
        """Server-sent events, one for each change of a run that is wanted."""
        query = checked_query(StreamQuery, request.query_params)
        last = query.last_event_id
        if (header := request.headers.get("last-event-id")) is not None:
            last = checked(StreamQuery, {"last_event_id": header}).last_event_id
        wanted = Wanted(
            run_id=query.run_id,
            technique_id=query.technique_id,
            workspace_id=query.workspace_id,
            status=query.status,
        )
        reader = await self._broadcaster.follow(wanted)
        if last is None:
            reader.go_live(self._broadcaster.told_upto)
        return EventStream(
            self._frames(reader, last, actor_of(request.scope)),
            stopping=self._stopping,
            on_close=reader.close,
        )

    async def _frames(self, reader: Reader, last: int | None, actor: Actor) -> AsyncIterator[bytes]:
        """Until the reader leaves, its time is over, or it has signed out or lost its token."""
        loop = asyncio.get_running_loop()
        checked = loop.time()
        until = checked + self._limits.stream_seconds
        try:
            if last is None:
                yield greeting(reader.position)
            else:
                async for missed in self._resumed(reader, last):
                    yield missed
            while (wait := until - loop.time()) > 0:
                piece = await reader.next(min(wait, self._limits.stream_heartbeat))
                if piece is None:
                    return
                if loop.time() - checked >= self._limits.stream_heartbeat:
                    checked = loop.time()
                    if not await self._access.holds(actor):
                        return
                yield piece or heartbeat(reader.position)
        except StoreError as error:
            # The reader comes back, and is told then that the database is down.
            log.warning("stream.broken_off", error=str(error))

    async def _resumed(self, reader: Reader, last: int) -> AsyncIterator[bytes]:
        """What a reader missed that has seen all up to `last`; it is live afterwards."""
        broadcaster = self._broadcaster
        if not await broadcaster.knows(last):
            reader.go_live(broadcaster.told_upto)
            yield greeting(reader.position) + reset(reader.position)
            return
        yield greeting(last)
        async for changes in broadcaster.missed(last):
            if reader.ended:
                return
            piece = b"".join(each.frame for each in changes if reader.wanted.takes(each.record))
            if piece:
                yield piece
        reader.go_live(max(last, broadcaster.told_upto))
