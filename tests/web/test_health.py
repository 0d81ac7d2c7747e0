"""`/healthz` and `/readyz`, and what is said while the database is away."""

import asyncio

import asyncpg
import httpx
import pytest
from sqlalchemy import delete

from tests.support.disk import CannotMount, SmallDisk
from tests.support.postgres import PostgresServer
from tests.support.scraping import scrape
from tests.support.waiting import eventually
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve, Site
from tests.web.serving import serving
from tracker.simulator import Options, running
from tracker.store.schema import leases
from tracker.web.app import build_health_app
from tracker.web.http import Limits


async def test_a_process_that_serves_says_so(site: Site) -> None:
    """With nothing asked of anybody else."""
    answer = await site.client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_a_service_whose_database_is_there_is_ready(site: Site) -> None:
    """200; that no key is set is said, and does not make it unready."""
    answer = await site.client.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ready", "flora": "no key is set"},
    )


async def test_a_database_without_the_newest_migration_is_not_ready(site: Site) -> None:
    """503, and what to do about it."""
    await site.services.database.write(
        lambda connection: connection.exec_driver_sql("DELETE FROM alembic_version")
    )
    answer = await site.client.get("/readyz")
    assert answer.status_code == 503
    assert "tracker db upgrade" in answer.json()["error"]["message"]


async def test_a_full_disk_is_not_ready(serve: Serve) -> None:
    """It can be read, so what shows it is the last write: `/readyz` and the metrics say so until
    one can be committed again, also where nothing else writes."""
    body = event("run_" + "x" * 4000)
    try:
        with SmallDisk(16) as disk:
            async with serve(f"sqlite:///{disk.path}/tracker.db") as site:
                assert (await site.client.get("/readyz")).status_code == 200
                site.services.inbox._deadline = 0.5
                site.services.metrics._gauges.keep_seconds = 0  # type: ignore[union-attr]
                disk.fill()
                answer = await site.client.post(PATH, content=body, headers=signed(body))
                assert answer.status_code == 503
                assert (await site.client.get("/readyz")).status_code == 503
                found = await scrape(site.client)
                assert found.value("tracker_database_up") == 0
                assert found.value("tracker_runs_due") == 0
                disk.clear()
                assert (await site.client.get("/readyz")).status_code == 200
                assert (await scrape(site.client)).value("tracker_database_up") == 1
    except CannotMount as error:
        pytest.skip(str(error))


async def test_a_disk_that_fills_while_nothing_writes_is_not_ready(serve: Serve) -> None:
    """Writes that change no row, such as a worker's that finds nothing due, are committed all the
    same: a row that is stored every ten seconds shows that the disk is full."""
    try:
        with SmallDisk(16) as disk:
            async with serve(f"sqlite:///{disk.path}/tracker.db") as site:
                db = site.services.database
                nothing = delete(leases).where(leases.c.name == "none")
                for _ in range(2):
                    db.writes_checked_at -= 60
                    assert (await site.client.get("/readyz")).status_code == 200
                disk.fill()
                assert (await site.client.get("/readyz")).status_code == 200
                db.writes_checked_at -= 60
                for _ in range(2):
                    await db.execute(nothing)
                    assert (await site.client.get("/readyz")).status_code == 503
                disk.clear()
                assert (await site.client.get("/readyz")).status_code == 200
    except CannotMount as error:
        pytest.skip(str(error))


async def test_a_refused_key_is_reported_and_the_service_stays_ready(
    serve: Serve, sqlite_url: str
) -> None:
    """Callbacks are still taken, so no load balancer has to act; people see since when."""
    async with (
        running(Options()) as flora,
        serve(
            sqlite_url,
            flora_base_url=flora.base_url,
            flora_api_key="sk_test_revoked",
            flora_workspace_id="ws_1",
        ) as site,
    ):
        assert (await site.client.get("/readyz")).json()["flora"] == "not asked yet (ws_1)"
        start = {"technique": "tech_1", "inputs": [{"id": "a", "type": "text", "value": "v"}]}
        answer = await site.client.post("/api/runs", json=start)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "flora_key_refused")
        ready = await site.client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["flora"].startswith("key refused since 20")
        assert "ws_1" in ready.json()["flora"]
        assert "sk_test" not in ready.text + answer.text


async def test_the_service_outlives_its_database(
    serve: Serve, own_postgres: PostgresServer
) -> None:
    """503 with `Retry-After` everywhere while it is down; all is well by itself when it is back."""
    body = event()
    async with serve(own_postgres.url("tracker")) as site:
        assert (await site.client.post(PATH, content=body, headers=signed(body))).status_code == 200
        await site.services.applier.drain()
        await asyncio.to_thread(own_postgres.stop)
        site.services.inbox._deadline = 0.5
        answers = await asyncio.gather(
            site.client.get("/readyz"),
            site.client.get("/api/runs"),
            site.client.get("/api/runs/run_1"),
            site.client.post(PATH, content=event("run_3"), headers=signed(event("run_3"))),
        )
        for answer in answers:
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "service_unavailable"
            assert int(answer.headers["Retry-After"]) > 0
        # Anybody may ask whether it is ready, and learns nothing of where the database is.
        assert answers[0].json()["error"]["message"].startswith("the database ")
        assert ":" not in answers[0].json()["error"]["message"]
        assert (await site.client.get("/healthz")).status_code == 200
        await asyncio.to_thread(own_postgres.start)

        async def back() -> bool:
            return (await site.client.get("/readyz")).status_code == 200

        await eventually(back)

        async def taken_again() -> bool:
            again = await site.client.post(PATH, content=body, headers=signed(body))
            return again.status_code == 200 and again.json()["repeated"] is True

        await eventually(taken_again)
        assert (await site.client.get("/api/runs/run_1")).status_code == 200


async def test_a_database_that_hangs_is_not_ready_after_a_bounded_time(
    serve: Serve, postgres_url: str
) -> None:
    """However many ask, all are answered, and soon; once it answers again it is ready."""
    async with serve(postgres_url, limits=Limits(ready_seconds=0.1)) as site:

        async def is_ready() -> bool:
            return (await site.client.get("/readyz")).status_code == 200

        blocker = await asyncpg.connect(postgres_url)
        try:
            await blocker.execute("BEGIN; LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")
            answers = await asyncio.gather(*(site.client.get("/readyz") for _ in range(20)))
            assert {answer.status_code for answer in answers} == {503}
        finally:
            await blocker.close()
        await eventually(is_ready)


async def test_a_process_that_only_works_shows_its_health_alone(small_site: Site) -> None:
    """In the same shape as the whole service, and nothing else of it."""
    app = build_health_app(small_site.services)
    async with serving(app) as base_url, httpx.AsyncClient(base_url=base_url) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).json()["status"] == "ready"
        await small_site.services.database.write(
            lambda connection: connection.exec_driver_sql("DELETE FROM alembic_version")
        )
        unready = await client.get("/readyz")
        assert (unready.status_code, unready.json()["error"]["code"]) == (
            503,
            "service_unavailable",
        )
        for path in ("/api/runs", PATH):
            assert (await client.post(path)).status_code == 404


async def test_readiness_is_json_for_machines(small_site: Site) -> None:
    """Like everything else here."""
    answer: httpx.Response = await small_site.client.get("/readyz")
    assert answer.headers["Content-Type"] == "application/json"
