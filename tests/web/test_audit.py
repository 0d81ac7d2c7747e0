"""The audit log: who did what, and who was refused."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select

from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, csrf_of, sign_in
from tests.web.flora import START, with_flora
from tracker.core.clock import utc_now
from tracker.operations.retention import ages
from tracker.settings import TokenSettings
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.audit import (
    MOST_ADDRESSES,
    OTHERS,
    Action,
    AuditRow,
    Principal,
    Refusals,
)
from tracker.store.schema import audit as audit_table
from tracker.store.schema import starts

TOKEN = "a-token-of-the-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": "order-17"}


async def _log(db: Database, action: Action | None = None) -> Sequence[AuditRow]:
    return (await audit.list_audit(db, action=action, limit=1000))[0]


async def test_a_start_is_noted_once_with_who_asked_for_it(serve: Serve, database_url: str) -> None:
    """The token's name, its address, the request and the key; a repeated key starts nothing."""
    async with with_flora(serve, database_url, token=TOKEN) as (site, _):
        body = START | {"idempotency_key": "order-17"}
        for status in (201, 200):
            answer = await site.client.post("/api/runs", json=body, headers=BEARER)
            assert answer.status_code == status
        wrong = body | {"inputs": [{"id": "prompt", "type": "text", "value": "another"}]}
        assert (await site.client.post("/api/runs", json=wrong, headers=BEARER)).status_code == 422
        (entry,) = await _log(site.services.database)
        assert (entry.action, entry.actor, entry.count) == ("start", "TRACKER_API_TOKEN", 1)
        assert (entry.address, entry.request_id) == ("127.0.0.1", "order-17")
        assert entry.detail["idempotency_key"] == "order-17"
        assert TOKEN not in json.dumps(entry.detail)


async def test_a_start_and_its_entry_are_kept_together_or_not_at_all(
    serve: Serve, database_url: str
) -> None:
    """Where the entry cannot be written no key is kept, and nothing is sent."""
    async with with_flora(serve, database_url, token=TOKEN) as (site, flora):
        await site.services.database.write(audit_table.drop)
        answer = await site.client.post("/api/runs", json=START, headers=BEARER)
        assert answer.status_code >= 500
        async with site.services.database.read() as connection:
            kept = await connection.scalar(select(func.count()).select_from(starts))
        assert (kept, len(flora.world.runs)) == (0, 0)


async def test_what_people_do_is_noted(serve: Serve, database_url: str) -> None:
    """A sign-in, a replay from a page, a sign-out; by the token's name."""
    async with serve(database_url, tracker_api_token=TOKEN) as site:
        db = site.services.database
        odd = event("run_1", type="run.paused")
        assert (await site.client.post(PATH, content=odd, headers=signed(odd))).status_code == 200
        await site.services.applier.drain()
        assert (await sign_in(site.client)).status_code == 303
        page = await site.client.get("/audit", headers=HTML)
        csrf = {"csrf_token": csrf_of(page.text)}
        await site.client.post("/deliveries/whd_run_1/replay", data=csrf, headers=HTML)
        await site.client.post("/logout", data=csrf)
        entries = await _log(db)
        assert [one.action for one in entries] == ["sign_out", "replay", "sign_in"]
        assert {one.actor for one in entries} == {"TRACKER_API_TOKEN"}
        assert all(one.address == "127.0.0.1" and one.request_id for one in entries)
        assert entries[1].detail["delivery_id"] == "whd_run_1"
        assert "neither run.completed nor" in entries[1].detail["still_quarantined"]


async def test_callbacks_leave_no_entry(site: Site) -> None:
    """Neither good ones nor forged ones: nothing is added to their way."""
    body = event("run_1")
    assert (await site.client.post(PATH, content=body, headers=signed(body))).status_code == 200
    assert (await site.client.post(PATH, content=body)).status_code == 401
    await site.services.refusals.store()
    assert await _log(site.services.database) == []


async def test_a_starts_callback_address_is_not_noted(
    serve: Serve, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a proxy should have taken a prefix off the path, its callbacks are refused; what makes
    the address a secret is neither in the audit log nor in the log."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        answer = await site.client.post(f"/flora{PATH}/the-token-of-a-start", content=b"{}")
        assert not answer.is_success
        await site.services.refusals.store()
        (entry,) = await _log(site.services.database)
        assert entry.detail["path"] == f"/flora{PATH}/*"
    assert "auth.refused" in caplog.text
    assert "the-token-of-a-start" not in caplog.text


@pytest.mark.both_databases
async def test_a_flood_of_guesses_is_one_entry(serve: Serve, database_url: str) -> None:
    """With their number and reasons, and no guess; a token that lacks a scope is named."""
    reader = TokenSettings(name="reader", token="r" * 20, scopes={"read"})
    async with serve(database_url, tracker_api_token=TOKEN, tokens=(reader,)) as site:
        for number in range(40):
            guess = {"Authorization": f"Bearer guess-number-{number:08}"}
            assert (await site.client.get("/api/runs", headers=guess)).status_code in (401, 429)
            if number == 20:
                await site.services.refusals.store()
        known = {"Authorization": f"Bearer {'r' * 20}"}
        assert (await site.client.get("/audit", headers=known)).status_code == 403
        await site.services.refusals.store()
        entries = await _log(site.services.database)
        assert all(one.action == "refused" for one in entries)
        guessed = [one for one in entries if one.actor == audit.ANONYMOUS]
        assert len(guessed) <= 2  # the minute may end between them
        assert sum(one.count for one in guessed) == 40
        assert sum(one.detail["reasons"]["wrong"] for one in guessed) == 40
        assert "guess-number" not in json.dumps([one.detail for one in entries])
        (named,) = [one for one in entries if one.actor == "reader"]
        assert (named.detail["reasons"], named.detail["path"]) == ({"scope": 1}, "/audit")


@pytest.mark.both_databases
async def test_a_flood_from_everywhere_is_bounded(database_url: str) -> None:
    """Each address has one entry a minute, in all processes together, and beyond a hundred of them
    all share one. Each begins anew with the next minute."""
    now = utc_now().replace(second=30)
    async with await Database.open(database_url) as db:
        async with Refusals(db, clock=lambda: now) as one, Refusals(db, clock=lambda: now) as two:
            for refusals in (one, two):
                for number in range(5 * MOST_ADDRESSES):
                    for _ in range(3):
                        address = f"10.0.{number // 256}.{number % 256}"
                        refusals.add("wrong", address=address, actor=None, request_id=None)
                await refusals.store()
        entries = await _log(db)
        assert len(entries) == MOST_ADDRESSES + 1
        assert {row.count for row in entries if row.address != OTHERS} == {6}
        assert sum(row.count for row in entries) == 2 * 3 * 5 * MOST_ADDRESSES
        now += timedelta(minutes=1)
        async with Refusals(db, clock=lambda: now) as one:
            one.add("wrong", address="10.0.0.1", actor=None, request_id=None)
        assert len(await _log(db)) == MOST_ADDRESSES + 2


async def test_what_could_not_be_stored_is_stored_later(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage of the database loses no count."""
    from tracker.core.errors import StoreUnavailable

    async with await Database.open(database_url) as db:
        refusals = Refusals(db, clock=utc_now)
        refusals.add("wrong", address="10.0.0.1", actor=None, request_id=None)

        async def down(*_: Any) -> None:
            refusals.add("missing", address="10.0.0.1", actor=None, request_id=None)
            raise StoreUnavailable("away")

        with monkeypatch.context() as patched:
            patched.setattr(Database, "write", down)
            with pytest.raises(StoreUnavailable):
                await refusals.store()
        async with refusals:
            pass
        assert sum(row.count for row in await _log(db)) == 2


async def test_a_prune_is_noted_and_takes_old_entries(site: Site) -> None:
    """What is a year old goes; the prune itself stays, with what it removed."""
    db = site.services.database
    now = site.services.clock()
    with audit.acting(Principal(name="cli:alice")):
        for days in (400, 300):
            await audit.write(db, audit.entry(Action.REPLAY, now - timedelta(days=days)))
        chosen = ages(
            timedelta(days=90),
            **dict.fromkeys(("bodies", "quarantined", "keys"), None),
            first_sweep=timedelta(days=7),
        )
        assert (await site.services.pruner.prune(chosen, dry=True))["audit"] == 1
        assert (await site.services.pruner.prune(chosen))["audit"] == 1
    newest, older = await _log(db)
    assert (newest.action, newest.actor, older.action) == ("prune", "cli:alice", "replay")
    assert newest.detail["removed"] == {"audit": 1}
    assert newest.detail["older_than"]["runs"] == "90d"


async def test_a_resolution_is_noted_with_its_outcome(serve: Serve, database_url: str) -> None:
    """Who said that nothing was started."""
    from tracker.store.queries import starts as start_log

    async with serve(database_url) as site:
        services, now = site.services, site.services.clock()
        row = await start_log.reserve(
            services.database,
            start_log.StartRow(
                workspace_id="ws_1",
                idempotency_key="order-1",
                technique_id="tech_1",
                fingerprint="0",
                inputs=[],
                created_at=now,
            ),
        )
        of = (services.database, "ws_1", "order-1")
        await start_log.take(*of, "tests", now, timedelta(minutes=1))
        unresolved = start_log.StartState.UNRESOLVED
        marked = await start_log.mark(*of, holder="tests", state=unresolved, error=None)
        await start_log.give_back(*of, "tests")
        with audit.acting(Principal(name="cli:alice")):
            await services.resolver.is_nothing(marked or row)
        (entry,) = await _log(services.database, Action.RESOLVE)
        assert (entry.actor, entry.detail["idempotency_key"]) == ("cli:alice", "order-1")
        assert entry.detail["outcome"] == "nothing was started"


@pytest.mark.both_databases
async def test_the_log_is_read_page_by_page(database_url: str) -> None:
    """Newest first, each entry once; a cursor from elsewhere is refused."""
    from tracker.core.errors import InvalidRequest
    from tracker.store.queries import paging

    now = utc_now()
    async with await Database.open(database_url) as db:
        for number in range(7):  # two of each moment
            await audit.write(db, audit.entry(Action.REPLAY, now + timedelta(seconds=number // 2)))
        seen: list[int] = []
        cursor = None
        while True:
            rows, cursor = await audit.list_audit(db, cursor=cursor, limit=3)
            seen += [row.id for row in rows]
            if cursor is None:
                break
        assert seen == sorted(seen, reverse=True)
        assert len(seen) == 7
        assert len((await audit.list_audit(db, since=now + timedelta(seconds=2), limit=9))[0]) == 3
        for last in ("x", str(2**70)):
            with pytest.raises(InvalidRequest):
                await audit.list_audit(db, cursor=paging.cursor_at(now, last), limit=3)


async def test_the_page_is_for_administrators(serve: Serve, sqlite_url: str) -> None:
    """It shows who works from where: a token that only reads is not shown it, nor the way to it."""
    reader = TokenSettings(name="reader", token="r" * 20, scopes={"read"})
    async with serve(sqlite_url, tracker_api_token=TOKEN, tokens=(reader,)) as site:
        for token, status in ((TOKEN, 200), ("r" * 20, 403)):
            async with site.another(headers=HTML) as client:
                await sign_in(client, token)
                page = await client.get("/audit")
                assert page.status_code == status
                start = await client.get("/runs")
                assert ('href="/audit"' in start.text) is (status == 200)
        async with site.another(headers=HTML) as client:
            await sign_in(client)
            page = await client.get("/audit", params={"action": "sign_in"})
            assert "reader" in page.text
            assert (await client.get("/audit?action=nothing")).status_code == 400
