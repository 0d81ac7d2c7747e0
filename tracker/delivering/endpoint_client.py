"""One attempt: a signed request to an endpoint, and what came of it."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import httpx

from tracker.core.clock import Clock
from tracker.core.errors import TrackerError
from tracker.core.events import LONGEST_RETRY_AFTER, MOST_OPEN
from tracker.core.formatting import iso_time
from tracker.delivering.addresses import (
    Address,
    GuardedTransport,
    Resolver,
    connect_failure,
    resolve,
)
from tracker.delivering.signing import signed_headers
from tracker.flora.http import NoCookies, retry_after_of
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An endpoint of this process's settings, with its secrets."""

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
    """Sends messages to one endpoint, whose secrets may be replaced.

    Redirects are not followed, and the environment's proxies are not used. `answer_seconds` limits
    an attempt.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        clock: Clock,
        resolver: Resolver | None = None,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self.endpoint = endpoint
        self.most_open = MOST_OPEN
        self._clock = clock
        self._seconds = answer_seconds
        self._http = httpx.AsyncClient(
            transport=GuardedTransport(
                allow_private=endpoint.allow_private,
                resolver=resolver or EndpointResolver(),
                one_host=True,
                what="the endpoint",
                permission="allow_private = true",
            ),
            headers={"accept": "*/*", "accept-encoding": "identity"},
            cookies=NoCookies(),
            timeout=None,  # noqa: S113 - `send` limits the whole attempt
            follow_redirects=False,
            trust_env=False,
        )

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
            async with asyncio.timeout(self._seconds):
                request = self._http.build_request(
                    "POST", self.endpoint.url, content=content, headers=headers
                )
                response = await self._http.send(request, stream=True)
                answer = await _beginning(response)
        except TimeoutError:
            error = f"no answer within {self._seconds:g} s"
        except httpx.TransportError as exc:
            error = connect_failure(exc) or "the connection was cut"
        except TrackerError as exc:  # the address is refused, or cannot be resolved
            error = str(exc)
        at = self._clock()
        seconds = time.monotonic() - began
        if response is None:
            return Attempt(at=at, seconds=seconds, error=error)
        with suppress(httpx.TransportError):
            await response.aclose()
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
    text = received[:ANSWER_BYTES].decode(errors="replace")
    return excerpt(text)


def excerpt(text: str) -> str:
    """The first characters of a text, as they are stored."""
    return "".join(one if one.isprintable() else " " for one in text).strip()[:EXCERPT]


def _refusal(response: httpx.Response) -> str | None:
    if response.is_success:
        return None
    if response.is_redirect:
        return f"it answered HTTP {response.status_code}; redirects are not followed"
    return f"it answered HTTP {response.status_code}"
