"""The clock that all processes share: PostgreSQL's, whatever this machine's own one says."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from tests.support.waiting import eventually
from tracker.core.clock import utc_now
from tracker.store import clock
from tracker.store.clock import ServerClock, shared_clock
from tracker.store.engine import Database

NEAR = timedelta(seconds=1)


class Seconds:
    """Seconds that pass when they are told to; each look at them may take some."""

    def __init__(self, *, each: float = 0.0) -> None:
        self.now = 1000.0
        self.each = each

    def __call__(self) -> float:
        self.now += self.each
        return self.now


async def test_it_gives_the_servers_time(postgres_url: str) -> None:
    """The server's answer is carried on by seconds that pass here, and by nothing else."""
    seconds = Seconds()
    async with await Database.open(postgres_url) as db:
        told = ServerClock(db, seconds=seconds)
        with pytest.raises(RuntimeError):
            told()
        before = datetime.now(UTC)
        await told.ask()
        first = told()
        assert first.tzinfo is UTC
        assert before <= first <= datetime.now(UTC)
        seconds.now += 90
        assert told() == first + timedelta(seconds=90)


async def test_it_is_put_right_by_the_next_answer(postgres_url: str) -> None:
    """A machine that counted seconds which the server did not is right again once it asks; what
    took too long to tell the time is not gone by."""
    seconds = Seconds()
    async with await Database.open(postgres_url) as db:
        told = ServerClock(db, seconds=seconds)
        await told.ask()
        seconds.now += 90
        seconds.each = clock.SLOW + 1
        await told.ask()
        assert told() - datetime.now(UTC) > timedelta(seconds=80)
        seconds.each = 0.0
        before = datetime.now(UTC)
        await told.ask()
        assert before <= told() <= datetime.now(UTC)


async def test_a_server_whose_clock_is_set_is_told_of(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the difference, and before anyone gets a time after it; what the clocks drift apart is
    no such thing."""
    jumps: list[tuple[float, bool]] = []
    async with await Database.open(postgres_url) as db:
        told = ServerClock(db)
        await told.ask()
        told.on_jump.append(lambda jump: jumps.append((jump.total_seconds(), told() > soon())))
        for seconds in (1, 3600, 3600, 0):
            ahead = func.clock_timestamp() + timedelta(seconds=seconds)
            monkeypatch.setattr(clock, "_ASK", select(ahead))
            await told.ask()
    assert [round(seconds, -1) for seconds, _ in jumps] == [3600, -3600]
    assert [is_later for _, is_later in jumps] == [False, True]


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(minutes=1)


async def test_it_is_asked_for_as_long_as_it_is_used(postgres_url: str) -> None:
    """Without anybody's doing the server is asked again, and a time when it does not answer only
    means that the last answer is carried on."""
    async with (
        await Database.open(postgres_url) as db,
        shared_clock(db, ask_every=0.01) as told,
    ):
        assert isinstance(told, ServerClock)
        right, told._start = told._start, datetime(2020, 1, 1, tzinfo=UTC)
        assert right is not None
        await eventually(lambda: abs(told() - datetime.now(UTC)) < NEAR)


async def test_sqlite_goes_by_the_machines_clock(sqlite_url: str) -> None:
    """One machine uses a SQLite file, and it has one clock."""
    async with await Database.open(sqlite_url) as db, shared_clock(db) as told:
        assert told is utc_now
