"""The clock that all processes share: PostgreSQL's, whatever this machine's own one says, on SQLite
the machine's; and what happens where either is set."""

from datetime import UTC, datetime, timedelta
from itertools import repeat
from typing import Any

import pytest
from sqlalchemy import select, text

from tests.store.making import NOW
from tests.support.clocks import HandClock, server_clock
from tests.support.faulty import FaultyDatabase
from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.core.errors import StoreUnavailable
from tracker.polling import poll, sweep
from tracker.starting import sending
from tracker.store import clock, coordination
from tracker.store.clock import SharedClock, shared_clock
from tracker.store.engine import Database
from tracker.store.queries import batches
from tracker.store.schema import endpoints, leases, metadata
from tracker.store.url import DatabaseTimes

NEAR = timedelta(seconds=1)
SECOND = timedelta(seconds=1)


class Seconds:
    """Seconds that pass when they are told to; each look at them may take some."""

    def __init__(self, *, each: float = 0.0) -> None:
        self.now = 1000.0
        self.each = each

    def __call__(self) -> float:
        self.now += self.each
        return self.now


@pytest.fixture
async def postgres(postgres_url: str) -> Any:
    async with await Database.open(postgres_url) as db:
        yield db


async def test_it_gives_the_servers_time(postgres: Database) -> None:
    """The server's answer is carried on by seconds that pass here, and by nothing else."""
    seconds = Seconds()
    told = SharedClock(postgres, seconds=seconds)
    with pytest.raises(RuntimeError):
        told()
    before = datetime.now(UTC)
    await told.check()
    first = told()
    assert first.tzinfo is UTC
    assert before <= first <= datetime.now(UTC)
    seconds.now += 90
    assert told() == first + timedelta(seconds=90)


async def test_it_is_put_right_by_the_next_answer(postgres: Database) -> None:
    """A machine that counted seconds which the server did not is right again once it asks; what
    took too long to tell the time is not gone by."""
    seconds = Seconds()
    told = SharedClock(postgres, seconds=seconds)
    await told.check()
    seconds.now += 90
    seconds.each = clock.SLOW + 1
    await told.check()
    assert told() - datetime.now(UTC) > timedelta(seconds=80)
    seconds.each = 0.0
    before = datetime.now(UTC)
    await told.check()
    assert before <= told() <= datetime.now(UTC)


async def test_it_is_asked_for_as_long_as_it_is_used(postgres: Database) -> None:
    """Without anybody's doing the server is asked again."""
    async with shared_clock(postgres, every=0.01) as told:
        told._start = datetime(2020, 1, 1, tzinfo=UTC)
        await eventually(lambda: abs(told() - datetime.now(UTC)) < NEAR)


async def test_sqlite_goes_by_the_machines_clock(sqlite_url: str) -> None:
    """One machine uses a SQLite file, and it has one clock."""
    async with await Database.open(sqlite_url) as db, shared_clock(db) as told:
        assert not told.is_servers
        before = utc_now()
        assert before <= told() <= utc_now()


async def test_a_server_whose_clock_is_set_is_noticed(postgres_url: str) -> None:
    """What the clocks drift apart is no such thing."""
    async with server_clock(postgres_url) as set_to, await Database.open(postgres_url) as db:
        told = SharedClock(db)
        await told.check()
        with capture_logs() as lines:
            for seconds in (1, 3600, 3600, 0):
                await set_to(seconds)
                await told.check()
    assert [round(line["seconds"], -1) for line in lines] == [3600, -3600]


async def test_a_new_process_waits_for_others_to_notice(postgres: Database) -> None:
    """On another machine it learns from them that the server's clock was set before it started."""
    hand = HandClock()
    told = SharedClock(postgres, seconds=hand.seconds, every=0.2)
    await told.check()
    noted = leases.update().where(leases.c.name == "clock")
    await postgres.execute(noted.values(holder="3600.0", until=told()))
    assert told.jumped_at < 0
    await told.settle()
    assert told.jumped_at == pytest.approx(hand.seconds(), abs=1)
    hand.move(1)
    before = told.jumped_at
    await postgres.close()
    await told.settle()  # asks nothing any more
    assert told.jumped_at == before


async def until(db: Database, name: str) -> datetime:
    found: datetime = await db.fetchval(select(leases.c.until).where(leases.c.name == name))
    return found


async def lease(db: Database, hand: HandClock) -> None:
    """A lease of half a minute."""
    assert await coordination.take_lease(db, "one", "holder", hand(), 30 * SECOND)


def of(db: Database, hand: HandClock) -> SharedClock:
    return SharedClock(db, wall=hand, seconds=hand.seconds)


@pytest.mark.parametrize("jump", [3, 200, -200, 86_400, -86_400])
async def test_what_waits_is_moved_once(db: Database, other_db: Database, jump: float) -> None:
    """By the first process that notices, of those that run and those that start later; until then
    each goes on as it was."""
    hand = HandClock()
    one, two = of(db, hand), of(other_db, hand)
    await one.check()
    await two.check()
    await lease(db, hand)
    before = hand()
    hand.set(jump)
    assert (one(), two()) == (before, before)
    assert one.shown() == hand()
    fresh = of(other_db, hand)
    with capture_logs() as lines:
        for each in (fresh, one, two, one, of(db, hand)):
            await each.check()
            assert each() == hand()
            assert await until(db, "one") == hand() + 30 * SECOND
            assert each.jumped_at == hand.seconds()
    assert [(line["seconds"], line["moved"]) for line in lines] == [(jump, 1), (jump, 0), (jump, 0)]


async def test_what_is_set_once_more_is_moved_once_more(db: Database, other_db: Database) -> None:
    """Also by a process that has not noticed the first time, of which another one moved."""
    hand = HandClock()
    one, two = of(db, hand), of(other_db, hand)
    for each in (one, two):
        await each.check()
    await lease(db, hand)
    hand.set(3600)
    await one.check()
    hand.set(-600)
    await two.check()
    assert await until(db, "one") == hand() + 30 * SECOND
    await one.check()
    assert await until(db, "one") == hand() + 30 * SECOND


async def test_a_process_knows_when_the_clock_was_set_before_it_started(db: Database) -> None:
    """On the same machine by its boot, on another by the database's time."""
    hand = HandClock()
    await of(db, hand).check()
    hand.set(3600)
    await of(db, hand).check()
    hand.move(50)
    here, elsewhere = of(db, hand), of(db, hand)
    elsewhere._name, elsewhere.boot = "clock:another", "another"
    for each in (here, elsewhere):
        await each.check()
        assert hand.seconds() - each.jumped_at == pytest.approx(50)


@pytest.mark.parametrize("expired", [True, False])
async def test_a_lease_is_not_revived(db: Database, expired: bool) -> None:
    """One that had expired when the clock was set stays so."""
    hand = HandClock()
    one = of(db, hand)
    await one.check()
    await lease(db, hand)
    last = hand() + 30 * SECOND
    if expired:
        hand.move(31)
    hand.set(20)
    await one.check()
    assert await until(db, "one") == last + (0 if expired else 20) * SECOND


async def test_a_machine_that_lost_seconds_moves_nothing_twice(
    db: Database, other_db: Database
) -> None:
    """One that was paused, of several on one database, takes it for a clock that was set. The
    others go on, the processes agree, a lease lasts no longer than any does, and nothing fails
    since a time to come."""
    paused, other = HandClock(), HandClock()
    one, two = of(db, paused), of(other_db, other)
    two._name, two.boot = "clock:another", "another"
    for each in (one, two):
        await each.check()
    other.move(3600)
    paused.set(3600)
    await lease(db, other)
    timers = [{"name": name, "holder": "h", "until": other() + SECOND} for name in TIMERS]
    await db.write(lambda connection: connection.execute(leases.insert(), timers).rowcount)
    times = dict.fromkeys(("since", "configured_at", "failing_since"), other() - 60 * SECOND)
    failing = {"endpoint_id": "shop", "url": "", "events": [], "filters": {}, "state": "enabled"}
    await db.execute(endpoints.insert().values(failing | times))
    with capture_logs() as lines:
        for each in (one, two, one, two, one):
            await each.check()
    assert len(lines) == 1
    assert await until(db, "one") == other() + clock.NAMED
    assert await db.fetchval(select(endpoints.c.failing_since)) == other()
    for name in TIMERS:
        assert await until(db, name) == other() + SECOND
    assert one() == two() == other()


@pytest.mark.parametrize("jump", [pytest.param(3600, marks=pytest.mark.thorough), -3600])
async def test_what_cannot_be_moved_stops_no_process(
    db: Database, faulty_db: FaultyDatabase, jump: float
) -> None:
    """One that runs, and one that starts, go on by the time as it was, and what waits is moved as
    soon as that is possible, with no one's doing."""
    hand = HandClock()
    async with shared_clock(faulty_db, wall=hand, seconds=hand.seconds, every=60) as told:
        await lease(db, hand)
        before = hand()
        faulty_db.faults = repeat(StoreUnavailable("the database takes too long"))
        hand.set(jump)
        assert told() == before
        await told.check()
        async with shared_clock(faulty_db, wall=hand, seconds=hand.seconds, every=60) as fresh:
            for each in (told, fresh):
                await each.check()
                assert each() == before
                assert each.move_failed
            assert await until(db, "one") == before + 30 * SECOND
            faulty_db.tried = 0
            await eventually(lambda: faulty_db.tried >= 2)
            faulty_db.faults = iter(())

            async def is_moved() -> bool:
                return await until(db, "one") == hand() + 30 * SECOND

            await eventually(is_moved)
            for each in (told, fresh):
                await each.check()
                assert each() == hand()
                assert not each.move_failed


async def test_a_move_may_take_longer_than_other_statements(postgres_url: str) -> None:
    """As that of a large backlog does."""
    hand = HandClock()
    times = DatabaseTimes(statement=0.5, answer=1.0)
    async with (
        await Database.open(postgres_url) as patient,
        await Database.open(postgres_url, times=times) as db,
    ):
        one = of(db, hand)
        await one.check()
        await lease(patient, hand)
        await patient.execute(
            text(
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql "
                "AS 'BEGIN PERFORM pg_sleep(1.2); RETURN NULL; END'"
            )
        )
        await patient.execute(
            text("CREATE TRIGGER slow AFTER UPDATE ON leases EXECUTE FUNCTION slow()")
        )
        hand.set(-3600)
        for _ in range(3):  # on a busy machine what comes before the move may take too long
            if await one.check() is None:
                break
        assert one() == hand()
        assert await until(patient, "one") == hand() + 30 * SECOND
        with pytest.raises(StoreUnavailable):  # others have their limit as before
            await db.execute(text("SELECT pg_sleep(1)"))


async def test_machines_that_run_for_years_keep_their_clocks(
    db: Database, other_db: Database
) -> None:
    """One that starts removes no clock of another that runs."""
    hand, other = HandClock(), HandClock()
    other.move(2 * 365 * 86_400)
    hand.set((other() - hand()).total_seconds())
    one, two = of(db, hand), of(other_db, other)
    two._name, two.boot = "clock:another", "another"
    for each in (two, one):
        await each.check()
    kept = select(leases.c.name).where(leases.c.name.startswith("clock:"))
    assert {*await db.fetchcol(kept)} == {one._name, two._name}


async def test_times_are_moved_exactly(db: Database) -> None:
    """To the millisecond, in the form in which the database compares them."""
    hand = HandClock()
    one = of(db, hand)
    await one.check()
    exact = hand() + timedelta(seconds=30, microseconds=123_456)
    values = {"name": "one", "holder": "holder", "until": exact}
    await db.write(lambda connection: connection.execute(leases.insert(), [values]).rowcount)
    hand.set(3.25)
    await one.check()
    assert abs(await until(db, "one") - exact - 3.25 * SECOND) <= timedelta(milliseconds=1)
    earlier = select(leases.c.name).where(
        leases.c.until < exact + 3 * SECOND, leases.c.name == "one"
    )
    assert await db.fetchval(earlier) is None


TIMERS = ("wait:shop", "contact:shop", "recheck:shop", "generations:shop", "catalogue:scheduled")
DUE = {
    *("runs.next_check_at", "runs.recheck_at", "batches.launch_at", "messages.next_attempt_at"),
    "history_coverage.retry_at",
}
WAITS = {
    *("runs.next_check_at", "runs.recheck_at", "runs.missing_since", "runs.lease_until"),
    *("starts.lease_until", "batches.launch_at", "batches.lease_until", "leases.until"),
    *("messages.next_attempt_at", "messages.tried_since", "messages.lease_until"),
    *("messages.last_attempt_at", "endpoints.catch_up_from", "endpoints.catch_up_to"),
    *("endpoints.failing_since", "history_coverage.retry_at"),
}


def test_every_time_that_something_waits_for_is_moved() -> None:
    """The columns that say until when something lasts, or when it is due, by their names."""
    moved = {str(column) for waits in clock.WAITS for column in waits.columns}
    assert moved == WAITS
    assert {str(one) for waits in clock.WAITS for one in waits.due} - {"leases.until"} == DUE
    for table in metadata.sorted_tables:
        for column in table.columns:
            if column.name.endswith(("_until", "until", "next_check_at", "retry_at", "launch_at")):
                assert str(column) in moved


def test_no_lease_is_longer_than_it_may_be_moved() -> None:
    """Else another process takes it early where the clock is set forward."""
    assert max(poll.LEASE, sending.HELD_FOR, batches.LEASE) <= clock.HELD
    assert sweep.LEASE <= clock.NAMED


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_clock_that_is_set_forward_puts_nothing_off(jump: float) -> None:
    """What is due is moved back, and never forward."""
    statements = [str(one) for one in clock.moves("sqlite", jump * SECOND, NOW)]
    for table, _, column in (name.partition(".") for name in DUE):
        found = [
            one.partition(" WHERE ")[0]
            for one in statements
            if one.startswith(f"UPDATE {table} SET ")
        ]
        assert any(f"{column}=" in one for one in found) == (jump < 0)
