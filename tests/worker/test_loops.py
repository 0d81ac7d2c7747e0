"""Every loop of a process goes on after any failure, and ends when the process stops."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.endpoint import SECRET
from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tests.worker.test_scheduler import working
from tracker import worker
from tracker.core.errors import StoreUnavailable
from tracker.core.events import RunFilter
from tracker.delivering import webhooks
from tracker.delivering.webhooks import Webhooks
from tracker.polling.changes import Broadcaster
from tracker.polling.poll import Contacts, Poller
from tracker.receiving.apply import Applier
from tracker.services import Services
from tracker.settings.model import EndpointSettings
from tracker.simulator import Options, Simulator, running
from tracker.starting.orders import BatchWorker
from tracker.store.queries.audit import Refusals

LOOPS: dict[str, tuple[Any, str]] = {
    "applier": (Applier, "_apply_group"),
    "outbox": (Webhooks, "drain"),
    "due messages": (webhooks, "due_times"),
    "endpoint hook": (webhooks, "record_and_claim"),
    "batches": (BatchWorker, "launch_due"),
    "poll": (Poller, "next_due_at"),
    "changes": (Broadcaster, "_send_new"),
    "contacts": (Contacts, "keep"),
    "audit": (Refusals, "store"),
    "clock": (worker, "boot_seconds"),
}
"""What each of them calls, by its name in the log."""
FAILURES = {
    "loop.database_down": StoreUnavailable("no answer"),
    "loop.failed": ValueError("a fault"),
}
TIMES = 3


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """A FLORA in which nothing happens."""
    async with running(Options()) as one:
        yield one


@asynccontextmanager
async def following(services: Services) -> AsyncIterator[None]:
    """Something to do for the loops that begin with it."""
    services.refusals.store_after = 0.01
    services.refusals.add("no token", address="127.0.0.1", actor=None, request_id=None)
    reader = await services.changes.subscribe(RunFilter())
    services.applier.wake()
    services.webhooks.wake()
    for sender in services.webhooks._senders.values():
        sender.wake()
    yield
    reader.close()


@pytest.mark.parametrize(
    "event",
    ["loop.failed", pytest.param("loop.database_down", marks=pytest.mark.thorough)],
)
@pytest.mark.parametrize("name", LOOPS)
async def test_it_goes_on(
    name: str,
    event: str,
    database_url: str,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After failures in a row, of which one line tells, it does its work as before. (All loops are
    run by one function, which has both: tests/core/test_repeat.py.)"""
    owner, attribute = LOOPS[name]
    real, calls = getattr(owner, attribute), []

    def work(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) <= TIMES:
            raise FAILURES[event]
        return real(*given, **more)

    monkeypatch.setattr(owner, attribute, work)
    hook = EndpointSettings(
        id="hook", url="http://127.0.0.1:9/", secrets=[SECRET], allow_private=True
    )
    with capture_logs() as lines:
        async with (
            working(database_url, simulator, endpoints=(hook,)) as (_, services),
            following(services),
        ):
            await eventually(lambda: len(calls) > TIMES)
    reported = [line for line in lines if line["event"] in FAILURES]
    assert [(line["event"], line["loop"]) for line in reported] == [(event, name)]
