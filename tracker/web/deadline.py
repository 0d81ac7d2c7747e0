"""What is only looked at is there in time, or the client is told that it is not.

A page asks the database several things, one after the other, and a database in trouble takes its
time for each. What changes something has waits of its own; a stream goes on for as long as it goes.
"""

import asyncio
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracker.web.faults import unavailable
from tracker.web.origin import SAFE

_STREAM: Final = "/api/stream"


class Deadline:
    """Raises `Fault` 503 where an answer has not begun within `seconds`."""

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] not in SAFE or scope["path"] == _STREAM:
            await self._app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            timer.reschedule(None)  # how long the client takes to read is its own affair
            await send(message)

        try:
            async with asyncio.timeout(self._seconds) as timer:
                await self._app(scope, receive, send_in_time)
        except TimeoutError:
            if not timer.expired():
                raise
            raise unavailable("The database does not answer in time.") from None
