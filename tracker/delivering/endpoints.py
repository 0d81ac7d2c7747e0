"""Where the messages of an endpoint go: one attempt at a URL or a Python handler, and its outcome.

An `EndpointClient` sends a signed request. A handler is a function of this process that gets events
as URLs do: it is an endpoint of the database under its name, and its calls take the place of
requests: returning delivers a message, an exception is a failed attempt.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import httpx

from tracker import __version__
from tracker.core.clock import Clock
from tracker.core.errors import DoNotRetry, TrackerError
from tracker.core.events import HANDLER_SECONDS, LONGEST_RETRY_AFTER, MOST_OPEN, signed_headers
from tracker.core.formatting import iso_time
from tracker.core.log import get_logger, redact
from tracker.core.waiting import in_thread
from tracker.delivering.addresses import (
    Address,
    GuardedTransport,
    Resolver,
    connect_failure,
    resolve,
)
from tracker.flora.http import CONNECTION_ERRORS, NoCookies, ReplaceableClient, retry_after_of
from tracker.store.engine import dump_json
from tracker.store.queries.endpoints import EndpointConfig
from tracker.store.writing.messages import Attempt, Claim

if TYPE_CHECKING:
    from tracker.settings import EndpointSettings

ANSWER_SECONDS: Final = 15.0
"""How long an endpoint may take to answer, with the connection."""
ANSWER_BYTES: Final = 4096
"""How much of an answer is read."""
EXCERPT: Final = 1000
"""How many characters of it are stored."""
RESOLVED_SECONDS: Final = 30.0
"""How long the addresses of a name are used."""
COMMIT_SECONDS: Final = 10.0
"""How long a message stays claimed beyond a handler's timeout, for its outcome to be committed."""
LONGEST: Final = 10_000
"""Characters of an exception's message that are read; fewer are stored."""

log = get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """An endpoint of this process's settings, with its secrets, which may be replaced."""

    config: EndpointConfig
    url: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    allow_private: bool = False


def endpoint_of(configured: "EndpointSettings") -> Endpoint:
    """The endpoint with its secrets in clear."""
    return Endpoint(
        config=EndpointConfig(
            endpoint_id=configured.id,
            url=configured.shown_url,
            events=configured.events,
            filter=configured.filter,
        ),
        url=configured.url,
        secrets=tuple(secret.get_secret_value() for secret in configured.secrets),
        allow_private=configured.allow_private,
    )


class EndpointResolver:
    """Resolves the name of one endpoint, one lookup at a time, and remembers the addresses."""

    def __init__(self) -> None:
        self._found: list[Address] = []
        self._until = float("-inf")
        self._lookup: asyncio.Task[list[Address]] | None = None

    async def __call__(self, host: str, port: int) -> list[Address]:
        """The addresses of the host. Raises `OSError`."""
        if time.monotonic() >= self._until:
            if self._lookup is None or self._lookup.done():
                self._lookup = asyncio.create_task(resolve(host, port), name=f"resolve {host}")
            self._found = await asyncio.shield(self._lookup)
            self._until = time.monotonic() + RESOLVED_SECONDS
        return self._found


class EndpointClient:
    """Sends messages to one endpoint.

    Redirects are not followed, and the environment's proxies are not used. `answer_seconds` limits
    an attempt. Clients may share a `tls` context, which takes long to make.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        clock: Clock,
        resolver: Resolver | None = None,
        answer_seconds: float = ANSWER_SECONDS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.most_open = MOST_OPEN
        self._clock = clock
        self._seconds = answer_seconds
        resolver, tls = resolver or EndpointResolver(), tls or httpx.create_ssl_context()
        reached = dict[str, Address]()

        def new_http() -> httpx.AsyncClient:
            return httpx.AsyncClient(
                transport=GuardedTransport(
                    allow_private=endpoint.allow_private,
                    resolver=resolver,
                    tls=tls,
                    one_host=True,
                    what="the endpoint",
                    permission="allow_private = true",
                    reached=reached,
                ),
                headers={
                    "accept": "*/*",
                    "accept-encoding": "identity",
                    "content-type": "application/json",
                    "user-agent": f"flora-run-tracker/{__version__}",
                },
                cookies=NoCookies(),
                timeout=None,  # noqa: S113 - `send` limits the whole attempt
                follow_redirects=False,
                trust_env=False,
            )

        self._http = ReplaceableClient(new_http)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def send(self, claim: Claim) -> Attempt:
        """Send a message once. Never raises for what the endpoint does."""
        content, began = claim.body.encode(), time.monotonic()
        secrets = self.endpoint.secrets
        headers = signed_headers(claim.message_id, content, secrets, at=self._clock())
        response: httpx.Response | None = None
        answer, error = "", None
        try:
            async with (
                asyncio.timeout(self._seconds),
                self._http.for_request() as http,
                http.stream(
                    "POST", self.endpoint.url, content=content, headers=headers
                ) as response,
            ):
                answer = await _beginning(response)
        except TimeoutError:
            error = f"no answer within {self._seconds:g} s"
        except CONNECTION_ERRORS as exc:
            error = connect_failure(exc) or "the connection was cut"
        except TrackerError as exc:  # the address is refused, or cannot be resolved
            error = str(exc)
        at = self._clock()
        seconds = time.monotonic() - began
        if response is None:
            return Attempt(at=at, seconds=seconds, error=error)
        # The status decides, also where the rest of the answer does not come.
        return Attempt(
            at=at,
            seconds=seconds,
            status=response.status_code,
            answer=answer or None,
            error=_refusal(response),
            retry_after=retry_after_of(
                response.headers, now=at, longest=LONGEST_RETRY_AFTER.total_seconds()
            ),
        )


async def send_test(
    endpoint: Endpoint, *, clock: Clock, answer_seconds: float = ANSWER_SECONDS
) -> Attempt:
    """Send a signed test event (`tracker.test`) and return the outcome."""
    now = clock()
    event = {
        "type": "tracker.test",
        "timestamp": iso_time(now),
        "data": {"endpoint_id": endpoint.config.endpoint_id},
    }
    client = EndpointClient(endpoint, clock=clock, answer_seconds=answer_seconds)
    try:
        return await client.send(Claim(f"msg_test_{uuid4().hex}", dump_json(event), now))
    finally:
        await client.aclose()


async def _beginning(response: httpx.Response) -> str:
    """The first characters of an answer, printable ones only."""
    received = b""
    async for part in response.aiter_raw():
        received += part
        if len(received) >= ANSWER_BYTES:
            break
    if response.headers.get("content-encoding", "identity") != "identity":
        return ""
    return _excerpt(received[:ANSWER_BYTES].decode(errors="replace"))


def _excerpt(text: str) -> str:
    """The first characters of a text, as they are stored."""
    return "".join(one if one.isprintable() else " " for one in text).strip()[:EXCERPT]


def _refusal(response: httpx.Response) -> str | None:
    if response.is_success:
        return None
    if response.is_redirect:
        return f"it answered HTTP {response.status_code}; redirects are not followed"
    return f"it answered HTTP {response.status_code}"


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
        return _excerpt(redact(f"{name}: {message}" if message else name))
