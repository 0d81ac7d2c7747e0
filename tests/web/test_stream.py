"""`GET /api/stream`: every change of a run once, in order, from any process."""

import asyncio
import os
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from sqlalchemy import delete, event

from tests.store.making import NOW, called, ids, seen, started
from tests.support.forked import run_python
from tests.support.waiting import eventually
from tests.web.conftest import Serve, Site
from tests.web.serving import serving, wire
from tests.web.streaming import following
from tracker.core.errors import StoreUnavailable
from tracker.core.events import RunFilter
from tracker.core.record import FailedRead, apply
from tracker.core.run import RunStatus
from tracker.core.schedule import Policy
from tracker.polling.changes import Change, ChangeReader
from tracker.services import open_services
from tracker.settings import Settings
from tracker.store.queries import runs as feed
from tracker.store.schema import runs
from tracker.web.app import build_app
from tracker.web.http import Limits
from tracker.web.stream import frame_of, next_frames


async def is_full(site: Site) -> bool:
    """Whether one more reader is refused."""
    return (await site.client.head("/api/stream")).status_code == 503


async def test_each_change_is_one_event(site: Site) -> None:
    """Every event comes with its number and the run in its present state."""
    async with following(site.client) as events:
        await site.services.writer.submit(started("run_1"))
        await site.services.writer.submit(called("run_1"))
        first, second = await events.next(), await events.next()
    assert [each["event"] for each in (first, second)] == ["run", "run"]
    assert [each["data"]["event"]["source"] for each in (first, second)] == ["start", "callback"]
    assert int(first["id"]) < int(second["id"])
    assert second["data"]["event"]["id"] == int(second["id"])
    shown = (await site.client.get("/api/runs/run_1")).json()
    assert second["data"]["run"] == shown
    assert shown["status"] == "completed"


async def test_a_reader_resumes(site: Site) -> None:
    """A reader that reconnects with its last id gets what it missed, once, and then the rest."""
    writer = site.services.writer
    async with following(site.client) as events:
        await writer.submit(seen("run_0"))
        assert [run["run_id"] for run in await events.runs(1)] == ["run_0"]
    missed = list(ids("missed", 600))  # more than a page
    await writer.submit_all([seen(run) for run in missed])
    async with following(site.client, last=events.last_id) as events:
        await writer.submit(seen("run_live"))
        got = [run["run_id"] for run in await events.runs(601)]
    assert sorted(got[:600]) == missed
    assert got[600:] == ["run_live"]
    async with following(site.client, last_event_id=events.last_id) as events:
        await writer.submit(seen("run_last"))
        assert [run["run_id"] for run in await events.runs(1)] == ["run_last"]


async def test_a_reader_can_resume_before_its_first_event(site: Site) -> None:
    """The first frame has the stream's position, so nothing is lost before the first event."""
    await site.services.writer.submit(seen("run_old"))
    async with following(site.client) as events:
        await site.services.writer.submit(seen("run_1"))
        await events.next()
        greeted = events.last_id
    assert greeted is not None
    async with following(site.client, last=str(int(greeted) - 1)) as events:
        assert [run["run_id"] for run in await events.runs(1)] == ["run_1"]


async def test_events_are_filtered(site: Site) -> None:
    """By run, technique, workspace and status, and by all of them at once."""
    tech = {"technique_id": "tech_1"}
    entries = [
        seen("run_1", facts=tech),
        seen("run_2", facts=tech | {"workspace_id": "ws_1"}),
        seen("run_3", RunStatus.FAILED, facts={"workspace_id": "ws_1"}),
        seen("run_last", RunStatus.FAILED, facts=tech | {"workspace_id": "ws_1"}),
    ]
    queries = {
        ("run_1", "run_2", "run_last"): tech,
        ("run_2", "run_3", "run_last"): {"workspace_id": "ws_1"},
        ("run_3", "run_last"): {"status": "failed"},
        ("run_last",): tech | {"workspace_id": "ws_1", "status": "failed", "run_id": "run_last"},
    }
    async with AsyncExitStack() as stack:
        streams = {
            wanted: await stack.enter_async_context(following(site.client, **query))
            for wanted, query in queries.items()
        }
        for entry in entries:
            await site.services.writer.submit(entry)
        for wanted, events in streams.items():
            assert tuple(run["run_id"] for run in await events.runs(len(wanted))) == wanted


@pytest.mark.parametrize("query", [{"last_event_id": "x"}, {"last_event_id": "-1"}], ids=str)
async def test_an_invalid_query_is_refused(small_site: Site, query: dict[str, str]) -> None:
    """The answer is a 400 that names the field."""
    answer = await small_site.client.get("/api/stream", params=query)
    assert answer.status_code == 400
    assert [each["field"] for each in answer.json()["error"]["fields"]] == list(query)


async def test_a_lost_run_is_sent_without_an_event(site: Site) -> None:
    """A run that is lost, or found again, has changed although it has no new event."""
    await site.services.writer.submit(started("run_1"))
    async with following(site.client) as events:
        for hour in range(5):
            at = NOW + timedelta(hours=hour)
            unseen = FailedRead(run_id="run_1", at=at, error="no such run", missing=True)
            await site.services.writer.submit(unseen)
        told = await events.next()
        assert (told["data"]["event"], told["data"]["run"]["tracking"]) == (None, "lost")
        assert told["id"] is None
        await site.services.writer.submit(seen("run_1", at=NOW + timedelta(hours=9)))
        assert (await events.next())["data"]["run"]["tracking"] == "active"


@pytest.mark.both_databases
async def test_changes_of_other_processes_are_sent(database_url: str, serve: Serve) -> None:
    """A change committed by another process is sent within seconds: notified on PostgreSQL, polled
    on SQLite."""
    program = (
        "import asyncio, sys\n"
        "from tests.store.making import open_writer, seen\n"
        "from tracker.store.engine import Database\n"
        "async def main():\n"
        "    async with await Database.open(sys.argv[1]) as db, open_writer(db) as writer:\n"
        "        await writer.submit(seen('run_elsewhere'))\n"
        "asyncio.run(main())\n"
    )
    async with serve(database_url) as site, site.services.signals:
        await eventually(lambda: site.services.signals.listening)
        async with following(site.client) as events:
            done = await asyncio.to_thread(run_python, "-c", program, database_url, env=os.environ)
            assert done.returncode == 0, done.stderr
            assert [run["run_id"] for run in await events.runs(1)] == ["run_elsewhere"]


async def test_a_reader_resumes_at_another_process(postgres_url: str, serve: Serve) -> None:
    """The other process sends what the first one has not sent, and nothing twice."""
    async with serve(postgres_url) as one, serve(postgres_url) as two, two.services.signals:
        await eventually(lambda: two.services.signals.listening)
        async with following(one.client) as events:
            await one.services.writer.submit(seen("run_1"))
            await events.next()
        await two.services.writer.submit(seen("run_2"))
        async with following(two.client, last=events.last_id) as events:
            await one.services.writer.submit(seen("run_3"))
            assert [run["run_id"] for run in await events.runs(2)] == ["run_2", "run_3"]


async def test_an_event_that_commits_late_is_sent(postgres_url: str, serve: Serve) -> None:
    """A smaller number that appears after a greater one is sent, and before it; a number that was
    rolled back delays nothing."""
    add = (
        "INSERT INTO run_events (run_id, at, source, status, detail) "
        "VALUES ('run_1', now(), 'poll', 'running', '{}') RETURNING id"
    )
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serve(postgres_url))
        writer = site.services.writer
        late = await asyncpg.connect(postgres_url)
        stack.push_async_callback(late.close)
        await writer.submit(seen("run_1"))
        async with following(site.client) as events:
            transaction = late.transaction()
            await transaction.start()
            await late.fetchval(add)
            await transaction.rollback()
            await writer.submit(seen("run_2"))
            assert [run["run_id"] for run in await events.runs(1)] == ["run_2"]
            transaction = late.transaction()
            await transaction.start()
            number = await late.fetchval(add)
            await writer.submit(seen("run_3"))
            with pytest.raises(TimeoutError):
                await events.next(0.3)
        async with following(site.client, last=events.last_id) as events:
            await transaction.commit()
            told = [await events.next(), await events.next()]
    assert [each["data"]["run"]["run_id"] for each in told] == ["run_1", "run_3"]
    assert told[0]["id"] == str(number)


async def test_an_unknown_id_resets_the_reader(small_site: Site) -> None:
    """A reader with an id of another database is reset, and follows from now on."""
    await small_site.services.writer.submit(seen("run_1"))
    async with following(small_site.client, last="999999") as events:
        assert (await events.next())["event"] == "reset"
        await small_site.services.writer.submit(seen("run_2"))
        assert [run["run_id"] for run in await events.runs(1)] == ["run_2"]


async def test_renumbering_resets_readers(small_site: Site) -> None:
    """After every run is deleted SQLite counts from 1 again: readers are reset."""
    services = small_site.services
    await services.writer.submit_all([seen(run) for run in ids("run", 5)])
    async with following(small_site.client) as events:
        await services.database.write(lambda c: c.execute(delete(runs)).rowcount)
        assert (await events.next())["event"] == "reset"
        await services.writer.submit(seen("run_new"))
        assert [run["run_id"] for run in await events.runs(1)] == ["run_new"]


@pytest.mark.alone
async def test_a_slow_reader_is_disconnected(sqlite_url: str, serve: Serve) -> None:
    """A client that reads nothing is disconnected once its queue is full; others do not wait."""
    facts = {"poll_url": "x" * 50_000}
    async with (
        serve(sqlite_url, limits=Limits(stream_queue=50, stream_readers=2)) as site,
        wire(site.base_url) as stuck,
        following(site.client) as events,
    ):
        await stuck.send(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: is_full(site))
        number = 0
        while await is_full(site):
            number += 1
            assert number < 60
            names = ids(f"run_{number}", 40)
            await site.services.writer.submit_all([seen(run, facts=facts) for run in names])
            assert sorted(run["run_id"] for run in await events.runs(40)) == names


async def test_a_reader_that_catches_up_is_sent_a_part_at_a_time() -> None:
    """Of what is queued, and shared with all readers, about `SEND_BYTES` are copied at a time."""
    reader = ChangeReader(RunFilter(), queue_size=10, on_close=lambda _: None)
    reader.go_live(0)
    entry = seen("run_1", facts={"poll_url": "x" * 100_000})
    record = apply(None, entry, policy=Policy(), durations_of=lambda _: None)
    assert record is not None
    change = Change(record, None)
    for _ in range(7):
        reader.offer(change)
    parts = [next_frames(reader) for _ in range(4) if await reader.wait(0.01)]
    assert [len(part) // len(frame_of(change)) for part in parts] == [3, 3, 1, 0]
    reader.end()
    assert not await reader.wait(0.01)


async def test_the_number_of_readers_is_limited(sqlite_url: str, serve: Serve) -> None:
    """One reader too many gets a 503 with `Retry-After`, until another one leaves."""
    async with (
        serve(sqlite_url, limits=Limits(stream_readers=2)) as site,
        following(site.client),
    ):
        async with following(site.client):
            refused = await site.client.get("/api/stream")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0

        async def has_room() -> bool:
            return not await is_full(site)

        await eventually(has_room)


async def test_a_change_is_read_once_for_all_readers(sqlite_url: str, serve: Serve) -> None:
    """Twenty readers cost the database as much as one."""
    async with serve(sqlite_url) as site, AsyncExitStack() as stack:
        site.services.changes.poll_seconds = 600  # only on signals
        readers = [await stack.enter_async_context(following(site.client)) for _ in range(20)]
        asked: list[str] = []

        def ask(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
            asked.append(statement)

        event.listen(site.services.database.engine.sync_engine, "before_cursor_execute", ask)
        await site.services.writer.submit_all([seen(run) for run in ids("run", 10)])
        for reader in readers:
            assert len(await reader.runs(10)) == 10
    assert len([each for each in asked if "run_events" in each]) <= 4
    assert len([each for each in asked if "FROM runs" in each]) <= 2


async def test_a_quiet_stream_sends_heartbeats(sqlite_url: str, serve: Serve) -> None:
    """Comments with the present position, also where no run matches."""
    async with (
        serve(sqlite_url, limits=Limits(stream_heartbeat=0.05)) as site,
        following(site.client, run_id="run_1") as events,
    ):
        await site.services.writer.submit(seen("run_2"))
        reading = asyncio.create_task(events.next(30))
        await eventually(lambda: events.comments > 1 and events.last_id == "1")
        await site.services.writer.submit(seen("run_1"))
        assert (await reading)["data"]["run"]["run_id"] == "run_1"


async def test_a_stream_ends_after_its_maximum_time(sqlite_url: str, serve: Serve) -> None:
    """A reader has to authenticate again; the stream ends as a complete answer."""
    async with (
        serve(sqlite_url, limits=Limits(stream_seconds=0.1)) as site,
        following(site.client) as events,
    ):
        assert await events.ended()


async def test_it_needs_the_token(sqlite_url: str, serve: Serve) -> None:
    """The stream needs a token like the rest of `/api`."""
    async with serve(sqlite_url, tracker_api_token="a-token-of-the-tests") as site:
        assert (await site.client.get("/api/stream")).status_code == 401
        site.client.headers["Authorization"] = "Bearer a-token-of-the-tests"
        async with following(site.client) as events:
            await site.services.writer.submit(seen("run_1"))
            assert len(await events.runs(1)) == 1


@pytest.mark.alone
async def test_the_service_stops_without_waiting_for_readers(sqlite_url: str) -> None:
    """When the process stops, each stream ends as a complete answer; a client that reads nothing is
    cut off."""
    settings = Settings(tracker_database_url=sqlite_url)
    async with (
        open_services(settings) as services,
        httpx.AsyncClient(timeout=20) as client,
        AsyncExitStack() as stack,
    ):
        async with serving(build_app(services), limits=Limits(unread_seconds=1)) as base_url:
            client.base_url = base_url
            events = await stack.enter_async_context(following(client))
            stuck = await stack.enter_async_context(wire(base_url))
            await stuck.send(b"GET /api/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            large = [seen(run, facts={"poll_url": "x" * 50_000}) for run in ids("run", 200)]
            await services.writer.submit_all(large)
            await events.runs(200)
            began = time.monotonic()
        assert time.monotonic() - began < 8
        assert await events.ended()


@pytest.mark.both_databases
async def test_a_database_that_comes_back_loses_nothing(database_url: str, serve: Serve) -> None:
    """A read that fails is repeated: changes made meanwhile are sent once it succeeds."""
    async with serve(database_url) as site, following(site.client) as events:
        site.services.changes.poll_seconds = 0.05
        real, failures = feed.events_after, 2

        async def failing(*arguments: Any, **named: Any) -> feed.EventPage:
            nonlocal failures
            if failures:
                failures -= 1
                raise StoreUnavailable("the database is down")
            return await real(*arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feed, "events_after", failing)
            await site.services.writer.submit(seen("run_1"))
            assert [run["run_id"] for run in await events.runs(1)] == ["run_1"]
