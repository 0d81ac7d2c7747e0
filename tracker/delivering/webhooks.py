"""Webhooks out: events of runs become messages, and these are delivered to their endpoints, which
are URLs or Python handlers.

Everything that has to survive is in the database: the outbox, the messages, the leases under which
they are sent. So any number of workers may run, and one that dies leaves only leases, which expire.

Every endpoint has a task of its own, so that a slow or dead one delays no other. Commits wake the
tasks within milliseconds; one query for all endpoints finds what is due later, or a signal missed.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import InitVar, dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import httpx

from tracker.core.clock import Clock
from tracker.core.errors import StoreError, TrackerError
from tracker.core.events import WAITS
from tracker.core.log import get_logger
from tracker.core.waiting import cancel, repeat, wait_for
from tracker.delivering.endpoints import (
    ANSWER_SECONDS,
    Endpoint,
    EndpointClient,
    Handler,
    HandlerClient,
    send_test,
)
from tracker.store.coordination import OUTBOX, notify
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.audit import Action
from tracker.store.queries.endpoints import Shown, configure, fan_out, get_endpoint, outbox_waits
from tracker.store.writing import messages
from tracker.store.writing.group_commit import call_hook
from tracker.store.writing.messages import Attempt, Claim, Sending, due_times, record_and_claim

GROUP: Final = 100
"""The most events that one transaction turns into messages."""
RETRY_SECONDS: Final = 1.0
"""How long to wait before an endpoint is woken again for what is due, and could not be claimed."""

OnAttempt = Callable[[str, Claim, Attempt], None]
"""Called with the endpoint's id and the outcome of an attempt, once it is committed."""

Target = EndpointClient | HandlerClient
"""Where the messages of one endpoint go."""

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class DeliveryTimes:
    """How long deliveries wait for what, in seconds."""

    tick: float = 5.0
    """After this long the database is read without a signal: the cost of a lost one."""
    configure_every: float = 60.0
    """Between two notes of the endpoints in this process's settings."""
    answer: float = ANSWER_SECONDS
    """How long an attempt waits for a URL's answer."""
    lease: timedelta = timedelta(seconds=ANSWER_SECONDS + 10)
    """How long a message for a URL is claimed: an attempt, and the commit of its outcome."""
    stop: float = 3.0
    """How long open requests and calls have to end when the process stops."""
    cancel: float = 1.0
    """How long those that are cancelled then have to clean up."""
    last_commits: float = 2.0
    """How long the last commits of the process may then take."""


class UnknownEndpoint(TrackerError):
    """No endpoint of that id is known, or it is not in the settings of this process."""


class UnknownMessage(TrackerError):
    """No message of that id is stored."""


@dataclass(kw_only=True, eq=False)
class Webhooks:
    """Sends events to `endpoints`, those in the settings of this process, and to its `handlers`.

    `start` begins to deliver, in a worker. Any process makes messages of the events that it caused
    when it ends (`aclose`), for the workers. `body` makes the body of a message, `process` is the
    holder of leases. `on_attempt` is called after each attempt.
    """

    database: Database
    endpoints: InitVar[Iterable[Endpoint]]
    body: Shown
    process: str
    clock: Clock
    waits: tuple[timedelta, ...] = WAITS
    times: DeliveryTimes = DeliveryTimes()
    on_attempt: OnAttempt = lambda *_: None
    handlers: InitVar[Iterable[Handler]] = ()

    def __post_init__(self, endpoints: Iterable[Endpoint], handlers: Iterable[Handler]) -> None:
        self._endpoints = {endpoint.config.endpoint_id: endpoint for endpoint in endpoints}
        self._handlers = {handler.config.endpoint_id: handler for handler in handlers}
        self._senders: dict[str, _Sender] = {}
        self._woken = asyncio.Event()
        self.rescheduled = asyncio.Event()
        """Messages may be due before the time that was found."""
        self._tasks: list[asyncio.Task[None]] = []
        self.stopping = False
        self._limit = GROUP
        self._configured_at = float("-inf")
        self._configured_by: datetime | None = None

    def rotate(self, secrets: Mapping[str, tuple[str, ...]]) -> None:
        """Sign with these secrets from now on, by endpoint."""
        for endpoint_id in self._endpoints.keys() & secrets.keys():
            self._endpoints[endpoint_id].secrets = secrets[endpoint_id]

    def make_messages(self) -> None:
        """Make messages of the events of this process soon; they wake their endpoints."""
        self._woken.set()

    def wake(self) -> None:
        """Check for events and for messages that are due; another process may have caused them."""
        self._woken.set()
        self.rescheduled.set()

    async def start(self) -> None:
        self.stopping = False
        try:
            async with asyncio.timeout(self.times.last_commits):
                await self._configure()  # runs that end from now on are sent
        except (StoreError, TimeoutError) as error:
            log.warning("outbox.not_configured", error=str(error), advice="it is tried again")
        for name, step in (("outbox", self._drain_next), ("due messages", self._wake_due)):
            work = repeat(name, step, is_over=lambda: self.stopping)
            self._tasks.append(asyncio.create_task(work, name=name))
        tls = httpx.create_ssl_context() if self._endpoints else None
        for endpoint_id, endpoint in self._endpoints.items():
            client = EndpointClient(
                endpoint, clock=self.clock, answer_seconds=self.times.answer, tls=tls
            )
            self._senders[endpoint_id] = _Sender(self, endpoint_id, client, self.times.lease)
        for name, handler in self._handlers.items():
            target = HandlerClient(handler, clock=self.clock)
            self._senders[name] = _Sender(self, name, target, handler.lease)

    async def stop(self) -> None:
        """Finish or interrupt the open requests, and release their messages."""
        tasks, self._tasks = self._tasks, []
        senders, self._senders = self._senders, {}
        if tasks:
            self.stopping = True
            self.wake()
            await asyncio.gather(
                *(_end(task, self.times.last_commits) for task in tasks),
                *(sender.stop() for sender in senders.values()),
            )

    async def aclose(self) -> None:
        """Make messages of the last events of this process. Raises `StoreUnavailable`; then a
        worker makes them, or the next process that ends."""
        if self._woken.is_set():
            await self._configure()
            await self.drain()

    async def drain(self) -> int:
        """Make messages of all events; returns how many events there were.

        Raises `StoreUnavailable`.
        """
        total, own = 0, [*self._endpoints, *self._handlers]
        while True:
            limit = self._limit
            work = partial(fan_out, limit=limit, now=self.clock(), body=self.body, own=own)
            try:
                made = await self.database.write(work)
            except StoreError:
                self._limit = max(limit // 2, 1)  # all together may take too long
                raise
            self._limit = min(2 * limit, GROUP)
            total += made.taken
            for endpoint_id in made.endpoint_ids & self._senders.keys():
                self._senders[endpoint_id].wake()
            if made.endpoint_ids - self._senders.keys():
                await notify(self.database, OUTBOX)
            if not made.more:
                return total

    async def test(self, endpoint_id: str) -> Attempt:
        """Send a signed test event (`tracker.test`), which is not stored, and return the outcome.

        Raises `UnknownEndpoint` where this process has no secret for it, and for a handler.
        """
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None:
            row = await get_endpoint(self.database, endpoint_id)
            if row is not None and row.is_handler:
                raise UnknownEndpoint(
                    f"{endpoint_id} is a Python handler, which gets no test events: resend one of "
                    "its messages (tracker messages resend), or call the function in a test"
                )
            known = ", ".join(self._endpoints) or "none"
            raise UnknownEndpoint(
                f"endpoint {endpoint_id} is not in the settings of this process (known: {known})"
            )
        now = self.clock()
        await audit.write(self.database, audit.entry(Action.TEST, now, endpoint_id=endpoint_id))
        return await send_test(endpoint, clock=self.clock)

    async def enable(self, endpoint_id: str) -> None:
        """Enable an endpoint again, and send what waits for it. Raises `UnknownEndpoint`."""
        if not await messages.enable(self.database, endpoint_id, now=self.clock()):
            raise UnknownEndpoint(f"endpoint {endpoint_id} is not known")
        await self._announce()

    async def resend(self, message_id: str) -> None:
        """Send a message again at once, whatever its state. Raises `UnknownMessage`."""
        if not await messages.resend(self.database, message_id, now=self.clock()):
            raise UnknownMessage(f"message {message_id} is not known")
        await self._announce()

    async def recover(self, endpoint_id: str, *, since: datetime) -> int:
        """Send the failed messages of an endpoint that were created since then again, and its
        pending ones at once; returns how many had failed. Raises `UnknownEndpoint`.

        Runs without a message, from before the endpoint was configured, stay without one.
        """
        now = self.clock()
        count = await messages.recover(self.database, endpoint_id, since=since, now=now)
        if count is None:
            raise UnknownEndpoint(f"endpoint {endpoint_id} is not known")
        await self._announce()
        return count

    async def _announce(self) -> None:
        self.wake()
        with suppress(StoreError):  # they check every few seconds
            await notify(self.database, OUTBOX)

    async def _drain_next(self) -> None:
        """Make messages of what there is, and wait until there may be more."""
        woken = self._woken.is_set()
        self._woken.clear()
        try:
            await self._configure()
            if woken or await outbox_waits(self.database):
                await self.drain()
        except BaseException:
            self._woken.set()
            raise
        await wait_for(self._woken, self.times.tick)

    async def _wake_due(self) -> None:
        """Wake the endpoints that have something due, and wait until another may have."""
        self.rescheduled.clear()
        senders, now, wait = self._senders, self.clock(), self.times.tick
        sendings = [sender.sending for sender in senders.values()]
        for endpoint_id, at in (await due_times(self.database, sendings, now=now)).items():
            if at <= now:
                senders[endpoint_id].wake()
            wait = min(wait, RETRY_SECONDS if at <= now else (at - now).total_seconds())
        await wait_for(self.rescheduled, wait)

    async def _configure(self) -> None:
        """Note the endpoints of this process in the database, once a minute.

        By either clock: after days of sleep they would seem to be removed, and get no messages.
        """
        now = self.clock()
        if self._configured_by is not None:
            by_clock = abs((now - self._configured_by).total_seconds())
            passed = max(time.monotonic() - self._configured_at, by_clock)
            if passed < self.times.configure_every:
                return
        configs = [one.config for one in self._endpoints.values()]
        configs += [one.config for one in self._handlers.values()]
        replaced = await configure(self.database, configs, now=now)
        if self._configured_by is not None:  # else the settings of before a restart
            for row in replaced:
                log.warning(
                    "endpoint.settings_differ",
                    endpoint_id=row.endpoint_id,
                    other=row.where,
                    advice="two processes take turns to replace the settings of this endpoint: give"
                    " both the same, or two ids",
                )
        self._configured_at, self._configured_by = time.monotonic(), now


async def _end(task: asyncio.Task[None], seconds: float) -> None:
    """Wait for a task that was told to stop: a transaction is interrupted only if it lasts."""
    await asyncio.wait([task], timeout=seconds)
    await cancel(task)


class _Sender:
    """Sends the messages of one endpoint, from when it is made until `stop`."""

    def __init__(
        self, webhooks: Webhooks, endpoint_id: str, target: Target, lease: timedelta
    ) -> None:
        self._webhooks = webhooks
        self._endpoint_id = endpoint_id
        self.target = target
        self.sending = Sending(
            endpoint_id=endpoint_id,
            holder=webhooks.process,
            lease=lease,
            most_open=target.most_open,
            waits=webhooks.waits,
        )
        self._woken = asyncio.Event()
        self._open: dict[asyncio.Task[None], str] = {}
        self._outcomes: list[tuple[Claim, Attempt]] = []
        name = f"endpoint {endpoint_id}"
        sending = repeat(name, self._send_next, is_over=lambda: webhooks.stopping)
        self._task = asyncio.create_task(sending, name=name)

    def wake(self) -> None:
        self._woken.set()

    async def stop(self) -> None:
        """Let open requests end for a moment, interrupt the rest, and store what came of them."""
        times, database = self._webhooks.times, self._webhooks.database
        self.wake()
        await _end(self._task, times.last_commits)
        if self._open:
            await asyncio.wait(self._open, timeout=times.stop)
        cancelled = dict(self._open)
        await cancel(*cancelled, seconds=times.cancel)
        ended = {claim.message_id for claim, _ in self._outcomes}
        interrupted = sorted({*cancelled.values()} - ended)
        try:
            async with asyncio.timeout(times.last_commits):
                self.wake()
                await self._send_next()
                if interrupted:
                    holder = self.sending.holder
                    work = partial(messages.release, holder=holder, message_ids=interrupted)
                    await database.write(work)
        except (StoreError, TimeoutError):
            log.warning(
                "endpoint.claims_kept", endpoint_id=self._endpoint_id, advice="they run out"
            )
        await self.target.aclose()

    async def _send_next(self) -> None:
        """Wait until woken; then store outcomes, and begin attempts unless the process stops."""
        await self._woken.wait()
        self._woken.clear()
        free = 0 if self._webhooks.stopping else self.target.most_open - len(self._open)
        if not self._outcomes and free <= 0:
            return
        outcomes, self._outcomes = self._outcomes, []
        work = partial(
            record_and_claim,
            sending=self.sending,
            outcomes=[(claim.message_id, attempt) for claim, attempt in outcomes],
            most=free,
            now=self._webhooks.clock(),
        )
        try:
            claimed = await self._webhooks.database.write(work)
        except BaseException:
            self._outcomes = outcomes + self._outcomes
            self.wake()
            raise
        if any(not attempt.delivered for _, attempt in outcomes):
            self._webhooks.rescheduled.set()
        for claim in claimed.claims:
            task = asyncio.create_task(self._attempt(claim), name=f"message {claim.message_id}")
            self._open[task] = claim.message_id
            task.add_done_callback(self._ended)
        for claim, attempt in outcomes:
            call_hook(self._webhooks.on_attempt, self._endpoint_id, claim, attempt)
        if claimed.disabled:
            log.error(
                "endpoint.disabled",
                endpoint_id=self._endpoint_id,
                reason=claimed.disabled,
                advice=f"correct it, then run `tracker endpoints enable {self._endpoint_id}`",
            )

    async def _attempt(self, claim: Claim) -> None:
        try:
            attempt = await self.target.send(claim)
        except Exception as error:  # a fault of the tracker must not stop this endpoint
            log.exception("endpoint.send_failed", endpoint_id=self._endpoint_id)
            failure = f"it could not be sent: {type(error).__name__}"
            attempt = Attempt(at=self._webhooks.clock(), seconds=0.0, error=failure)
        self._outcomes.append((claim, attempt))

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._open[task]
        self.wake()
