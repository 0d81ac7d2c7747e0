"""Python handlers: functions of this process that get events as endpoints do.

A handler is an endpoint of the database under its name. Here its calls take the place of requests:
returning delivers a message, an exception is a failed attempt.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from inspect import isawaitable
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import DoNotRetry
from tracker.core.events import HANDLER_SECONDS, MOST_OPEN
from tracker.core.log import get_logger, redact
from tracker.core.waiting import in_thread
from tracker.delivering.endpoint_client import excerpt
from tracker.store.queries.endpoints import EndpointConfig
from tracker.store.writing.messages import Attempt, Claim

COMMIT_SECONDS: Final = 10.0
"""How long a message stays claimed beyond the timeout, for its outcome to be committed."""
LONGEST: Final = 10_000
"""Characters of an exception's message that are read; fewer are stored."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """A function that gets the messages of the endpoint `config`.

    `call` may be a coroutine function; otherwise each call has a thread of its own. `concurrency`
    limits the calls at a time, over all processes; `timeout` is in seconds.
    """

    config: EndpointConfig
    call: Callable[[Claim], object]
    is_async: bool
    concurrency: int = MOST_OPEN
    timeout: float = HANDLER_SECONDS

    @property
    def lease(self) -> timedelta:
        """How long a message is claimed: the longest call, and the commit of its outcome."""
        return timedelta(seconds=self.timeout + COMMIT_SECONDS)


class HandlerClient:
    """Calls one handler."""

    def __init__(self, handler: Handler, *, clock: Clock) -> None:
        self._handler = handler
        self._clock = clock
        self._late = 0

    @property
    def most_open(self) -> int:
        """How many calls may run: without those in threads that go on after their timeout."""
        return self._handler.concurrency - self._late

    async def aclose(self) -> None:
        """Nothing is to close; threads cannot be interrupted."""

    async def send(self, claim: Claim) -> Attempt:
        """Call the handler once. Never raises for what the handler does."""
        began, failure = time.monotonic(), None
        limit = asyncio.timeout(self._handler.timeout)
        try:
            async with limit:
                await self._call(claim)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # SystemExit too: a handler must not end the process
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            failure = error
        at, seconds = self._clock(), time.monotonic() - began
        if failure is None:
            return Attempt(at=at, seconds=seconds)
        if limit.expired() and isinstance(failure, TimeoutError):
            text = f"the handler did not return within {self._handler.timeout:g} s"
        else:
            text = self._text(failure)
        log.exception(
            "handler.failed",
            handler=self._handler.config.endpoint_id,
            message_id=claim.message_id,
            attempt=claim.attempts + 1,
            error=text,
            exc_info=failure,
        )
        return Attempt(
            at=at,
            seconds=seconds,
            error=text,
            final=isinstance(failure, DoNotRetry),
            raised=not limit.expired(),
        )

    async def _call(self, claim: Claim) -> None:
        work = partial(self._handler.call, claim)
        if self._handler.is_async:
            result = work()
        else:
            thread = in_thread(f"handler {self._handler.config.endpoint_id}", work)
            try:
                result = await asyncio.shield(thread)
            except asyncio.CancelledError:
                if not thread.done():
                    self._late += 1
                    thread.add_done_callback(self._ended_late)
                raise
        if isawaitable(result):  # also of a plain function that calls a coroutine function
            await result

    def _ended_late(self, _: object) -> None:
        self._late -= 1

    def _text(self, error: BaseException) -> str:
        """The type and message of an exception, bounded and without secrets."""
        try:
            message = str(error)[:LONGEST]
        except Exception:
            message = "its message cannot be shown"
        name = type(error).__name__
        return excerpt(redact(f"{name}: {message}" if message else name))
