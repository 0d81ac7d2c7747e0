"""A database, a writer and workers that send webhooks, on both engines."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest

from tests.store.making import TestWriter, open_writer
from tests.support.endpoint import SECRET, Receiver
from tracker.core.clock import utc_now
from tracker.core.events import EventType, RunFilter
from tracker.delivering.endpoints import Endpoint
from tracker.delivering.webhooks import DeliveryTimes, Webhooks
from tracker.store.coordination import OUTBOX, Signals
from tracker.store.engine import Database
from tracker.store.queries.endpoints import EndpointConfig
from tracker.views import message_body

SHORT = tuple(timedelta(seconds=seconds) for seconds in (0.2, 0.4, 0.4))


def endpoint(receiver: Receiver, endpoint_id: str = "shop", **changes: Any) -> Endpoint:
    """An endpoint that leads to the receiver."""
    config = EndpointConfig(
        endpoint_id=endpoint_id,
        url=receiver.url,
        events=changes.pop("events", tuple(EventType)),
        filter=changes.pop("filter", RunFilter()),
    )
    given: dict[str, Any] = {"secrets": (SECRET,), "allow_private": True, "url": receiver.url}
    return Endpoint(config=config, **given | changes)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """A database with the tracker's schema, open."""
    async with await Database.open(database_url) as db:
        yield db


OpenWorker = Callable[..., Any]


PATIENT = DeliveryTimes(last_commits=6.0)
"""What a process commits when it stops is committed although another one pauses: else its claims
would last until they expire."""


@pytest.fixture(autouse=True)
def _patient(patient: None) -> None:
    """Another process may pause while it holds a lock."""


class Worker:
    """What a process with a worker has: a writer, signals, and webhooks that are started."""

    def __init__(self, db: Database, writer: TestWriter, webhooks: Webhooks) -> None:
        self.db = db
        self.writer = writer
        self.webhooks = webhooks


@pytest.fixture
async def open_worker(database_url: str) -> AsyncIterator[OpenWorker]:
    """Opens a worker with these endpoints, as a process of its own would."""
    async with AsyncExitStack() as stack:

        async def open_one(*endpoints: Endpoint, deliver: bool = True, **options: Any) -> Worker:
            db = await stack.enter_async_context(await Database.open(database_url))
            signals = await stack.enter_async_context(Signals(db))
            given: dict[str, Any] = {
                "waits": SHORT,
                "times": PATIENT,
                "process": f"worker-{id(db)}",
                "clock": utc_now,
            }
            webhooks = Webhooks(
                database=db,
                endpoints=endpoints,
                body=message_body,
                **given | options,
            )
            stack.push_async_callback(webhooks.aclose)
            signals.when_events(webhooks.make_messages)
            signals.when_notified(OUTBOX, webhooks.wake)
            writer = await stack.enter_async_context(open_writer(db, on_commit=[signals.committed]))
            if deliver:
                await webhooks.start()
                stack.push_async_callback(webhooks.stop)
            return Worker(db, writer, webhooks)

        yield open_one
