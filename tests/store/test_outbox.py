"""The outbox becomes messages, and messages get attempts: the rules, by a clock of the test."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, event, func, select, update
from sqlalchemy.util import await_only

from tests.store.making import NOW, TestWriter, ids, open_writer, seen
from tests.support import next_year
from tests.support.clocks import HandClock
from tests.support.webhooks import add_message
from tracker.core.events import MOST_OPEN, EventType, MessageState, RunFilter
from tracker.core.record import LOST_AFTER, LOST_AFTER_READS, FailedRead
from tracker.core.run import RunStatus
from tracker.store.clock import SharedClock
from tracker.store.engine import Database
from tracker.store.queries import endpoints as read_endpoints
from tracker.store.queries.endpoints import (
    LEFT_FOR,
    EndpointConfig,
    MessageRow,
    configure,
    fan_out,
    list_messages,
    outbox_waits,
)
from tracker.store.schema import endpoints, outbox
from tracker.store.writing.messages import (
    FAILING_FOR,
    Attempt,
    Claimed,
    Sending,
    due_times,
    enable,
    record_and_claim,
    recover,
    release,
)
from tracker.views import message_body

SENDING = Sending(endpoint_id="a", holder="one", lease=timedelta(seconds=25))
SECOND = timedelta(seconds=1)


async def waiting(db: Database) -> int:
    """How many events the outbox has."""
    async with db.read() as connection:
        return int(await connection.scalar(select(func.count()).select_from(outbox)) or 0)


async def distribute(
    db: Database, *, now: datetime = NOW, until: int = 0
) -> list[tuple[str, str, str]]:
    """Empty the outbox until so many events are left; endpoint, event and run of all messages."""
    while await waiting(db) > until:
        await db.write(lambda one: fan_out(one, limit=3, now=now, body=message_body))
    rows, _ = await list_messages(db, limit=500)
    return sorted((row.endpoint_id, str(row.event), row.run_id) for row in rows)


async def known(db: Database, *endpoint_ids: str, at: datetime = NOW - SECOND, **more: Any) -> None:
    """Endpoints as a process stores them that has them in its settings."""
    given: dict[str, Any] = {"events": tuple(EventType), "filter": RunFilter()}
    given |= {"url": "https://a.example"} | more
    await configure(db, [EndpointConfig(endpoint_id=one, **given) for one in endpoint_ids], now=at)


def ended(run_id: str, *, at: datetime = NOW, cost: str | None = None, **facts: Any) -> Any:
    """A read of a run that ended at that time."""
    shown = {"completed_at": at} | facts
    if cost is not None:
        shown["charged_cost"] = Decimal(cost)
    return seen(run_id, RunStatus.COMPLETED, at=at, facts=shown, reads=1)


async def test_every_event_has_one_message_for_each_endpoint(
    db: Database, writer: TestWriter
) -> None:
    """Settled, billed otherwise and lost: each is one message for each endpoint that wants it, and
    the outbox is empty afterwards."""
    await known(db, "a", "b")
    await known(db, "settled", events=(EventType.SETTLED,))
    await writer.submit_all([ended("run_1"), ended("run_2", cost="1"), seen("run_3")])
    await writer.submit_all([ended("run_1", cost="2"), ended("run_2", cost="1")])
    for number in range(LOST_AFTER_READS):
        at = NOW + number * LOST_AFTER
        await writer.submit(FailedRead(run_id="run_3", at=at, error="no such run", missing=True))
    expected = {
        ("run.settled", "run_1"),
        ("run.settled", "run_2"),
        ("run.cost_changed", "run_1"),
        ("run.lost", "run_3"),
    }
    every = [(one, *event) for one in ("a", "b") for event in expected]
    only = [("settled", *event) for event in expected if event[0] == "run.settled"]
    assert await distribute(db) == sorted(every + only)


async def test_many_endpoints_make_no_long_transaction(
    db: Database, writer: TestWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes so many messages, however many endpoints want each event, and at least those of one
    event."""
    await known(db, *(f"shop-{number}" for number in range(10)))
    await writer.submit_all([ended(run_id) for run_id in ids("run", 6)])
    made = []
    for most in (20, 5, 1000):
        monkeypatch.setattr(read_endpoints, "MOST_MESSAGES", most)
        done = await db.write(lambda one: fan_out(one, limit=100, now=NOW, body=message_body))
        made.append((done.taken, done.more, await waiting(db)))
    assert made == [(2, True, 4), (1, True, 3), (3, False, 0)]
    rows, _ = await list_messages(db, limit=500)
    assert len(rows) == 60


async def test_an_endpoint_that_is_configured_while_messages_are_made_gets_its_events(
    postgres_url: str,
) -> None:
    """What ends after it was configured is sent to it: the endpoints are read after the events."""
    async with (
        await Database.open(postgres_url) as db,
        await Database.open(postgres_url) as other,
        open_writer(other) as writer,
    ):

        async def configure_and_end() -> None:
            await known(other, "a")
            await writer.submit(ended("run_1"))

        def work(connection: Connection) -> int:
            executed: list[object] = []

            @event.listens_for(connection, "after_execute")
            def after_execute(*_: object) -> None:
                executed.append(None)
                if len(executed) == 1:
                    await_only(configure_and_end())

            return fan_out(connection, limit=3, now=NOW, body=message_body).taken

        await db.write(work)
        assert await distribute(db) == [("a", "run.settled", "run_1")]


async def test_without_endpoints_nothing_is_kept(db: Database, writer: TestWriter) -> None:
    """Events that nobody wants are dropped: no endpoint, one that is gone from all settings for a
    day, one that was configured after the run ended."""
    await writer.submit(ended("run_1"))
    assert await distribute(db) == []
    await known(db, "gone", at=NOW - timedelta(days=2))
    await known(db, "late", at=NOW + SECOND)
    await writer.submit(ended("run_2"))
    assert await distribute(db, now=NOW + SECOND) == []
    assert await waiting(db) == 0


async def test_an_event_that_is_out_of_date_is_dropped(db: Database, writer: TestWriter) -> None:
    """A run that was lost and is there again is not reported as lost."""
    await known(db, "a")
    await writer.submit(seen("run_1"))
    for number in range(LOST_AFTER_READS):
        at = NOW + number * LOST_AFTER
        await writer.submit(FailedRead(run_id="run_1", at=at, error="no such run", missing=True))
    await writer.submit(seen("run_1", at=NOW + 10 * LOST_AFTER))
    assert await waiting(db) == 1
    assert await distribute(db) == []


async def test_configuring_keeps_since_and_the_state(db: Database) -> None:
    """Each note of the settings moves `configured_at` and brings new filters, and nothing else."""
    await known(db, "a")
    await turn(db, outcomes=[], now=NOW)
    await add_message(db, "msg_1", "a", next_attempt_at=NOW)
    (claim,) = (await turn(db, now=NOW)).claims
    await turn(db, outcomes=[(claim.message_id, failure(NOW, status=410))], now=NOW)
    await known(db, "a", at=NOW + SECOND, filter=RunFilter(status="failed"))
    row = await read_endpoints.get_endpoint(db, "a")
    assert row is not None
    assert (row.since, row.configured_at) == (NOW - SECOND, NOW + SECOND)
    assert (row.state, row.filters) == ("disabled", {"status": "failed"})


async def test_an_endpoint_of_this_process_gets_its_messages_whatever_the_clock_says(
    db: Database, writer: TestWriter
) -> None:
    """Others that no process has noted for a day get none; after days of sleep, or where the clock
    was set between the note and the event, this one's note is as old."""
    await known(db, "mine", "removed", at=NOW - timedelta(hours=25))
    await writer.submit(ended("run_1"))
    make = partial(fan_out, limit=3, now=NOW, body=message_body, own=["mine"])
    await db.write(make)
    rows, _ = await list_messages(db, limit=500)
    assert [(row.endpoint_id, row.run_id) for row in rows] == [("mine", "run_1")]


def failure(at: datetime, status: int = 500) -> Attempt:
    """An attempt that failed."""
    return Attempt(at=at, seconds=0.1, status=status, error=f"it answered HTTP {status}")


def success(at: datetime) -> Attempt:
    """An attempt that was answered 200."""
    return Attempt(at=at, seconds=0.1, status=200, answer="ok")


async def turn(
    db: Database,
    *,
    now: datetime,
    outcomes: Sequence[tuple[str, Attempt]] = (),
    most: int = MOST_OPEN,
    holder: str = "one",
) -> Claimed:
    """One turn of a worker for the endpoint "a"."""
    sending = replace(SENDING, holder=holder)
    return await db.write(
        lambda connection: record_and_claim(
            connection, sending, outcomes=outcomes, most=most, now=now
        )
    )


async def the_message(db: Database, message_id: str = "msg_1") -> MessageRow:
    """The message of that id."""
    rows, _ = await list_messages(db, limit=500)
    (found,) = [row for row in rows if row.message_id == message_id]
    return found


async def test_claims_are_bounded_and_exclusive(db: Database) -> None:
    """At most twenty messages of an endpoint are claimed at a time, by all workers together; a
    claim is free again after the lease."""
    await known(db, "a")
    for number in range(30):
        await add_message(db, f"msg_{number}", "a", next_attempt_at=NOW)
    first = await turn(db, now=NOW, most=12)
    second = await turn(db, now=NOW, holder="two")
    claimed = {claim.message_id for claim in first.claims + second.claims}
    assert (len(first.claims), len(second.claims), len(claimed)) == (12, 8, 20)
    assert (await turn(db, now=NOW, holder="three")).claims == []
    later = await turn(db, now=NOW + SENDING.lease, holder="three")
    assert len(later.claims) == MOST_OPEN


async def test_a_worker_releases_its_own_interrupted_claims_alone(db: Database) -> None:
    """Its other messages, and another's, would be sent twice."""
    await known(db, "a")
    for number in range(3):
        await add_message(db, f"msg_{number}", "a", next_attempt_at=NOW + number * SECOND)
    later = NOW + 3 * SECOND
    await turn(db, now=later, most=2)
    await turn(db, now=later, most=1, holder="two")
    for message_ids in (["msg_0"], ["msg_2"]):
        await db.write(partial(release, holder="one", message_ids=message_ids))
    free = (await turn(db, now=later, holder="three")).claims
    assert [claim.message_id for claim in free] == ["msg_0"]


async def test_one_query_finds_what_is_due_for_every_endpoint(db: Database) -> None:
    """When the first free message of each is due; none of a disabled endpoint, of another process's
    or of one whose messages are all claimed, as long as its leases last."""
    later = NOW + timedelta(hours=1)
    await known(db, "later", "due", "claimed", "long", "caught up", "empty", "disabled", "other")
    for name in ("later", "due", "claimed", "long", "caught up", "disabled", "other"):
        await add_message(db, f"msg_{name}", name, next_attempt_at=later)
    await add_message(db, "msg_sent", "due", 200)
    await add_message(db, "msg_now", "due", next_attempt_at=NOW)
    held = {"lease_holder": "two", "next_attempt_at": NOW}
    minutes = timedelta(minutes=10)
    await add_message(db, "msg_held", "claimed", **held, lease_until=NOW + SECOND)
    await add_message(db, "msg_old", "later", **held, lease_until=NOW + minutes)
    await add_message(db, "msg_slow", "long", **held, lease_until=NOW + minutes)
    outage = {"catch_up_from": NOW - 2 * SECOND, "catch_up_to": NOW - SECOND}
    for name, values in (
        ("caught up", outage),
        ("disabled", {"state": "disabled", "disabled_at": NOW}),
    ):
        await db.execute(update(endpoints).where(endpoints.c.endpoint_id == name).values(values))
    own = ("later", "due", "claimed", "long", "caught up", "empty", "disabled", "unknown")
    sendings = [
        replace(SENDING, endpoint_id=name, lease=minutes if name == "long" else SENDING.lease)
        for name in own
    ]
    assert await due_times(db, sendings, now=NOW) == {
        "later": NOW,  # its lease was taken before the clock was set back
        "due": NOW,
        "claimed": later,
        "long": later,
        "caught up": NOW - 2 * SECOND,
    }
    assert (await due_times(db, sendings, now=NOW + minutes))["long"] == NOW
    assert await due_times(db, [], now=NOW) == {}


async def test_the_last_failure_is_final(db: Database) -> None:
    """After ten attempts in three days a message is failed. Its endpoint, which took nothing
    meanwhile, is disabled: what is pending waits, until enabling begins a new schedule."""
    await known(db, "a")
    await add_message(db, "msg_1", "a", next_attempt_at=NOW)
    await add_message(db, "msg_2", "a", next_attempt_at=NOW + FAILING_FOR)
    now, count = NOW, 0
    while (found := await the_message(db)).state is MessageState.PENDING:
        assert found.next_attempt_at is not None
        while (
            now := min(now + timedelta(hours=12), found.next_attempt_at)
        ) < found.next_attempt_at:
            await known(db, "a", at=now)  # as a process does that runs all the time
        await known(db, "a", at=now)
        done = await turn(db, now=now, most=20)
        outcomes = [(claim.message_id, failure(now)) for claim in done.claims]
        last = await turn(db, now=now, outcomes=outcomes, most=0)
        count += 1
    assert count == 10
    assert last.disabled == "every attempt failed for 3 days; last: it answered HTTP 500"
    assert await due_times(db, [SENDING], now=now + 30 * FAILING_FOR) == {}
    assert (await turn(db, now=now + FAILING_FOR)).claims == []
    again = now + 2 * FAILING_FOR
    assert await enable(db, "a", now=again)
    (claim,) = (await turn(db, now=again)).claims
    assert claim.message_id == "msg_2"
    await turn(db, now=again, outcomes=[("msg_2", failure(again))], most=0)
    due = (await the_message(db, "msg_2")).next_attempt_at
    assert due is not None
    assert due <= again + 6 * SECOND


async def test_a_late_outcome_counts_as_far_as_it_is_true(db: Database) -> None:
    """A worker whose lease has expired still reports a success; its failure does not touch what
    another worker has claimed."""
    await known(db, "a")
    for message_id in ("msg_1", "msg_2"):
        await add_message(db, message_id, "a", next_attempt_at=NOW)
    await turn(db, now=NOW)
    late = NOW + SENDING.lease
    assert len((await turn(db, now=late, holder="two")).claims) == 2
    outcomes = [("msg_1", success(late)), ("msg_2", failure(late))]
    await turn(db, now=late, outcomes=outcomes, most=0)
    assert (await the_message(db, "msg_1")).state is MessageState.DELIVERED
    held = await the_message(db, "msg_2")
    assert (held.state, held.attempts, held.next_attempt_at) == (MessageState.PENDING, 1, NOW)
    await turn(db, now=late, outcomes=[("msg_2", success(late))], most=0, holder="two")
    assert (await the_message(db, "msg_2")).attempts == 2


@pytest.mark.parametrize("lasting", [4, 60])
async def test_what_failed_during_an_outage_is_due_after_it(db: Database, lasting: int) -> None:
    """A success after 5 s of failures or more makes due what failed after their first 5 s."""
    await known(db, "a")
    await add_message(db, "msg_1", "a", next_attempt_at=NOW)
    await add_message(db, "msg_2", "a", next_attempt_at=NOW + 55 * SECOND)
    await add_message(db, "msg_3", "a", next_attempt_at=NOW + lasting * SECOND)
    await turn(db, now=NOW)
    await turn(db, now=NOW, outcomes=[("msg_1", failure(NOW))], most=0)
    if lasting > 55:
        at = NOW + 55 * SECOND
        outcomes = [(one.message_id, failure(at)) for one in (await turn(db, now=at)).claims]
        assert len(outcomes) == 2
        await turn(db, now=at, outcomes=outcomes, most=0)
    end = NOW + lasting * SECOND
    (claim,) = (await turn(db, now=end)).claims
    more = await turn(db, now=end, outcomes=[(claim.message_id, success(end))])
    expected = {"msg_1", "msg_2"} if lasting > 55 else set()
    assert {one.message_id for one in more.claims} == expected
    row = await read_endpoints.get_endpoint(db, "a")
    assert row is not None
    assert row.failing_since is None


async def test_recovering_sends_each_message_once(db: Database, database_url: str) -> None:
    """Those that fail again meanwhile are not sent again and again."""
    await known(db, "a")
    for number in range(5):
        await add_message(db, f"msg_{number}", "a", 500, state="failed", next_attempt_at=None)
    sent = []

    class Watched(Database):
        """After each write, what is due is sent, and fails."""

        async def write(self, work: Any, **options: Any) -> Any:
            done = await super().write(work, **options)
            claims = (await turn(db, now=NOW)).claims
            sent.extend(one.message_id for one in claims)
            assert len(sent) < 20, "it does not end"
            refused = [(one.message_id, replace(failure(NOW), final=True)) for one in claims]
            await turn(db, now=NOW, outcomes=refused, most=0)
            return done

    async with await Watched.open(database_url) as watched:
        assert await recover(watched, "a", since=NOW, now=NOW, page=2) == 5
    assert sorted(sent) == [f"msg_{number}" for number in range(5)]


async def test_recovering_takes_pages(db: Database) -> None:
    """However many messages have failed, one transaction takes a page of them."""
    await known(db, "a")
    for number in range(5):
        await add_message(db, f"msg_{number}", "a", 500, state="failed", next_attempt_at=None)
    await add_message(db, "old", "a", 500, state="failed", created_at=NOW - SENDING.lease)
    await add_message(db, "done", "a", 200)
    assert await recover(db, "a", since=NOW, now=NOW, page=2) == 5
    assert len((await turn(db, now=NOW)).claims) == 5
    assert await recover(db, "b", since=NOW, now=NOW) is None


async def test_a_clock_that_was_ahead_for_days_changes_no_schedule(db: Database) -> None:
    """An endpoint seemed to be back then, and its messages would be tried every few seconds until
    that time has come."""
    await known(db, "a")
    await known(db, "a", at=NOW + timedelta(days=2))
    await known(db, "a")
    await add_message(db, "msg_1", "a", next_attempt_at=NOW)
    now, waits = NOW, []
    for _ in range(4):
        (claim,) = (await turn(db, now=now)).claims
        await turn(db, now=now, outcomes=[(claim.message_id, failure(now))], most=0)
        due = (await the_message(db)).next_attempt_at
        assert due is not None
        waits.append((due - now).total_seconds())
        now = due
    assert waits == sorted(waits)
    assert waits[-1] > 3600


@pytest.mark.parametrize("jump", [-3600, -2 * 365 * 86_400, 300, 3600])
@pytest.mark.parametrize("when", ["failing", "catching up"])
async def test_an_outage_is_over_whenever_the_clock_is_set(
    db: Database, jump: float, when: str
) -> None:
    """What failed is due at once, and fails no more often than without."""
    clock = HandClock()
    shared = SharedClock(db, wall=clock, seconds=clock.seconds)
    await shared.check()
    await known(db, "a", at=clock())
    for name in ("msg_1", "msg_2"):
        await add_message(db, name, "a", next_attempt_at=clock())
    for _ in range(3):  # the outage: 5 s, 5 min, 30 min
        claims = (await turn(db, now=clock())).claims
        clock.move(1)
        failed = [(claim.message_id, failure(clock())) for claim in claims]
        await turn(db, now=clock(), outcomes=failed, most=0)
        clock.move(60 * 6)
    if when == "failing":
        clock.set(jump)
        await shared.check()
    await add_message(db, "msg_3", "a", 200)
    await turn(db, now=clock(), outcomes=[("msg_3", success(clock()))], most=0)
    if when == "catching up":
        clock.set(jump)
        await shared.check()
    assert (await due_times(db, [SENDING], now=clock()))["a"] <= clock()
    claims = (await turn(db, now=clock())).claims
    assert {claim.message_id for claim in claims} == {"msg_1", "msg_2"}
    clock.move(1)
    failed = [(claim.message_id, failure(clock())) for claim in claims]
    assert (await turn(db, now=clock(), outcomes=failed)).claims == []
    assert (await turn(db, now=clock())).claims == []


async def test_an_outage_by_an_unknown_clock_holds_nothing_back(db: Database) -> None:
    """Its end may seem to be still to come, as after a reboot with the clock set back."""
    await known(db, "a")
    later = NOW + timedelta(hours=1)
    await add_message(db, "msg_1", "a", next_attempt_at=later)
    (claim,) = (await turn(db, now=later)).claims
    await turn(db, now=later, outcomes=[(claim.message_id, failure(later))], most=0)
    await add_message(db, "msg_2", "a", 200)
    later += timedelta(minutes=1)
    await turn(db, now=later, outcomes=[("msg_2", success(later))], most=0)
    await add_message(db, "msg_3", "a", next_attempt_at=NOW)
    await known(db, "a")
    assert (await due_times(db, [SENDING], now=NOW))["a"] <= NOW
    assert [claim.message_id for claim in (await turn(db, now=NOW)).claims] == ["msg_3"]
    assert (await turn(db, now=NOW)).claims == []


async def test_days_of_sleep_are_no_days_of_failures(db: Database) -> None:
    """The first attempts of a machine that wakes up fail, because it has no network yet."""
    await known(db, "a")
    await add_message(db, "msg_1", "a", next_attempt_at=NOW)
    for now in (NOW, NOW + FAILING_FOR + timedelta(days=1)):
        (claim,) = (await turn(db, now=now)).claims
        last = await turn(db, now=now, outcomes=[(claim.message_id, failure(now))], most=0)
        assert last.disabled is None
        assert (await the_message(db)).state is MessageState.PENDING


async def test_an_event_of_a_newer_version_is_left_to_it(
    db: Database, writer: TestWriter, database_url: str
) -> None:
    """It stays in the outbox, and holds up no other."""
    await next_year.fill(database_url)
    await known(db, "a", at=next_year.NOW)
    await writer.submit(ended("run_1", at=next_year.NOW + SECOND))
    await distribute(db, now=next_year.NOW + SECOND, until=1)
    assert not await outbox_waits(db)
    made, _ = await list_messages(db, endpoint_id="a")
    assert [row.run_id for row in made] == ["run_1"]


async def test_events_are_left_to_a_newer_version_that_filters_them(
    db: Database, writer: TestWriter
) -> None:
    """For as long as its processes run; then its filter counts as far as it is known."""
    await known(db, "a", filter=RunFilter(status="completed"))
    newer = update(endpoints).values(filters={"status": "completed", "of_next_year": "x"})
    await db.write(lambda connection: connection.execute(newer).rowcount)
    await writer.submit(ended("run_1"))
    left = await db.write(lambda one: fan_out(one, limit=3, now=NOW, body=message_body))
    assert (left.taken, await waiting(db)) == (0, 1)
    assert await distribute(db, now=NOW + LEFT_FOR) == [("a", "run.settled", "run_1")]
