"""Sends callbacks: one for each run with a callback address, in FLORA's attempts and with faults.

A callback's body and signature are made once, at its first attempt, and stay the same for all.

FLORA sends callbacks to public `https` addresses only. The simulator also accepts a loopback host,
and there plain `http`. A page in a browser must not make it call this machine by a name that
resolves to this machine later: a name is resolved again for each callback, which is sent to the
checked address.
"""

import asyncio
import hashlib
import hmac
import json
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import httpx

from tracker.simulator.runs import SimulatedRun
from tracker.simulator.world import World

API_VERSION: Final = "2026-06-11"

WAITS: Final = (0.0, 10.0, 60.0, 300.0)
"""Seconds before each attempt, counted from the one before."""

LATE: Final = 3.0
"""Delay of a late callback after the end, as a multiple of `run_seconds`."""

_CONNECTIONS: Final = 100
_FORGED_SECRET: Final = "whsec_forged"  # noqa: S105 - a wrong secret on purpose
_RESOLVE_SECONDS: Final = 2.0
INTERNAL_SUFFIXES: Final = (".internal", ".local", ".lan", ".home.arpa", ".localhost")

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[list[Address]]]
Kind = Literal["callback", "duplicate", "forged"]


@dataclass(frozen=True, slots=True)
class SignedCallback:
    """A callback ready to be sent, byte for byte."""

    run_id: str
    delivery_id: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackAttempt:
    """One POST of a callback and its outcome.

    `number` counts the attempts from 1, `at_ms` is when it left (Unix milliseconds). `status` is
    the receiver's answer; None where there was none, and then `error` names what happened.
    """

    run_id: str
    delivery_id: str
    kind: Kind
    number: int
    at_ms: int
    status: int | None
    error: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the receiver answered 2xx."""
        return self.status is not None and 200 <= self.status < 300


def sign(timestamp: int, body: bytes, secrets: Sequence[str]) -> str:
    """The `Flora-Signature` header: HMAC-SHA256 over `<t>.<body>`, keyed by each whole secret."""
    signed = b"%d.%s" % (timestamp, body)
    digests = [hmac.new(key.encode(), signed, hashlib.sha256).hexdigest() for key in secrets]
    return ",".join([f"t={timestamp}", *(f"v1={digest}" for digest in digests)])


def sign_callback(run: SimulatedRun, now_ms: int, *, forged: bool = False) -> SignedCallback:
    """The callback about a run's end, signed at this moment.

    A forged one reports the opposite, signed with a secret that is not the workspace's.
    """
    status, error = run.end, run.error
    delivery_id, secrets = run.draws.delivery_id, run.workspace.webhook_secrets
    if forged:
        status, error = "completed", {}
        if run.succeeds:
            status, error = "failed", {"error_code": "provider_error"}
        delivery_id, secrets = run.draws.forged_delivery_id, (_FORGED_SECRET,)
    event = f"run.{status}"
    data = {
        "run_id": run.run_id,
        "run_type": run.request.run_type,
        "workspace_id": run.workspace.workspace_id,
        "status": status,
    }
    content: dict[str, Any] = {
        "id": delivery_id,
        "type": event,
        "api_version": API_VERSION,
        "created_at": run.completed_ms,
        "data": data | error,
    }
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    headers = {
        "Content-Type": "application/json",
        "Flora-Signature": sign(now_ms // 1000, body, secrets),
        "Flora-Webhook-Id": delivery_id,
        "Flora-Event": event,
    }
    return SignedCallback(run.run_id, delivery_id, body, headers)


class CallbackSender:
    """Sends the callbacks of a world's runs, each in its own task."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tasks: set[asyncio.Task[Any]] = set()
        self._slots = asyncio.Semaphore(_CONNECTIONS)
        self._client: httpx.AsyncClient | None = None

    def run_in_background(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """Starts work that goes on after its request was answered, at most until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def schedule(self, run: SimulatedRun) -> asyncio.Event:
        """Sends the run's callback when it is due. The event is set after the first attempt.

        Where no callback is to be sent, the event is set from the beginning. For an end that is not
        documented FLORA sends none.
        """
        attempted = asyncio.Event()
        if run.callback_url is None or run.faults == {"drop"} or run.end_name is not None:
            attempted.set()
        else:
            self.run_in_background(self._send_all(run, run.callback_url, attempted))
        return attempted

    async def idle(self) -> None:
        """Waits until every callback that is scheduled was accepted or given up, and all other
        background work is done."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """Drops what has not been sent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _send_all(self, run: SimulatedRun, url: str, attempted: asyncio.Event) -> None:
        """Sends everything about one run, in its order."""
        options = self._world.options
        pace = options.run_seconds / options.speed
        try:
            await asyncio.sleep(self._seconds_until_due(run, pace))
            if "bad_signature" in run.faults:
                forged = sign_callback(run, self._world.now_ms(), forged=True)
                await self._attempt(url, forged, "forged", 1)
            if "drop" in run.faults:
                return
            callback = sign_callback(run, self._world.now_ms())
            for number, wait in enumerate(WAITS, 1):
                await asyncio.sleep(wait / options.speed)
                attempt = await self._attempt(url, callback, "callback", number)
                attempted.set()
                if attempt.accepted:
                    break
            else:
                return
            if "duplicate" in run.faults:
                await asyncio.sleep(run.draws.held * pace)
                await self._attempt(url, callback, "duplicate", attempt.number + 1)
        finally:
            # The answer to the start must not wait for a first attempt that never comes.
            attempted.set()

    def _seconds_until_due(self, run: SimulatedRun, pace: float) -> float:
        wait = max(0.0, (run.completed_ms - self._world.now_ms()) / 1000)
        if "late" in run.faults:
            wait += LATE * pace
        if "reorder" in run.faults:
            wait += run.draws.held * pace
        return wait

    async def _attempt(
        self, url: str, callback: SignedCallback, kind: Kind, number: int
    ) -> CallbackAttempt:
        status: int | None = None
        error: str | None = None
        async with self._slots:
            at_ms = self._world.now_ms()
            try:
                async with asyncio.timeout(self._world.options.callback_timeout):
                    status = await self._post(url, callback)
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as exc:
                error = type(exc).__name__
        attempt = CallbackAttempt(
            run_id=callback.run_id,
            delivery_id=callback.delivery_id,
            kind=kind,
            number=number,
            at_ms=at_ms,
            status=status,
            error=error,
        )
        self._world.deliveries.append(attempt)
        return attempt

    async def _post(self, url: str, callback: SignedCallback) -> int:
        """The receiver's answer. Raises `httpx.ConnectError` where no callback may go there."""
        found = await _target(url)
        if found is None:
            raise httpx.ConnectError("the host cannot be resolved, or is not public any more")
        headers = dict(callback.headers)
        if found[1]:  # by its address: hosts that share one do not share a connection
            headers |= {"Host": httpx.URL(url).netloc.decode("ascii"), "Connection": "close"}
        response = await self._http().post(
            found[0], content=callback.body, headers=headers, extensions=found[1]
        )
        return response.status_code

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                # Certificates as configured in the environment, but never its proxies: callbacks
                # mostly go to this very machine.
                verify=httpx.create_ssl_context(trust_env=True),
                trust_env=False,
                follow_redirects=False,
                timeout=httpx.Timeout(None),  # the whole attempt is timed, not its steps
                limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=20),
            )
        return self._client


async def _resolve(host: str, port: int) -> list[Address]:
    """The addresses of a name; none where it cannot be resolved within two seconds."""
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError, UnicodeError):
        return []
    return [ip_address(str(info[4][0]).partition("%")[0]) for info in found]


async def refusal(url: str, resolve: Resolver = _resolve) -> str | None:
    """Why `url` cannot be a callback address, or None where it can.

    A public name is resolved, and refused where any of its addresses is private; one that cannot
    be resolved now is accepted: its deliveries fail.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL"
    if not url.isascii() or parts.scheme not in ("http", "https") or not host:
        return "is not an http or https URL"
    if _is_loopback(host):
        return None
    if parts.scheme != "https":
        return "must be https, or http on a loopback host"
    if (address := literal_address(host)) is not None:
        return None if address.is_global else "must not be a private or internal host"
    if "." not in host or host.endswith(INTERNAL_SUFFIXES):
        return "must not be a private or internal host"
    addresses = await resolve(host, port or 443)
    if not all(address.is_global for address in addresses):
        return "must not resolve to a private or internal host"
    return None


async def _target(url: str) -> tuple[str, dict[str, str]] | None:
    """Where a callback to `url` is sent now, with the name of its host for TLS; `None` where that
    is not allowed, or not known."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_loopback(host):
        return url, {}
    addresses = await _resolve(host, parts.port or 443)
    if not addresses or not all(address.is_global for address in addresses):
        return None
    shown = f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=shown + port).geturl(), {"sni_hostname": host}


def literal_address(host: str) -> Address | None:
    """The address that a host is written as; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = literal_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)
