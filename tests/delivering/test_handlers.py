"""Python handlers get events as endpoints do: claimed, repeated, limited and released."""

import asyncio
import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select

from tests.delivering.conftest import PATIENT, SHORT, OpenWorker, Worker
from tests.delivering.test_webhooks import configured, delivered, failed, messages_of, settled
from tests.store.making import ids
from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.core.errors import DoNotRetry
from tracker.core.events import EventType, MessageState, RunFilter
from tracker.delivering.endpoints import COMMIT_SECONDS, Handler
from tracker.delivering.webhooks import UnknownEndpoint
from tracker.store.queries import endpoints as read
from tracker.store.queries import endpoints as read_endpoints
from tracker.store.queries.endpoints import EndpointConfig
from tracker.store.schema import messages
from tracker.store.writing.messages import Claim


def handler(call: Callable[[Claim], Any], name: str = "store", **options: Any) -> Handler:
    """A handler of all events."""
    config = EndpointConfig(
        endpoint_id=name,
        url=f"python:app.{name}",
        events=tuple(EventType),
        filter=RunFilter(),
    )
    given: dict[str, Any] = {"is_async": inspect.iscoroutinefunction(call)} | options
    return Handler(config=config, call=call, **given)


async def test_a_failed_call_is_repeated_with_its_error(open_worker: OpenWorker) -> None:
    """An exception is a failed attempt: its type and message are stored without secrets, and the
    next attempt has the same message and a higher number. Returning delivers."""
    calls: list[tuple[str, int]] = []

    async def call(claim: Claim) -> None:
        calls.append((claim.message_id, claim.attempts))
        if len(calls) == 1:
            raise ValueError(f"bad\n key sk_live_secret {'x' * 2000}")
        if len(calls) == 2:
            raise SystemExit(3)
        if len(calls) == 3:
            raise asyncio.CancelledError

    worker: Worker = await open_worker(
        handlers=[handler(call)],
        waits=50 * SHORT[:1],
    )
    await configured(worker, "store")
    await worker.writer.submit(settled("run_1"))
    await eventually(lambda: delivered(worker.db, 1))
    (message,) = await messages_of(worker.db)
    attempts = await read.list_attempts(worker.db, message.message_id)
    assert calls == [(message.message_id, number) for number in range(4)]
    first, *others = [attempt.error for attempt in attempts]
    assert first is not None
    assert first.startswith("ValueError: bad  key sk_live_[redacted] xxx")
    assert len(first) <= 1000
    assert others == ["SystemExit: 3", "CancelledError", None]
    assert {attempt.status for attempt in attempts} == {None}


async def test_do_not_retry_fails_at_once(open_worker: OpenWorker) -> None:
    """`DoNotRetry` gives the message up after one attempt, and does not count against the handler;
    resending it calls the handler again."""
    calls = Counter[str]()

    def call(claim: Claim) -> None:
        calls[claim.message_id] += 1
        raise DoNotRetry("no such order")

    worker: Worker = await open_worker(handlers=[handler(call)])
    await configured(worker, "store")
    await worker.writer.submit(settled("run_1"))
    await eventually(lambda: failed(worker.db, 1))
    (message,) = await messages_of(worker.db)
    assert (message.attempts, message.last_error) == (1, "DoNotRetry: no such order")
    row = await read_endpoints.get_endpoint(worker.db, "store")
    assert row is not None
    assert (row.is_handler, row.failing_since) == (True, None)
    await worker.webhooks.resend(message.message_id)
    await eventually(lambda: calls[message.message_id] == 2)
    with pytest.raises(UnknownEndpoint, match="Python handler"):
        await worker.webhooks.test("store")


async def test_a_call_is_limited_in_time(open_worker: OpenWorker) -> None:
    """A coroutine that hangs is cancelled after its timeout; so is the wait for a thread, which
    goes on and keeps its place until it ends."""
    go_on, cleaned = threading.Event(), asyncio.Event()
    began = Counter[str]()

    async def hang(_: Claim) -> None:
        began["hang"] += 1
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    def block(_: Claim) -> None:
        began["block"] += 1
        go_on.wait(30)

    limits: dict[str, Any] = {"timeout": 0.1, "concurrency": 1}
    blocking = handler(block, "block", **limits)
    worker: Worker = await open_worker(
        handlers=[handler(hang, "hang", **limits), blocking],
        waits=50 * SHORT[:1],
        times=replace(PATIENT, tick=0.2),
    )
    await configured(worker, "hang", "block")
    try:
        await worker.writer.submit(settled("run_1"))
        await asyncio.wait_for(cleaned.wait(), 30)
        await eventually(lambda: began["hang"] > 2, timeout=30)

        async def timed_out() -> bool:
            (message,) = await messages_of(worker.db, endpoint_id="block")
            return message.last_error == "the handler did not return within 0.1 s"

        await eventually(timed_out, timeout=30)
        assert began["block"] == 1
    finally:
        # The next call returns, and has the time for it.
        object.__setattr__(blocking, "timeout", 30.0)
        go_on.set()
    await eventually(lambda: delivered(worker.db, 1))
    assert began["block"] == 2


async def test_calls_are_shared_and_limited(open_worker: OpenWorker) -> None:
    """Two processes with one handler share its messages, each of which goes to one of them, and
    never have more calls open together than its concurrency."""
    calls, now_open, most = Counter[str](), 0, 0

    async def call(who: str, claim: Claim) -> None:
        nonlocal now_open, most
        now_open += 1
        most = max(most, now_open)
        await asyncio.sleep(0.02)
        now_open -= 1
        calls[claim.message_id] += 1
        calls[who] += 1

    first: Worker = await open_worker(
        handlers=[handler(partial(call, "first"), concurrency=3, is_async=True)]
    )
    await open_worker(handlers=[handler(partial(call, "second"), concurrency=3, is_async=True)])
    await configured(first, "store")
    await first.writer.submit_all([settled(run_id) for run_id in ids("run", 60)])
    await eventually(lambda: delivered(first.db, 60))
    assert calls["first"] + calls["second"] == 60
    assert {calls[one.message_id] for one in await messages_of(first.db)} == {1}
    assert most <= 3


async def test_stopping_cancels_and_releases(open_worker: OpenWorker) -> None:
    """A worker that stops gives calls a moment, cancels them and lets them clean up; another
    worker gets their messages at once, and those of handlers that are still running threads."""
    began, go_on = Counter[str](), threading.Event()
    cleaned: list[str] = []

    async def hang(_: Claim) -> None:
        began["hang"] += 1
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            cleaned.append("hang")

    def block(_: Claim) -> None:
        began["block"] += 1
        go_on.wait(30)

    async def quick(_: Claim) -> None:
        return

    worker: Worker = await open_worker(
        handlers=[handler(hang, "hang"), handler(block, "block")],
        times=replace(PATIENT, stop=0.2, cancel=0.5),
    )
    await configured(worker, "hang", "block")
    try:
        await worker.writer.submit(settled("run_1"))
        await eventually(lambda: began.total() == 2)
        at = time.monotonic()
        await worker.webhooks.stop()
        assert time.monotonic() - at < 10
        assert cleaned == ["hang"]
        await open_worker(handlers=[handler(quick, "hang"), handler(quick, "block")])
        await eventually(lambda: delivered(worker.db, 2))
    finally:
        go_on.set()


async def test_what_waits_for_a_removed_handler_is_delivered_when_it_is_back(
    open_worker: OpenWorker,
) -> None:
    """A process without the handler leaves its messages; events of the first day after it was
    removed become messages too."""
    got: list[str] = []

    async def call(claim: Claim) -> None:
        got.append(claim.message_id)

    worker: Worker = await open_worker(handlers=[handler(call)])
    await configured(worker, "store")
    await worker.webhooks.stop()
    without: Worker = await open_worker()
    await without.writer.submit(settled("run_1"))
    await eventually(lambda: pending(without, 1))
    assert got == []
    await open_worker(handlers=[handler(call)])
    await eventually(lambda: len(got) == 1)


async def pending(worker: Worker, count: int) -> bool:
    """Whether that many messages are pending."""
    return len(await messages_of(worker.db, state=MessageState.PENDING)) == count


async def test_a_dead_process_keeps_a_message_for_the_timeout(open_worker: OpenWorker) -> None:
    """The claim of a process that died in a call expires after the handler's timeout and the time
    for the commit, and another process calls its handler with the same message."""
    got: list[str] = []

    async def die(claim: Claim) -> None:
        got.append(claim.message_id)
        await asyncio.Event().wait()

    async def call(claim: Claim) -> None:
        got.append(claim.message_id)

    worker: Worker = await open_worker(handlers=[handler(die, timeout=90)])
    await configured(worker, "store")
    await worker.writer.submit(settled("run_1"))
    await eventually(lambda: got)
    for task in asyncio.all_tasks():  # as if the process were gone: no outcome is stored
        if task.get_name().startswith(("endpoint store", "message ")):
            task.cancel()
    lease = timedelta(seconds=90 + COMMIT_SECONDS)
    until = await worker.db.fetchval(select(messages.c.lease_until))
    (message,) = await messages_of(worker.db)
    assert message.created_at + lease <= until <= utc_now() + lease
    # The other one begins when that is over.
    await open_worker(handlers=[handler(call)], clock=lambda: utc_now() + lease)
    await eventually(lambda: delivered(worker.db, 1))
    assert handler(die, timeout=90).lease == lease
    assert got == got[:1] * 2


async def test_two_processes_with_different_settings_are_reported(open_worker: OpenWorker) -> None:
    """Where an endpoint of one process and a handler of another have one id, the log of both says
    so, with what the other has."""
    often = replace(PATIENT, configure_every=0.05, tick=0.05)

    async def call(_: Claim) -> None:
        return

    config = EndpointConfig(
        endpoint_id="store", url="python:other.f", events=(EventType.LOST,), filter=RunFilter()
    )
    with capture_logs() as lines:

        def others() -> set[str]:
            found = [line for line in lines if line["event"] == "endpoint.settings_differ"]
            return {line["other"] for line in found}

        await open_worker(handlers=[handler(call)], times=often)
        await open_worker(handlers=[Handler(config=config, call=call, is_async=True)], times=often)
        await eventually(lambda: others() == {"app.store", "other.f"})
