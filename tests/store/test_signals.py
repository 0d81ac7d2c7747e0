"""Signals: who waits is told, within the process and across processes."""

import asyncio
from datetime import timedelta

import asyncpg
import pytest
from sqlalchemy import text

from tests.store.making import NOW, callback, called, ids, open_writer, seen, started
from tests.support.logs import capture_logs
from tests.support.waiting import eventually
from tracker.core.run import RunStatus
from tracker.store.coordination import (
    PAYLOAD_BYTES,
    Signals,
    claim_due,
    next_due_at,
    read_runs,
    release,
    run_notices,
)
from tracker.store.engine import Database


async def test_a_due_run_wakes_waiting_workers(db: Database) -> None:
    """The worker of the same process is woken by a commit that brings a look forward."""
    async with (
        Signals(db) as signals,
        open_writer(db, on_commit=[signals.committed]) as writer,
    ):
        await eventually(lambda: signals.listening)
        await signals.wait_due(0)  # beginning to listen counts as a signal
        assert not await signals.wait_due(0.01)
        waiting = asyncio.ensure_future(signals.wait_due(10))
        await writer.submit(callback("run_1"))
        assert await waiting
        await writer.submit(callback("run_2"))
        assert await signals.wait_due(0.01)  # said before anybody waited, and not forgotten
        await writer.submit(started("run_3"))
        assert await signals.wait_due(0.01)  # in half a minute, which nobody knew
        await writer.submit(seen("run_3", at=NOW + timedelta(hours=1)))
        assert not await signals.wait_due(0.01)  # later than that: nothing to hurry for


async def test_changes_are_reported_once(db: Database) -> None:
    """A listener hears of each run that changed, and of none that did not."""
    heard: list[str] = []
    async with (
        Signals(db) as signals,
        open_writer(db, on_commit=[signals.committed]) as writer,
    ):
        await eventually(lambda: signals.listening)
        with signals.subscribed(heard.extend):
            await writer.submit_all([started("run_1"), started("run_2")])
            await writer.submit(seen("run_1", RunStatus.RUNNING))
            await writer.submit(seen("run_1", RunStatus.RUNNING, at=NOW))
            assert heard == ["run_1", "run_2", "run_1"]
        await writer.submit(callback("run_1"))
        assert heard == ["run_1", "run_2", "run_1"]


async def test_other_processes_are_reported(postgres_url: str) -> None:
    """On PostgreSQL a commit of one process wakes the worker and the streams of another."""
    heard: list[str] = []
    async with (
        await Database.open(postgres_url) as receiver,
        await Database.open(postgres_url) as worker,
        Signals(worker) as signals,
        open_writer(receiver) as writer,
    ):
        await eventually(lambda: signals.listening)
        await signals.wait_due(0)
        with signals.subscribed(heard.extend):
            await writer.submit_all([called(run) for run in ids("run", 450)])
            assert await signals.wait_due(10)
            await eventually(lambda: sorted(heard) == ids("run", 450))


async def test_released_runs_are_reported(postgres_url: str) -> None:
    """A worker to which a run is due when its claim ends is woken when its holder releases it."""
    lease = timedelta(seconds=30)
    async with (
        await Database.open(postgres_url) as holder,
        await Database.open(postgres_url) as worker,
        Signals(worker) as signals,
        open_writer(holder) as writer,
    ):
        await eventually(lambda: signals.listening)
        await signals.wait_due(0)
        await writer.submit(callback("run_1"))
        assert await signals.wait_due(10)
        await claim_due(holder, holder="h", now=NOW, lease=lease, limit=1)
        assert await next_due_at(worker, now=NOW) == NOW + lease
        assert await release(holder, "h") == 1
        assert await signals.wait_due(10)
        assert await next_due_at(worker, now=NOW) == NOW
        assert await release(holder, "h") == 0
        assert not await signals.wait_due(0.1)


async def test_a_lost_connection_is_made_anew(postgres_url: str) -> None:
    """When the listening connection is cut it comes back, and whoever waits looks again."""
    resets: list[int] = []
    async with await Database.open(postgres_url) as db, Signals(db) as signals:
        await eventually(lambda: signals.listening)
        await signals.wait_due(0)
        with signals.subscribed(lambda run_ids: resets.append(len(run_ids))):
            cut = text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'tracker-signals' AND datname = current_database()"
            )
            assert await db.write(lambda connection: len(connection.execute(cut).all())) == 1
            assert await signals.wait_due(10)
            assert resets == [0]
            assert signals.listening


async def test_a_server_that_stays_away_is_said_once() -> None:
    """However often the connection is tried again."""
    tried = 0

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tried
        tried += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, await Database.open(f"postgresql://t@127.0.0.1:{port}/t") as db:
        with capture_logs() as lines:
            async with Signals(db, retry_seconds=(0.01, 0.02)):
                await eventually(lambda: tried >= 5)
    assert [line["event"] for line in lines] == ["signals.lost"]


async def test_nonsense_on_the_channel_is_ignored(postgres_url: str) -> None:
    """Anyone who may connect may notify: what is none of ours is no change, and breaks nothing."""
    heard: list[str] = []
    async with (
        await Database.open(postgres_url) as db,
        await Database.open(postgres_url) as other,
        Signals(db) as signals,
        open_writer(other) as writer,
    ):
        await eventually(lambda: signals.listening)
        with signals.subscribed(heard.extend):
            client = await asyncpg.connect(postgres_url)
            for payload in ("", "no json", "{}", "[1, 2]", "[]", '"x"'):
                await client.execute("SELECT pg_notify('tracker_runs', $1)", payload)
            await client.close()
            await writer.submit(callback("run_1"))
            await eventually(lambda: heard == ["run_1"])


@pytest.mark.parametrize("count", [0, 1, 300, 5000])
def test_notices_fit_and_lose_nothing(count: int) -> None:
    """However many runs changed, each payload is small enough, and all runs are named."""
    run_ids = ids("rün", count)
    payloads = [payload for _, payload in run_notices("origin", run_ids)]
    assert all(len(payload.encode()) < PAYLOAD_BYTES + 50 for payload in payloads)
    read = [read_runs(payload) for payload in payloads]
    assert {origin for origin, _ in read} <= {"origin"}
    assert [run_id for _, named in read for run_id in named] == run_ids


def test_an_absurd_id_is_not_announced() -> None:
    """A run whose id would not fit into a notification does not keep the others from theirs."""
    named = [read_runs(payload)[1] for _, payload in run_notices("o", ["a", "x" * 9000, "b"])]
    assert named == [["a", "b"]]
