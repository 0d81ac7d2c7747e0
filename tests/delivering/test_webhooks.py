"""Events are delivered to endpoints: signed, at least once, each endpoint apart."""

import asyncio
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import asyncpg
import httpx
import pytest
from sqlalchemy import Connection, event, update

from tests.delivering.conftest import PATIENT, SHORT, OpenWorker, Worker, endpoint
from tests.store.making import ids, open_writer, seen
from tests.support.endpoint import SECRET, Got, Receiver
from tests.support.started import of_start
from tests.support.waiting import eventually
from tests.support.webhooks import add_endpoint, add_message
from tracker.core.clock import utc_now
from tracker.core.errors import StoreUnavailable
from tracker.core.events import EventType, MessageState, RunFilter
from tracker.core.observation import Source
from tracker.core.record import Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.core.waiting import cancel
from tracker.delivering.webhooks import UnknownEndpoint, UnknownMessage, Webhooks
from tracker.store.clock import SharedClock
from tracker.store.engine import Database
from tracker.store.queries import endpoints as read
from tracker.store.queries import endpoints as read_endpoints
from tracker.store.queries.audit import list_audit
from tracker.store.queries.endpoints import MessageRow, configure
from tracker.store.queries.runs import get_run
from tracker.store.schema import endpoints
from tracker.store.url import DatabaseTimes
from tracker.store.writing.messages import Attempt, Sending, record_and_claim
from tracker.views import message_body


def settled(
    run_id: str,
    *,
    cost: float | None = 0.25,
    at: datetime | None = None,
    ended_at: datetime | None = None,
) -> Observed:
    """A read of a run that ended now, with its bill."""
    now = at or utc_now()
    facts: dict[str, Any] = {"completed_at": ended_at or now, "technique_id": "tech_1"}
    if cost is not None:
        facts["charged_cost"] = Decimal(str(cost))
    return seen(run_id, RunStatus.COMPLETED, at=now, facts=facts, reads=1)


async def messages_of(db: Database, **filters: Any) -> list[MessageRow]:
    """The messages, newest first."""
    return (await read.list_messages(db, limit=1000, **filters))[0]


async def configured(worker: Worker, *endpoint_ids: str) -> None:
    """Wait until the worker has stored its endpoints."""

    async def known() -> bool:
        rows = await read_endpoints.list_endpoints(worker.db)
        return {row.endpoint_id for row in rows} >= set(endpoint_ids)

    await eventually(known)


async def test_a_settled_run_arrives_once_and_signed(open_worker: OpenWorker) -> None:
    """The endpoint gets the run as the API shows it, verified by either secret of a rotation, and
    not before the run is settled in the database; the attempt is stored."""
    other = "whsec_" + "A" * 32
    early: list[str] = []
    async with Receiver() as receiver:
        worker: Worker = await open_worker(endpoint(receiver, secrets=(other, SECRET)))
        await configured(worker, "shop")

        async def check(got: Got) -> None:
            record = await get_run(worker.db, got.run_id)
            if record is None or not record.run.settled:
                early.append(got.run_id)

        receiver.on_request = check
        await worker.writer.submit(settled("run_1"))
        (got,) = await eventually(lambda: receiver.taken)
        assert got.verified
        assert (got.event, got.data["run_id"], got.data["charged_cost"]) == (
            "run.settled",
            "run_1",
            0.25,
        )
        assert got.data["tracking"] == "settled"
        assert got.headers["content-type"] == "application/json"
        assert len(got.headers["webhook-signature"].split()) == 2
        await eventually(lambda: delivered(worker.db, 1))
        await worker.writer.submit(settled("run_1"))  # the same again is no event
        await worker.writer.submit(settled("run_2"))
        await eventually(lambda: receiver.runs["run_2"])
        assert receiver.runs == {"run_1": 1, "run_2": 1}
        assert early == []
        message = (await messages_of(worker.db, run_id="run_1"))[0]
        assert message.message_id == got.message_id
        (attempt,) = await read.list_attempts(worker.db, message.message_id)
        assert (attempt.status, attempt.answer, attempt.error) == (200, "ok", None)
        shop = await read_endpoints.get_endpoint(worker.db, "shop")
        assert shop is not None
        assert shop.last_success_at is not None


async def delivered(db: Database, count: int) -> bool:
    """Whether that many messages are delivered."""
    return len(await messages_of(db, state=MessageState.DELIVERED)) == count


async def test_a_failed_attempt_is_repeated_under_the_same_id(open_worker: OpenWorker) -> None:
    """Errors, cut connections and redirects are tried again by the schedule, and each attempt is
    stored with its status and answer. A message that is delivered can be resent."""
    script, answer = [503, 302, 0], b"\x00busy\n" * 5000
    async with Receiver(script=script, answer=answer) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), waits=50 * SHORT[:1])
        await configured(worker, "shop")
        receiver.headers = {"Location": receiver.url}
        await worker.writer.submit(settled("run_1"))
        await eventually(lambda: delivered(worker.db, 1))
        (message,) = await messages_of(worker.db)
        attempts = await read.list_attempts(worker.db, message.message_id)
        assert [one.status for one in attempts] == [503, 302, None, 200]
        assert [one.error for one in attempts] == [
            "it answered HTTP 503",
            "it answered HTTP 302; redirects are not followed",
            "the connection was cut",
            None,
        ]
        assert (attempts[0].answer or "").startswith("busy  busy")
        assert len(attempts[0].answer or "") <= 1000
        assert {got.message_id for got in receiver.got} == {message.message_id}
        await worker.webhooks.resend(message.message_id)
        await eventually(lambda: receiver.runs["run_1"] == 2)
        with pytest.raises(UnknownMessage):
            await worker.webhooks.resend("msg_none")


async def test_what_becomes_known_of_a_settled_run_is_sent(open_worker: OpenWorker) -> None:
    """Another end and outputs that were missing are sent to all that want them; a run whose tags
    become known later to the endpoint that filters by them, and to no other again."""
    only = {"events": (EventType.SETTLED,)}
    async with Receiver() as receiver:
        worker: Worker = await open_worker(
            endpoint(receiver, "all", **only),
            endpoint(receiver, "completed", **only, filter=RunFilter(status="completed")),
            endpoint(receiver, "acme", **only, filter=RunFilter(tag=("customer", "acme"))),
        )
        await configured(worker, "all", "completed", "acme")

        async def sent(count: int) -> dict[tuple[str, str], int]:
            await eventually(lambda: delivered(worker.db, count))
            found = await messages_of(worker.db)
            return Counter((one.run_id, one.endpoint_id) for one in found)

        now = utc_now()
        error = {"completed_at": now, "error": RunError("model_timeout")}
        await worker.writer.submit(seen("end", RunStatus.FAILED, at=now, facts=error, reads=1))
        await sent(1)
        await worker.writer.submit(settled("end"))
        assert await sent(3) == {("end", "all"): 2, ("end", "completed"): 1}
        await worker.writer.submit(settled("late"))
        await sent(5)
        for link in ("link", "signed anew"):
            outputs = {"outputs": (Output("out_1", "imageUrl", link),)}
            later = seen("late", RunStatus.COMPLETED, at=utc_now(), facts=outputs, reads=1)
            await worker.writer.submit(later)
            await sent(7)
        assert [got.data["outputs"][0]["url"] for got in receiver.taken[-2:]] == 2 * ["link"]
        await worker.writer.submit(settled("tagged"))
        await sent(9)
        start = seen("tagged", RunStatus.PENDING, source=Source.START, at=utc_now())
        await worker.writer.submit(of_start(start, tags={"customer": "acme"}))
        counts = await sent(10)
        assert {key: counts[key] for key in counts if key[0] == "tagged"} == {
            ("tagged", "all"): 1,
            ("tagged", "completed"): 1,
            ("tagged", "acme"): 1,
        }


async def test_a_slow_database_makes_fewer_messages_at_a_time(postgres_url: str) -> None:
    """A group of events whose statements are each in time, and too slow together, is not tried for
    ever."""
    times = DatabaseTimes(statement=5.0, answer=1.0)
    async with (
        await Database.open(postgres_url, times=times) as db,
        open_writer(db) as writer,
        Receiver() as receiver,
    ):
        webhooks = Webhooks(
            database=db,
            endpoints=[endpoint(receiver)],
            body=message_body,
            process="worker",
            clock=utc_now,
        )
        await configure(db, [endpoint(receiver).config], now=utc_now())
        await writer.submit_all([settled(run_id) for run_id in ids("run", 60)])
        admin: Any = await asyncpg.connect(postgres_url)
        await admin.execute(
            """
            CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END';
            CREATE TRIGGER slow BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION slow();
            """
        )
        await admin.close()

        async def drained() -> bool:
            with suppress(StoreUnavailable):
                return await webhooks.drain() >= 0
            return False

        await eventually(drained)
        assert len(await messages_of(db)) == 60


async def test_only_what_an_endpoint_wants_is_sent(open_worker: OpenWorker) -> None:
    """Events and filters choose; what ended before an endpoint was configured is not sent."""
    async with Receiver() as receiver:
        worker: Worker = await open_worker(
            endpoint(receiver, "other", filter=RunFilter(technique_id="tech_2")),
            endpoint(receiver, "failed", filter=RunFilter(status="failed")),
            endpoint(receiver, "all"),
        )
        await configured(worker, "all", "other", "failed")
        before = utc_now() - timedelta(hours=1)
        old = seen(
            "old", RunStatus.COMPLETED, at=utc_now(), facts={"completed_at": before}, reads=1
        )
        await worker.writer.submit(old)
        await worker.writer.submit(settled("run_1", cost=None))
        await worker.writer.submit(settled("run_1", cost=0.5))
        await worker.writer.submit(settled("run_1", cost=0.5))
        await eventually(lambda: len(receiver.taken) == 2)
        await eventually(lambda: delivered(worker.db, 2))
        assert {(one.endpoint_id, one.event.value) for one in await messages_of(worker.db)} == {
            ("all", "run.settled"),
            ("all", "run.cost_changed"),
        }


async def test_one_endpoint_delays_no_other(open_worker: OpenWorker) -> None:
    """While one endpoint never answers, one is slow and one is down, another gets its messages at
    once; at most 20 requests are open for each, over two workers."""
    # No attempt of the silent one ends meanwhile, nor do their claims.
    times = replace(PATIENT, answer=60.0, lease=timedelta(seconds=70))
    quick_is_done = asyncio.Event()

    async def answer_late(_: Got) -> None:
        await quick_is_done.wait()

    async with (
        Receiver(silent=True) as silent,
        Receiver(on_request=answer_late) as slow,
        Receiver(down=True) as down,
        Receiver() as quick,
    ):
        points = (
            endpoint(silent, "silent"),
            endpoint(slow, "slow"),
            endpoint(down, "down"),
            endpoint(quick, "quick"),
        )
        first: Worker = await open_worker(*points, times=times)
        await open_worker(*points, times=times)
        await configured(first, "silent", "slow", "down", "quick")
        await first.writer.submit_all([settled(run_id) for run_id in ids("run", 60)])
        await eventually(lambda: len(quick.runs) == 60)
        assert len(slow.runs) < 60
        quick_is_done.set()
        await eventually(lambda: len(slow.runs) == 60)
        assert max(slow.runs.values()) == 1
        assert max(quick.runs.values()) == 1
        for receiver in (silent, slow):
            assert receiver.most_open <= 20
        assert len(silent.got) == 20


async def test_many_endpoints_are_ready_at_once(
    open_worker: OpenWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the authorities that are trusted takes longer than all else: that is done once."""
    made, create = [], httpx.create_ssl_context

    def counted(verify: Any = True, **options: Any) -> ssl.SSLContext:
        if verify is True:
            made.append(options)
        return create(verify, **options)

    for module in (httpx, httpx._transports.default):
        monkeypatch.setattr(module, "create_ssl_context", counted)
    async with Receiver() as receiver:
        await open_worker(*(endpoint(receiver, f"shop-{number}") for number in range(5)))
    assert len(made) == 1


async def test_an_idle_worker_reads_no_more_for_many_endpoints(
    open_worker: OpenWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two reads for each tick: whether there are events, and which endpoints have something due."""
    reads, fetch, fetchrow = [0], Database.fetch, Database.fetchrow

    def counted(real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def read(db: Database, query: Any) -> Any:
            reads[0] += 1
            return await real(db, query)

        return read

    async with Receiver() as receiver:
        points = [endpoint(receiver, f"shop-{number}") for number in range(20)]
        worker: Worker = await open_worker(*points, times=replace(PATIENT, tick=0.1))
        await asyncio.sleep(0.5)
        monkeypatch.setattr(Database, "fetch", counted(fetch))
        monkeypatch.setattr(Database, "fetchrow", counted(fetchrow))
        await asyncio.sleep(1)
        assert 0 < reads[0] <= 2 * 11
        await worker.writer.submit(settled("run_1"))
        await eventually(lambda: receiver.runs["run_1"] == 20)


async def test_signals_and_schedules_wake_without_a_tick(open_worker: OpenWorker) -> None:
    """What is due again is sent when it is due, and what another process makes due at once."""
    times = replace(PATIENT, tick=3600.0)
    async with Receiver(script=[503, 503]) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), times=times, waits=50 * SHORT[:1])
        await configured(worker, "shop")
        await worker.writer.submit(settled("run_1"))
        await eventually(lambda: delivered(worker.db, 1))
        (message,) = await messages_of(worker.db)
        await worker.webhooks.resend(message.message_id)
        await eventually(lambda: receiver.runs["run_1"] == 2)
        if worker.db.dialect == "postgresql":  # SQLite has one long-running process
            await open_worker(endpoint(receiver, "other"), times=times)
            await configured(worker, "other")
            await worker.writer.submit(settled("run_2"))
            await eventually(lambda: receiver.runs["run_2"] == 2)
            command: Worker = await open_worker(deliver=False)
            await command.webhooks.resend(message.message_id)
            await eventually(lambda: receiver.runs["run_1"] == 3)


async def test_gone_disables_until_it_is_enabled(open_worker: OpenWorker) -> None:
    """410 disables an endpoint: messages wait, none is sent. Enabling sends all of them."""
    async with Receiver(status=410) as receiver:
        worker: Worker = await open_worker(endpoint(receiver))
        await configured(worker, "shop")
        await worker.writer.submit(settled("run_1"))

        async def disabled() -> bool:
            shop = await read_endpoints.get_endpoint(worker.db, "shop")
            assert shop is not None
            return shop.disabled_reason == "it answered 410 Gone"

        await eventually(disabled)
        receiver.status = 200
        await worker.writer.submit(settled("run_2"))
        await eventually(lambda: pending(worker.db, 2))
        await asyncio.sleep(0.5)  # longer than the wait before the next attempt
        assert len(receiver.got) == 1
        await worker.webhooks.enable("shop")
        await eventually(lambda: receiver.runs == {"run_1": 1, "run_2": 1})
        entries, _ = await list_audit(worker.db, limit=10)
        assert [entry.action for entry in entries] == ["enable_endpoint"]
        with pytest.raises(UnknownEndpoint):
            await worker.webhooks.enable("none")


async def pending(db: Database, count: int) -> bool:
    """Whether that many messages are pending."""
    return len(await messages_of(db, state=MessageState.PENDING)) == count


async def test_an_outage_over_everything_is_sent_at_once(open_worker: OpenWorker) -> None:
    """The first 2xx after an outage makes all messages due that failed during it, however long
    their next wait would be."""
    long = (timedelta(seconds=0.2), timedelta(hours=1))
    async with Receiver(down=True) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), waits=long)
        await configured(worker, "shop")
        await worker.writer.submit_all([settled(run_id) for run_id in ids("run", 50)])
        await eventually(lambda: failed_at_least_twice(worker.db, 50))
        assert all(one.attempts == 2 for one in await messages_of(worker.db))
        receiver.down = False
        await worker.writer.submit(settled("run_new"))
        await eventually(lambda: len(receiver.runs) == 51)
        assert set(receiver.runs.values()) == {1}


async def failed_at_least_twice(db: Database, count: int) -> bool:
    """Whether that many messages have failed at least twice."""
    return sum(one.attempts >= 2 for one in await messages_of(db)) == count


async def test_a_refused_message_waits_for_its_schedule(open_worker: OpenWorker) -> None:
    """A message that its endpoint refuses while it takes others is not tried with each success."""
    long = (timedelta(seconds=0.2), timedelta(hours=1))
    async with Receiver(refuse=frozenset({"poison"})) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), waits=long)
        await configured(worker, "shop")
        await worker.writer.submit(settled("poison"))
        for number in range(20):
            await worker.writer.submit(settled(f"run_{number}"))
            await eventually(lambda number=number: receiver.runs[f"run_{number}"])
        await eventually(lambda: failed_at_least_twice(worker.db, 1))
        for number in range(20, 30):
            await worker.writer.submit(settled(f"run_{number}"))
            await eventually(lambda number=number: receiver.runs[f"run_{number}"])
        assert sum(got.run_id == "poison" for got in receiver.got) <= 3


async def test_what_a_dead_worker_had_claimed_is_sent_by_another(open_worker: OpenWorker) -> None:
    """A claim expires, and another worker sends the message, under the same id."""
    times = replace(PATIENT, lease=timedelta(seconds=0.5))
    async with Receiver(silent=True) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), times=times)
        await configured(worker, "shop")
        await worker.writer.submit(settled("run_1"))
        await eventually(lambda: receiver.got)
        receiver.silent = False
        await open_worker(endpoint(receiver), times=times)
        await eventually(lambda: receiver.runs["run_1"])
        assert len({got.message_id for got in receiver.got}) == 1


class SetClock:
    """A clock that the test may set."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return utc_now() + self.ahead


async def test_what_settles_after_days_of_sleep_is_sent(open_worker: OpenWorker) -> None:
    """A machine that was suspended settles what ended meanwhile at once, before a minute has passed
    by a clock that stood still."""
    clock = SetClock()
    async with Receiver() as receiver:
        worker: Worker = await open_worker(endpoint(receiver), clock=clock)
        await configured(worker, "shop")
        clock.ahead = timedelta(hours=25)
        await worker.writer.submit(settled("run_1", at=clock()))
        await eventually(lambda: receiver.taken)


async def test_a_clock_that_is_set_back_puts_no_message_off(open_worker: OpenWorker) -> None:
    """Neither one that failed before, nor one that waits for claims of a worker that is gone."""
    clock = SetClock()
    clock.ahead = timedelta(minutes=4)
    times = replace(PATIENT, lease=timedelta(seconds=3))
    async with Receiver(silent=True) as receiver:
        died: Worker = await open_worker(endpoint(receiver), clock=clock, times=times)
        shared = SharedClock(died.db, wall=clock)
        await shared.check()
        await configured(died, "shop")
        await died.writer.submit(settled("claimed", at=clock()))
        await eventually(lambda: receiver.got)
        await die(died)
    async with Receiver(status=503) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), clock=clock)
        await worker.writer.submit(settled("failed", at=clock()))
        await eventually(lambda: failed_once(worker.db, "failed"))
        clock.ahead = timedelta()
        receiver.status = 200
        await shared.check()
        await eventually(lambda: receiver.runs.keys() == {"claimed", "failed"})


async def die(worker: Worker) -> None:
    """Leave the claims of a worker as a process that is killed does."""
    webhooks = worker.webhooks
    senders, webhooks._senders = webhooks._senders, {}
    await cancel(*webhooks._tasks, *(one._task for one in senders.values()))
    for one in senders.values():
        await cancel(*one._open)
        await one.target.aclose()
    webhooks._tasks = []


async def failed_once(db: Database, run_id: str) -> bool:
    return [message.attempts for message in await messages_of(db, run_id=run_id)] == [1]


async def test_floras_clock_does_not_decide_what_is_sent(open_worker: OpenWorker) -> None:
    """A run that was known before it ended is sent, though FLORA dates its end before the endpoint;
    so is one that ends while the endpoint was first seen by a clock that was ahead."""
    clock = SetClock()
    clock.ahead = timedelta(days=1)
    async with Receiver() as receiver:
        first: Worker = await open_worker(endpoint(receiver), clock=clock)
        await configured(first, "shop")
        await first.webhooks.stop()
        clock.ahead = timedelta()
        worker: Worker = await open_worker(endpoint(receiver), clock=clock)
        now = utc_now()
        await worker.writer.submit(seen("run_1", RunStatus.PENDING, at=now, source=Source.START))
        await worker.writer.submit(seen("run_2", RunStatus.RUNNING, at=now, reads=1))
        for run_id in ("run_1", "run_2"):
            await worker.writer.submit(settled(run_id, ended_at=now - timedelta(hours=1)))
        await worker.writer.submit(settled("old", ended_at=now - timedelta(hours=1)))
        await eventually(lambda: receiver.runs.keys() == {"run_1", "run_2"})
        assert [one.run_id for one in await messages_of(worker.db, run_id="old")] == []


async def test_stopping_releases_what_is_open(open_worker: OpenWorker) -> None:
    """A worker that stops waits for open requests a moment, and leaves the rest due."""
    async with Receiver(silent=True) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), times=replace(PATIENT, stop=0.2))
        await configured(worker, "shop")
        await worker.writer.submit(settled("run_1"))
        await eventually(lambda: receiver.got)
        await worker.webhooks.stop()
        receiver.silent = False
        await worker.webhooks.start()
        await eventually(lambda: receiver.runs["run_1"])


async def test_a_process_without_endpoints_leaves_messages(open_worker: OpenWorker) -> None:
    """A one-shot process that settles a run needs no secrets: it makes the messages when it ends,
    and a worker sends them."""
    async with Receiver() as receiver:
        worker: Worker = await open_worker(endpoint(receiver))
        await configured(worker, "shop")
        await worker.webhooks.stop()
        once: Worker = await open_worker(deliver=False)
        await once.writer.submit(settled("run_1"))
        await once.webhooks.aclose()
        assert await pending(worker.db, 1)
        await worker.webhooks.start()
        await eventually(lambda: receiver.runs["run_1"])


async def test_a_process_that_ends_configures_its_endpoints(open_worker: OpenWorker) -> None:
    """After two days without a worker, a one-shot process with the endpoint in its settings makes
    messages for it."""
    async with Receiver() as receiver:
        worker: Worker = await open_worker(endpoint(receiver))
        await configured(worker, "shop")
        await worker.webhooks.stop()
        old = update(endpoints).values(configured_at=utc_now() - timedelta(days=2))
        await worker.db.write(lambda connection: connection.execute(old).rowcount)
        once: Worker = await open_worker(endpoint(receiver), deliver=False)
        await once.writer.submit(settled("run_1"))
        await once.webhooks.aclose()
        assert await pending(worker.db, 1)


@pytest.mark.both_databases
async def test_what_waited_for_a_removed_endpoint_has_its_attempts(
    open_worker: OpenWorker,
) -> None:
    """An endpoint that failed, was in no settings for days and is back is not disabled by its first
    failure, and its messages have a whole schedule of attempts."""
    async with Receiver(script=[500]) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), deliver=False, waits=50 * SHORT[:1])
        past = utc_now() - timedelta(days=5)
        times = {"since": past, "configured_at": past, "failing_since": past}
        await add_endpoint(worker.db, "shop", **times)
        message = {"created_at": past, "last_attempt_at": past, "tried_since": past}
        await add_message(worker.db, "msg_1", "shop", 500, next_attempt_at=past, **message)
        await worker.webhooks.start()
        try:
            await eventually(lambda: delivered(worker.db, 1))
        finally:
            await worker.webhooks.stop()
        assert len(receiver.got) == 2


async def test_rotated_secrets_sign_what_waits(open_worker: OpenWorker) -> None:
    """A message that was refused under the old secret is repeated with the new one."""
    async with Receiver(script=[401]) as receiver:
        worker: Worker = await open_worker(
            endpoint(receiver, secrets=("whsec_" + "B" * 32,)), waits=50 * SHORT[:1]
        )
        await configured(worker, "shop")

        async def rotate(_: Got) -> None:
            worker.webhooks.rotate({"shop": (SECRET,)})

        receiver.on_request = rotate
        await worker.writer.submit(settled("run_1"))
        await eventually(lambda: receiver.taken)
        assert (receiver.got[0].verified, receiver.taken[0].verified) == (False, True)


async def test_two_outcomes_of_one_message_are_stored_together(db: Database) -> None:
    """A machine that was suspended sends a message again while its first attempt is open. Both
    outcomes are attempts; the success counts."""
    await add_endpoint(db, "shop")
    await add_message(db, "msg_1", "shop", next_attempt_at=utc_now())
    mine = Sending(endpoint_id="shop", holder="me", lease=timedelta(seconds=25))
    turn = partial(record_and_claim, sending=mine)
    claimed = await db.write(partial(turn, outcomes=[], most=20, now=utc_now()))
    assert [claim.message_id for claim in claimed.claims] == ["msg_1"]
    good = Attempt(at=utc_now(), seconds=0.1, status=200)
    bad = Attempt(at=utc_now(), seconds=0.1, error="the connection was cut")
    outcomes = [("msg_1", good), ("msg_1", bad)]
    await db.write(partial(turn, outcomes=outcomes, most=20, now=utc_now()))
    (message,) = await messages_of(db)
    assert (message.state, message.attempts) == (MessageState.DELIVERED, 2)
    assert [one.status for one in await read.list_attempts(db, "msg_1")] == [200, None]


async def test_a_worker_waits_while_others_hold_all_requests(open_worker: OpenWorker) -> None:
    """While other processes have 20 requests open, a due message causes no stream of queries."""
    turns: list[Connection] = []
    async with Receiver() as receiver:
        worker: Worker = await open_worker(deliver=False)
        await add_endpoint(worker.db, "shop")
        held = {"lease_until": utc_now() + timedelta(minutes=4), "lease_holder": "another"}
        for number in range(20):
            await add_message(worker.db, f"msg_{number}", "shop", **held)
        await add_message(worker.db, "msg_due", "shop", next_attempt_at=utc_now())
        second: Worker = await open_worker(endpoint(receiver))
        event.listen(second.db._transactions.engine, "begin", turns.append)
        await eventually(lambda: turns)
        await asyncio.sleep(0.5)
        assert len(turns) <= 3
        assert receiver.got == []


async def test_failed_messages_of_a_span_are_recovered(open_worker: OpenWorker) -> None:
    """Recovering sends the failed ones since a time again, and no others."""
    async with Receiver(status=500) as receiver:
        worker: Worker = await open_worker(endpoint(receiver), waits=(timedelta(seconds=0.1),))
        await configured(worker, "shop")
        await worker.writer.submit_all([settled(run_id) for run_id in ids("run", 30)])
        await eventually(lambda: failed(worker.db, 30))
        receiver.status = 200
        assert await worker.webhooks.recover("shop", since=utc_now()) == 0
        assert await worker.webhooks.recover("shop", since=utc_now() - timedelta(hours=1)) == 30
        await eventually(lambda: len(receiver.runs) == 30)
        with pytest.raises(UnknownEndpoint):
            await worker.webhooks.recover("none", since=utc_now())


async def failed(db: Database, count: int) -> bool:
    """Whether that many messages are failed."""
    return len(await messages_of(db, state=MessageState.FAILED)) == count


async def test_a_test_event_is_signed_and_not_stored(open_worker: OpenWorker) -> None:
    """`test` sends one request and returns the outcome; rotated secrets sign it."""
    async with Receiver() as receiver:
        worker: Worker = await open_worker(endpoint(receiver, secrets=("whsec_" + "B" * 32,)))
        attempt = await worker.webhooks.test("shop")
        assert (attempt.status, attempt.delivered) == (200, True)
        worker.webhooks.rotate({"shop": (SECRET,)})
        await worker.webhooks.test("shop")
        assert [(got.event, got.verified) for got in receiver.got] == [
            ("tracker.test", False),
            ("tracker.test", True),
        ]
        assert await messages_of(worker.db) == []
        with pytest.raises(UnknownEndpoint, match="not in the settings"):
            await worker.webhooks.test("none")
