"""`POST /callbacks/flora`: what is answered is what was kept."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy

from tests.support.deliveries import applied
from tests.support.waiting import eventually, let_pass
from tests.web.callbacks import PATH, SECRET, event, signature, signed
from tests.web.conftest import Serve, Site
from tests.web.serving import Wire, chunk, post, wire
from tracker.core.errors import StoreError
from tracker.store.engine import Database
from tracker.store.schema import deliveries
from tracker.web.http import Limits

pytestmark = pytest.mark.served_twice

LIMIT = 256 * 1024


async def stored(database: Database) -> list[dict[str, Any]]:
    """All deliveries, oldest first."""
    async with database.read() as connection:
        rows = await connection.execute(
            sqlalchemy.select(deliveries).order_by(deliveries.c.received_at)
        )
        return [dict(row) for row in rows.mappings()]


async def test_a_signed_callback_is_kept_and_ends_its_run(site: Site) -> None:
    """The delivery is there when the answer is, and its effect soon after."""
    body = event("run_1")
    answer = await site.client.post(PATH, content=body, headers=signed(body))
    assert answer.status_code == 200
    assert answer.json() == {"outcome": "waiting", "repeated": False}
    (delivery,) = await stored(site.services.database)
    assert (delivery["delivery_id"], delivery["body"]) == ("whd_run_1", body)
    await applied(site.services.database)
    run = (await site.client.get("/api/runs/run_1")).json()
    assert (run["status"], run["ended_via"], run["tracking"]) == ("completed", "callback", "active")


async def test_a_repeated_callback_only_counts(site: Site) -> None:
    """Each attempt of FLORA's is answered 200, and there is one delivery with its receipts."""
    body = event("run_1")
    answers = [await site.client.post(PATH, content=body, headers=signed(body)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.json()["repeated"] for answer in answers] == [False, True, True]
    (delivery,) = await stored(site.services.database)
    assert delivery["receipts"] == 3
    await applied(site.services.database)
    events = (await site.client.get("/api/runs/run_1/events")).json()["events"]
    assert len(events) == 1


async def test_an_address_with_a_token_is_taken_as_the_plain_one(small_site: Site) -> None:
    """A token that is not known changes nothing: what is signed is kept, what is not is refused."""
    body = event("run_1")
    path = f"{PATH}/a-token-nobody-knows"
    assert (await small_site.client.post(path, content=body)).status_code == 401
    assert (await small_site.client.post(path, content=body, headers=signed(body))).is_success
    (delivery,) = await stored(small_site.services.database)
    assert delivery["run_id"] == "run_1"
    for number, odd in enumerate(("%00", "%ED%A0%80", "%ff", "x" * 65, "a%20b", "%C3%A9")):
        body = event(f"run_odd_{number}")
        answer = await small_site.client.post(f"{PATH}/{odd}", content=body, headers=signed(body))
        assert answer.is_success, odd
    assert {row["callback_token"] for row in await stored(small_site.services.database)} == {
        None,
        "a-token-nobody-knows",
    }
    answer = await small_site.client.post(f"{PATH}/a/b", content=body, headers=signed(body))
    assert answer.status_code == 404


async def test_a_slash_at_the_end_changes_nothing(small_site: Site) -> None:
    """Whoever starts a run elsewhere may type the address so, and FLORA follows no redirect."""
    for path in (f"{PATH}/", f"{PATH}/a-token/"):
        body = event(f"run_{len(path)}")
        assert (await small_site.client.post(path, content=body)).status_code == 401
        assert (await small_site.client.post(path, content=body, headers=signed(body))).is_success
    tokens = {row["callback_token"] for row in await stored(small_site.services.database)}
    assert tokens == {None, "a-token"}


async def test_many_callbacks_at_once_are_all_kept(site: Site) -> None:
    """Nothing that comes at the same moment is lost or answered for another."""
    bodies = [event(f"run_{number}") for number in range(50)]
    answers = await asyncio.gather(
        *(site.client.post(PATH, content=body, headers=signed(body)) for body in bodies)
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len(await stored(site.services.database)) == 50


async def test_what_is_not_understood_is_kept_and_answered_2xx(site: Site) -> None:
    """FLORA need not send again what it did sign, however strange."""
    for body in (b"", b"\xff\x00 no JSON", b"[" * 100_000, b'{"type":"run.sung"}'):
        answer = await site.client.post(PATH, content=body, headers=signed(body))
        assert (answer.status_code, answer.json()["outcome"]) == (200, "waiting")
    await applied(site.services.database)
    rows = await stored(site.services.database)
    assert {row["outcome"] for row in rows} == {"quarantined"}
    assert len(rows) == 4


async def test_an_unsigned_callback_is_refused_and_leaves_nothing(small_site: Site) -> None:
    """401 in FLORA's shape, whatever is wrong with the signature; nothing is stored."""
    foreign = signature(event("run_1"), "whsec_of_somebody_else")
    of_another_body = signature(event("run_2"))
    for value in (None, "", "t=1,v1=zz", "é" * 5000, foreign, of_another_body):
        headers = {} if value is None else {"Flora-Signature": value.encode("latin-1")}
        answer = await small_site.client.post(PATH, content=event("run_1"), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert await stored(small_site.services.database) == []


async def test_a_forged_callback_is_verified_once(small_site: Site) -> None:
    """Anyone may send one: it costs one digest of its body, after which new secrets are looked
    for."""
    looked = []

    def find_new_secrets() -> bool:
        looked.append(True)
        return False

    small_site.services.receiver.find_new_secrets = find_new_secrets
    forged = event("run_1")
    answer = await small_site.client.post(PATH, content=forged, headers=signed(forged, "whsec_x"))
    assert answer.status_code == 401
    assert looked == [True]


async def test_one_of_several_secrets_is_enough(serve: Serve, sqlite_url: str) -> None:
    """While a secret is rotated both are taken, and a header that came in two parts is one."""
    old, new = "whsec_old", "whsec_new"
    async with serve(sqlite_url, flora_webhook_secret=f"{old},{new}") as site:
        for secret in (old, new):
            body = event(secret)
            answer = await site.client.post(PATH, content=body, headers=signed(body, secret))
            assert answer.status_code == 200
        body = event("split")
        time, _, value = signature(body, new).partition(",")
        headers = [("Flora-Signature", f"{time},v1={'0' * 64}"), ("Flora-Signature", value)]
        assert (await site.client.post(PATH, content=body, headers=headers)).status_code == 200


async def test_without_a_secret_nothing_is_taken(serve: Serve, sqlite_url: str) -> None:
    """503, so that FLORA tries again once it is set; the answer does not say what is missing."""
    async with serve(sqlite_url, flora_webhook_secret=()) as site:
        body = event()
        answer = await site.client.post(PATH, content=body, headers=signed(body))
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert "FLORA_WEBHOOK_SECRET" not in answer.text
        assert await stored(site.services.database) == []


async def test_another_method_is_refused_with_what_is_allowed(small_site: Site) -> None:
    """405 and `Allow`, in FLORA's shape."""
    for method in ("GET", "PUT", "DELETE"):
        answer = await small_site.client.request(method, PATH)
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
        assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_a_body_of_just_the_limit_is_taken(small_site: Site) -> None:
    """256 KiB fit."""
    body = b" " * LIMIT
    answer = await small_site.client.post(PATH, content=body, headers=signed(body))
    assert answer.status_code == 200


async def test_a_longer_body_is_refused_with_and_without_a_length(small_site: Site) -> None:
    """One byte more is a 413, whether it was announced or only comes."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 4096):
            yield body[start : start + 4096]

    body = b" " * (LIMIT + 1)
    for content in (body, pieces()):
        answer = await small_site.client.post(PATH, content=content, headers=signed(body))
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "payload_too_large"
    assert await stored(small_site.services.database) == []


@pytest.mark.alone
async def test_an_announced_length_over_the_limit_is_refused_unread(
    serve: Serve, sqlite_url: str
) -> None:
    """No byte of the body has to be sent for that, and the connection does not stay open."""
    async with (
        serve(sqlite_url, limits=Limits(linger_seconds=60)) as site,
        wire(site.base_url) as connection,
    ):
        await connection.send(post(PATH, b"", "Expect: 100-continue", length=LIMIT + 1))
        answer = await connection.answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        await connection.send(b" " * (LIMIT + 1))
        assert await connection.hung_up()


@pytest.mark.alone
async def test_a_body_without_a_length_is_refused_while_it_still_comes(
    serve: Serve, sqlite_url: str
) -> None:
    """The answer comes after the limit, not after the last byte, of which there may be none."""
    async with (
        serve(sqlite_url, limits=Limits(linger_seconds=0.05)) as site,
        wire(site.base_url, may_reset=True) as connection,
    ):
        await connection.send(post(PATH, b"", "Transfer-Encoding: chunked"))
        for _ in range(LIMIT // 65536 + 1):
            await connection.send(chunk(b" " * 65536))
        assert (await connection.answer()).status == 413
        assert await connection.hung_up()


@pytest.mark.alone
async def test_a_length_that_lies_short_does_not_smuggle_the_rest_in(small_site: Site) -> None:
    """What comes beyond the announced length is no part of the body, and no request either."""
    body = event()
    async with wire(small_site.base_url) as connection:
        head = f"Flora-Signature: {signature(body)}"
        await connection.send(post(PATH, body, head, length=len(body) - 5))
        assert (await connection.answer()).status in (400, 401)
        assert await connection.hung_up()
    assert await stored(small_site.services.database) == []


@pytest.mark.alone
async def test_a_client_that_leaves_in_the_middle_leaves_nothing(small_site: Site) -> None:
    """Half a callback is none, and the next one is served as ever."""
    body = event("run_1")
    for leave in (Wire.close, Wire.cut):
        async with wire(small_site.base_url) as connection:
            head = f"Flora-Signature: {signature(body)}"
            await connection.send(post(PATH, body[:20], head, length=len(body)))
            leave(connection)
    other = event("run_2")
    answer = await small_site.client.post(PATH, content=other, headers=signed(other))
    assert answer.status_code == 200
    assert [row["run_id"] for row in await stored(small_site.services.database)] == ["run_2"]


@pytest.mark.alone
async def test_a_body_that_does_not_come_is_waited_for_in_vain_only_so_long(
    serve: Serve, sqlite_url: str
) -> None:
    """A slow sender gets a 408 and loses its connection."""
    body = event()
    async with (
        serve(sqlite_url, limits=Limits(callback_seconds=0.1)) as site,
        wire(site.base_url) as connection,
    ):
        await connection.send(post(PATH, body[:1], length=len(body)))
        answer = await connection.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert b"request_timeout" in answer.body
        assert await connection.hung_up()


@pytest.mark.alone
async def test_pipelined_callbacks_are_answered_in_order(small_site: Site) -> None:
    """Several requests in one packet are so many deliveries, and each answer is its own."""
    bodies = [event("run_1"), event("run_2"), event("run_1")]
    requests = [post(PATH, body, f"Flora-Signature: {signature(body)}") for body in bodies]
    async with wire(small_site.base_url) as connection:
        await connection.send(*requests)
        answers = [await connection.answer() for _ in bodies]
    assert [answer.status for answer in answers] == [200] * 3
    assert [b'"repeated":true' in answer.body for answer in answers] == [False, False, True]


@pytest.mark.alone
async def test_an_old_client_is_served_and_let_go(small_site: Site) -> None:
    """HTTP/1.0 without a `Host` is enough for a callback."""
    body = event()
    lines = f"POST {PATH} HTTP/1.0\r\nFlora-Signature: {signature(body)}\r\n"
    async with wire(small_site.base_url) as connection:
        await connection.send(f"{lines}Content-Length: {len(body)}\r\n\r\n".encode(), body)
        assert (await connection.answer()).status == 200
        assert await connection.hung_up()


@contextmanager
def _sqlite_held(url: str) -> Iterator[None]:
    import sqlite3

    connection = sqlite3.connect(Path(url.removeprefix("sqlite:///")), isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.close()


@asynccontextmanager
async def _held(url: str) -> AsyncIterator[None]:
    """For as long as the block lasts, nobody can write to the database."""
    if url.startswith("sqlite"):
        with _sqlite_held(url):
            yield
        return
    connection = await asyncpg.connect(url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE deliveries IN ACCESS EXCLUSIVE MODE")
        yield
    await connection.close()


@pytest.mark.both_databases
async def test_what_cannot_be_committed_in_time_is_a_503_and_is_taken_later(
    serve: Serve, database_url: str
) -> None:
    """While the database is blocked FLORA is told to come back; afterwards it is taken."""
    body = event()
    async with serve(database_url) as site:
        site.services.inbox._deadline = 0.5
        async with _held(database_url):
            answer = await site.client.post(PATH, content=body, headers=signed(body))
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.json()["error"]["code"] == "service_unavailable"

        async def taken() -> bool:
            again = await site.client.post(PATH, content=body, headers=signed(body))
            return again.status_code == 200

        await eventually(taken)
        assert len(await stored(site.services.database)) == 1


async def test_what_the_database_refuses_is_a_503(
    small_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not stored, and may be when FLORA sends it again."""

    def receive(*_: object, **__: object) -> None:
        raise StoreError("no such column")

    body = event()
    with monkeypatch.context() as patched:
        patched.setattr(small_site.services.receiver, "receive", receive)
        answer = await small_site.client.post(PATH, content=body, headers=signed(body))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json()["error"]["message"] == "The callback could not be stored."
    again = await small_site.client.post(PATH, content=body, headers=signed(body))
    assert again.json() == {"outcome": "waiting", "repeated": False}


async def test_a_callback_that_waits_too_long_for_its_commit_is_a_503(
    serve: Serve, sqlite_url: str
) -> None:
    """Although the inbox waits longer: FLORA does not."""

    async def in_parts() -> AsyncIterator[bytes]:
        yield body

    body = event()
    async with (
        serve(sqlite_url) as site,
        _held(sqlite_url),
        site.another(timeout=None) as client,
    ):
        site.services.inbox._deadline = 3600.0
        posting = asyncio.create_task(client.post(PATH, content=in_parts(), headers=signed(body)))
        await eventually(lambda: site.services.inbox.waiting)
        let_pass(Limits().callback_seconds)
        answer = await posting
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    error = answer.json()["error"]
    assert error["code"] == "service_unavailable"
    assert error["message"] == "The callback could not be committed in time."


async def test_refused_callbacks_do_not_fill_the_log(
    small_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Endless forged posts leave a log line now and then, and never a signature."""
    body = event()
    forged = signed(body, "whsec_of_somebody_else")
    for _ in range(20):
        await small_site.client.post(PATH, content=body, headers=forged)
    assert caplog.text.count("callback.refused") == 1
    assert forged["Flora-Signature"] not in caplog.text
    assert SECRET not in caplog.text
