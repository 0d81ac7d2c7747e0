"""A reader of server-sent events, as a browser is one."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Events:
    """What comes over one connection. `last_id` is what a browser would come back with."""

    response: httpx.Response
    last_id: str | None = None
    comments: int = 0
    _frames: AsyncIterator[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self._frames = self._read()

    async def next(self, seconds: float = 10) -> dict[str, Any]:
        """The next event; fails where none comes in time, or the stream ends."""
        async with asyncio.timeout(seconds):
            frame = await anext(self._frames)
        return {"event": frame["event"], "data": json.loads(frame["data"]), "id": frame.get("id")}

    async def runs(self, count: int) -> list[dict[str, Any]]:
        """The runs of the next events."""
        return [(await self.next())["data"]["run"] for _ in range(count)]

    async def ended(self, seconds: float = 10) -> bool:
        """Whether the stream ends without another event."""
        try:
            await self.next(seconds)
        except StopAsyncIteration:
            return True
        return False

    async def _read(self) -> AsyncIterator[dict[str, str]]:
        frame: dict[str, str] = {}
        async for line in self.response.aiter_lines():
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, value = line.partition(": ")
                frame[name] = value
            else:
                self.last_id = frame.get("id", self.last_id)
                if "data" in frame:
                    yield frame
                frame = {}


@asynccontextmanager
async def following(
    client: httpx.AsyncClient, *, last: str | None = None, **query: Any
) -> AsyncIterator[Events]:
    """Follows the stream, from now on or from the event that was seen last."""
    headers = {} if last is None else {"Last-Event-ID": last}
    async with client.stream("GET", "/api/stream", params=query, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Events(response)
