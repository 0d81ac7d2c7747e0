"""Late and repeated attempts over the real route: the last one still counts, the thousandth not."""

import asyncio
from datetime import timedelta

import pytest
import sqlalchemy as sa

from tests.store.test_rollups import assert_exact
from tests.web.callbacks import PATH, event, signature
from tests.web.conftest import Serve, Site
from tests.web.flora import with_flora
from tests.web.serving import post, wire
from tracker.core.clock import utc_now
from tracker.store.schema import deliveries, run_events, runs

ATTEMPTS = (0, 10, 70, 370)
"""Seconds from FLORA's first attempt at a callback to each of its four."""


def old(body: bytes, seconds: float) -> dict[str, str]:
    """The headers of an attempt that carries a signed time of so long ago."""
    return {"Flora-Signature": signature(body, at=utc_now() - timedelta(seconds=seconds))}


async def statuses(site: Site, body: bytes, *ages: float) -> list[int]:
    """How attempts at one callback are answered."""
    posts = [await site.client.post(PATH, content=body, headers=old(body, age)) for age in ages]
    return [answer.status_code for answer in posts]


async def test_the_last_attempt_is_taken_with_the_first_ones_time(small_site: Site) -> None:
    """FLORA may sign once for all four attempts: the fourth is over 370 seconds old, past the
    official SDK's window, and is the one that must not be refused."""
    assert await statuses(small_site, event("only_the_last_came"), 375) == [200]
    assert await statuses(small_site, event("all_four_came"), *ATTEMPTS) == [200] * 4
    async with small_site.services.database.read() as connection:
        rows = await connection.execute(sa.select(deliveries.c.run_id, deliveries.c.receipts))
        assert dict(rows.all()) == {"only_the_last_came": 1, "all_four_came": 4}


async def test_the_tolerance_is_what_is_set(
    serve: Serve, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is older is refused and leaves nothing, ahead of time too, and the log names the
    reason."""
    async with serve(sqlite_url) as site:
        assert await statuses(site, event("run_1"), 890, 910, -910) == [200, 401, 401]
    (said,) = [line for line in caplog.text.splitlines() if "callback.refused" in line]
    assert "expired" in said
    async with serve(sqlite_url, tracker_signature_tolerance=300) as site:
        assert await statuses(site, event("run_2"), 375) == [401]
        assert (await site.client.get("/api/runs/run_2")).status_code == 404


async def test_no_tolerance_is_any_time(serve: Serve, sqlite_url: str) -> None:
    """With 0 the signed time is not looked at; the signature is."""
    async with serve(sqlite_url, tracker_signature_tolerance=0) as site:
        assert await statuses(site, event("run_1"), 86_400 * 365, -86_400) == [200, 200]
        forged = {"Flora-Signature": signature(event("run_1"), "whsec_of_somebody_else")}
        answer = await site.client.post(PATH, content=event("run_1"), headers=forged)
        assert answer.status_code == 401


@pytest.mark.both_databases
@pytest.mark.alone
async def test_a_thousand_replays_have_one_effect(serve: Serve, database_url: str) -> None:
    """The same bytes with the same signature, over many connections at once: one delivery that
    counts them all, one line of timeline, one read of the run, and true rollups."""
    async with with_flora(serve, database_url, run_seconds=0.01) as (site, flora):
        body = event(flora.start().run_id)
        await flora.quiet()
        request = post(PATH, body, f"Flora-Signature: {old(body, 100)['Flora-Signature']}")

        async def replay(times: int) -> list[bytes]:
            async with wire(site.base_url) as connection:
                await connection.send(request * times)
                return [(await connection.answer()).body for _ in range(times)]

        answers: list[bytes] = []
        for _ in range(5):
            for some in await asyncio.gather(*(replay(8) for _ in range(25))):
                answers += some
        services = site.services
        await services.poller.poll_due()
        answers += await replay(1)
        assert await services.poller.next_due_at() is None
        async with services.database.read() as connection:
            (came,) = (await connection.execute(sa.select(deliveries.c.receipts))).scalars()
            told = (await connection.execute(sa.select(run_events.c.source))).scalars().all()
            (reads,) = (await connection.execute(sa.select(runs.c.checks))).scalars()
        assert came == 1001
        assert sum(b'"repeated":false' in one for one in answers) == 1
        assert (sorted(told), reads) == (["callback", "history"], 1)
        await assert_exact(services.database)
