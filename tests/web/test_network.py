"""What a network and its clients do to connections: slow, silent, many, without a length, ahead."""

import asyncio
import contextlib
import random
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.e2e.processes import open_sandbox
from tests.support.waiting import eventually
from tests.web.callbacks import PATH, event, signature, signed
from tests.web.conftest import Serve, Site
from tests.web.serving import Answer, Wire, chunk, post, serving, wire
from tracker.web.http import Limits
from tracker.web.http import connection as connections

pytestmark = pytest.mark.alone

SECRET = "whsec_simulator"  # of the processes of `tests.e2e`
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
HASTY = Limits(head_seconds=0.3, callback_seconds=1)
CONNECTIONS = 2000


async def trickle(connection: Wire, begin: bytes, rest: bytes) -> Answer | None:
    """Sends `begin`, then a byte of `rest` ten times a second, until an answer or the end comes."""
    await connection.send(begin)

    async def drip() -> None:
        for byte in rest:
            await connection.send(bytes([byte]))
            await asyncio.sleep(0.1)

    dripping = asyncio.create_task(drip())
    try:
        return await connection.answer()
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    finally:
        dripping.cancel()


async def test_a_client_that_sends_byte_by_byte_is_cut_off(serve: Serve, sqlite_url: str) -> None:
    """Whatever a client leaves unfinished ends by itself, and is told so where it has asked."""
    body = event()
    headers = f"Flora-Signature: {signature(body)}"
    unfinished = {
        "head": (GET, b"X-Slow: " + 100 * b"a"),
        "body": (post(PATH, b"", headers, length=len(body)), body),
        "chunk": (post(PATH, b"", headers, "Transfer-Encoding: chunked") + b"ff\r\n", body),
        "size": (post(PATH, b"", headers, "Transfer-Encoding: chunked"), 100 * b"0"),
    }
    async with serve(sqlite_url, limits=HASTY) as site, contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(wire(site.base_url)) for _ in unfinished]
        ends = await asyncio.gather(*map(trickle, slow, *zip(*unfinished.values(), strict=True)))
        assert {name: end and end.status for name, end in zip(unfinished, ends, strict=True)} == {
            "head": 408,
            "body": 408,
            "chunk": 408,
            "size": 408,
        }
        assert {end.headers["connection"] for end in ends if end} == {"close"}
        assert (await site.client.get("/api/runs")).json()["runs"] == []


async def test_a_silent_client_is_disconnected(
    small_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence from the first or after an answer, and what trickles in of a body that nobody reads,
    end after the idle time; who goes on asking stays."""
    checked: list[Any] = []
    check = connections.ConnectionPool.check

    def note(*which: Any) -> None:
        checked[:] = which
        check(*which)

    monkeypatch.setattr(connections.ConnectionPool, "check", note)
    pool, its_connections, now = await eventually(lambda: checked)
    monkeypatch.setattr(connections.ConnectionPool, "check", lambda *_: None)  # but for the test's
    async with (
        wire(small_site.base_url) as silent,
        wire(small_site.base_url) as answered,
        wire(small_site.base_url) as unread,
        wire(small_site.base_url) as asking,
    ):
        await answered.send(GET, b"\r\n")
        await unread.send(GET, b"Content-Length: 1000\r\n\r\n")
        for connection in (answered, unread):
            assert (await connection.answer()).status == 200
        trickled = asyncio.create_task(trickle(unread, b"", 100 * b"x"))
        for _ in range(3):
            await asking.send(GET, b"\r\n")
            assert (await asking.answer()).status == 200
            check(pool, its_connections, now)
            now += Limits().idle_seconds * 2 / 3
            check(pool, its_connections, now)
        assert await asyncio.gather(silent.hung_up(), answered.hung_up(), trickled) == [
            True,
            True,
            None,
        ]
        await asking.send(GET, b"\r\n")
        assert (await asking.answer()).status == 200


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in parts"])
async def test_a_head_has_a_bound(small_site: Site, at_once: bool) -> None:
    """A head of 32 KiB is taken, a longer one is a 431, however it is cut into packets."""
    line = b"X-Long: " + 8000 * b"a" + b"\r\n"
    for lines, status in ((4, 200), (5, 431)):
        async with wire(small_site.base_url) as connection:
            if at_once:
                await connection.send(GET, lines * line, b"\r\n")
            else:
                for part in (GET, *(lines * [line])):
                    await connection.send(part)
                    await asyncio.sleep(0)
                await connection.send(b"\r\n")
            assert (await connection.answer()).status == status


async def test_a_body_counts_for_no_head(small_site: Site) -> None:
    """A callback of just the size that is allowed comes through with its head in one packet."""
    padding = 256 * 1024 - len(event(padding=""))
    body = event(padding=padding * "x")
    async with wire(small_site.base_url) as connection:
        await connection.send(post(PATH, body, f"Flora-Signature: {signature(body)}"))
        assert (await connection.answer()).status == 200


async def test_what_frames_a_body_has_a_bound(small_site: Site) -> None:
    """Chunk extensions and trailers without an end are cut off, not kept."""
    for endless in (b"1;" + 500_000 * b"x", b"0\r\n" + 60 * (b"X-Long: " + 8000 * b"a" + b"\r\n")):
        async with wire(small_site.base_url) as connection, asyncio.timeout(7):
            await connection.send(post(PATH, b"", "Transfer-Encoding: chunked"), endless)
            # The connection may be cut with the rest unread, and then takes the answer with it.
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await connection.answer()).status == 431
                assert await connection.hung_up()


async def test_a_body_without_length_in_the_smallest_parts(small_site: Site) -> None:
    """A callback of one-byte chunks, each in a packet of its own, is taken."""
    body = event("run_chunks")
    head = post(PATH, b"", f"Flora-Signature: {signature(body)}", "Transfer-Encoding: chunked")
    async with wire(small_site.base_url) as connection:
        for part in (head, *(chunk(bytes([byte])) for byte in body), chunk(b"")):
            await connection.send(part)
            await asyncio.sleep(0)
        assert (await connection.answer()).status == 200
    await small_site.services.applier.drain()
    assert (await small_site.client.get("/api/runs/run_chunks")).json()["status"] == "completed"


@pytest.mark.parametrize(("headers", "status"), [(99, 200), (100, 431)])
async def test_headers_are_counted(small_site: Site, headers: int, status: int) -> None:
    """A request may have a hundred headers, Host among them, however small they are."""
    async with wire(small_site.base_url) as connection:
        await connection.send(GET, headers * b"a:b\r\n", b"\r\n")
        assert (await connection.answer()).status == status


@pytest.mark.parametrize("first", [GET + b"\r\n", post(PATH, b"{}")], ids=["head", "body"])
async def test_a_head_that_begins_behind_a_request_has_its_bound(
    small_site: Site, first: bytes
) -> None:
    """A long header in the packet of the request before is not kept either."""
    async with wire(small_site.base_url) as connection:
        await connection.send(first, GET, b"X-Long: " + 200_000 * b"a")
        assert (await connection.answer()).headers["connection"] == "close"


async def test_trailers_are_no_headers(serve: Serve, sqlite_url: str) -> None:
    """A token that comes behind a chunked body lets nobody in."""
    token = "a-token-of-the-tests"
    head = "GET /api/runs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    shown = f"Authorization: Bearer {token}\r\n"
    async with serve(sqlite_url, tracker_api_token=token) as site:
        for asked, status in (
            (f"{head}\r\n0\r\n{shown}\r\n", 401),
            (f"{head}{shown}\r\n0\r\nX-Trailer: 5\r\n\r\n", 200),
        ):
            async with wire(site.base_url) as sender:
                await sender.send(asked.encode())
                assert (await sender.answer()).status == status


async def test_slow_clients_give_way_to_quick_ones(serve: Serve, sqlite_url: str) -> None:
    """Where the bytes for requests run out, one that waits for the rest of its body is told to come
    again, and whoever brings a request is served."""
    large = event("run_large", padding=60_000 * "x")
    head = post(PATH, b"", f"Flora-Signature: {signature(large)}", length=len(large))
    async with (
        serve(sqlite_url, limits=Limits(received_bytes=100_000)) as site,
        wire(site.base_url) as slow,
    ):
        await slow.send(head, large[:-1])
        answering = asyncio.create_task(slow.answer())

        async def made_room() -> bool:
            answer = await site.client.post(PATH, content=large, headers=signed(large))
            assert answer.status_code == 200
            return answering.done()

        await eventually(made_room)
        answer = await answering
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")


async def test_when_the_room_for_requests_is_full_small_ones_are_still_taken() -> None:
    """While large ones are being worked on, another large one is told to come again; the room comes
    back with the answers."""
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/slow":
            await go_on.wait()
        await _hello(scope, receive, send)

    large = 80_000 * b"x"
    limits = Limits(received_bytes=100_000)
    async with serving(app, limits=limits) as base_url, contextlib.AsyncExitStack() as stack:
        slow, small = [await stack.enter_async_context(wire(base_url)) for _ in range(2)]
        await slow.send(post("/slow", large))

        async def refused() -> bool:
            async with wire(base_url) as newcomer:
                await newcomer.send(post("/", large))
                answer = await newcomer.answer()
                return (answer.status, answer.headers.get("retry-after")) == (503, "5")

        await eventually(refused)
        await small.send(post("/", 1000 * b"x"))
        assert (await small.answer()).status == 200
        go_on.set()
        assert (await slow.answer()).status == 200
        assert not await refused()


@pytest.mark.parametrize("short_of", ["places", "memory"])
async def test_a_callback_in_two_packets_is_not_the_first_to_give_way(
    serve: Serve, sqlite_url: str, short_of: str
) -> None:
    """A proxy's connection that was idle for longest, and on which a callback has just begun, stays
    where others wait for their clients too."""
    is_memory = short_of == "memory"
    unfinished = post("/", 60_000 * b"x", length=70_000) if is_memory else b""
    limits = Limits(received_bytes=100_000) if is_memory else Limits(connections=40)
    begin, rest = _callback("run_proxied")[:-10], _callback("run_proxied")[-10:]
    async with (
        serve(sqlite_url, limits=limits) as site,
        contextlib.AsyncExitStack() as stack,
        wire(site.base_url) as proxy,
    ):
        await proxy.send(GET, b"\r\n")
        assert (await proxy.answer()).status == 200
        others = [
            await stack.enter_async_context(wire(site.base_url))
            for _ in range(1 if is_memory else 39)
        ]
        await others[0].send(unfinished)
        await proxy.send(begin)
        await asyncio.sleep(0.05)  # else it may come in one packet
        newcomer = await stack.enter_async_context(wire(site.base_url))
        await newcomer.send(unfinished)
        await others[0].answer() if is_memory else await others[0].hung_up()
        await proxy.send(rest)
        assert (await proxy.answer()).status == 200


async def test_whatever_clients_break_off_its_memory_comes_back(
    serve: Serve, sqlite_url: str
) -> None:
    """After hundreds of requests that were cut, refused, pipelined or left unread there is as much
    room as before."""
    chance = random.Random(17)
    large = _callback("run_large", padding=60_000)
    chunked = post(PATH, b"", "Flora-Signature: t=1,v1=00", "Transfer-Encoding: chunked")
    kinds = (
        *(large, _callback("run_small"), GET + b"\r\n", b"no HTTP\r\n\r\n", post("/no", large)),
        *(chunked + chunk(large), chunked + chunk(b"x") + b"0\r\nX-Trailer: 1\r\n\r\n"),
        *(GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", GET + 150 * b"a:b\r\n" + b"\r\n"),
        *(post(PATH, 300_000 * b"x"), GET + b"Content-Length: 70000\r\n\r\n" + large),
    )

    async def break_off() -> None:
        asked = b"".join(chance.choices(kinds, k=chance.choice((1, 2, 12))))
        async with wire(site.base_url) as client:
            await client.send(asked[: chance.randrange(len(asked))])
            if chance.random() < 0.5:
                client.cut()
            else:
                await asyncio.sleep(0.05 * chance.random())

    async def has_room() -> bool:
        async with wire(site.base_url) as client:
            await client.send(large)
            return (await client.answer()).status == 200

    limits = Limits(received_bytes=100_000, connections=30)
    async with serve(sqlite_url, limits=limits) as site:
        for _ in range(20):
            await asyncio.gather(*(break_off() for _ in range(20)))
        await eventually(has_room)


def _callback(run_id: str, padding: int = 0) -> bytes:
    body = event(run_id, padding=padding * "x")
    return post(PATH, body, f"Flora-Signature: {signature(body)}")


async def test_a_refused_request_that_goes_on_gives_way(serve: Serve, sqlite_url: str) -> None:
    """Clients that send on after their refusal keep nobody else out."""
    limits = Limits(connections=3, linger_seconds=60)
    async with (
        serve(sqlite_url, limits=limits) as site,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(3):
            sender = await stack.enter_async_context(wire(site.base_url))
            await sender.send(post("/nothing", b"", "Transfer-Encoding: chunked"), chunk(b"x"))
            head = await sender._reader.readuntil(b"\r\n\r\n")
            assert b" 404 " in head
        newcomer = await stack.enter_async_context(wire(site.base_url))
        await newcomer.send(GET, b"\r\n")
        assert (await newcomer.answer()).status == 200


async def test_a_half_closed_connection_loses_nothing(small_site: Site) -> None:
    """A callback is kept whose sender closes its side as soon as all of it is sent."""
    body = event("run_half")
    async with wire(small_site.base_url) as connection:
        await connection.send(post(PATH, body, f"Flora-Signature: {signature(body)}"))
        connection.send_no_more()

        async def kept() -> bool:
            return (await small_site.client.get("/api/runs/run_half")).status_code == 200

        await eventually(kept)


async def test_pipelined_answers_come_in_order_whatever_follows(small_site: Site) -> None:
    """What was asked before a mistake is answered first, and then the connection ends."""
    bodies = [event(f"run_{number}") for number in range(3)]
    asked = [post(PATH, body, f"Flora-Signature: {signature(body)}") for body in bodies]
    async with wire(small_site.base_url) as connection:
        await connection.send(*asked, b"this is not HTTP\r\n\r\n")
        assert [(await connection.answer()).status for _ in bodies] == [200] * 3
        assert await connection.hung_up()
    async with wire(small_site.base_url) as connection:
        await connection.send(b"this is not HTTP\r\n\r\n")
        assert (await connection.answer()).status == 400
        assert await connection.hung_up()


async def test_an_answer_without_a_body_is_sent_all_the_same(small_site: Site) -> None:
    """HEAD is answered on a connection that stays, and on one that ends with it."""
    ask = GET.replace(b"GET", b"HEAD")
    for more in (b"", b"Connection: close\r\n"):
        async with wire(small_site.base_url) as asking:
            await asking.send(ask, more, b"\r\n", b"" if more else GET + b"\r\n")
            head = await asking._reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            if not more:
                assert (await asking.answer()).status == 200


async def test_so_many_requests_may_be_sent_ahead() -> None:
    """Those that are taken are answered, and the last of them says that it is the last."""
    async with (
        serving(_hello, limits=Limits(requests_ahead=4)) as base_url,
        wire(base_url) as connection,
    ):
        await connection.send(10 * (GET + b"\r\n"))
        answers = [await connection.answer() for _ in range(5)]
        assert [answer.headers.get("connection") for answer in answers] == [None] * 4 + ["close"]
        assert await connection.hung_up()


async def test_a_disconnect_reaches_every_request_of_the_connection() -> None:
    """A request that is being answered hears that its client is gone, also where another one had
    been sent after it."""
    begun, told = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()

    async with serving(app) as base_url, wire(base_url) as connection:
        await connection.send(2 * (GET + b"\r\n"))
        await begun.wait()
        connection.cut()
        await asyncio.wait_for(told.wait(), 30)


async def test_the_offer_of_another_protocol_is_passed_over(small_site: Site) -> None:
    """A callback that offers HTTP/2 in passing is taken with its body, and so is what follows."""
    bodies = [event(f"run_{number}") for number in range(3)]
    first, second, last = (
        post(
            PATH,
            body,
            "Connection: Upgrade, HTTP2-Settings",
            "Upgrade: h2c",
            f"Flora-Signature: {signature(body)}",
        )
        for body in bodies
    )
    async with wire(small_site.base_url) as connection:
        await connection.send(first, second, last[:100])
        await asyncio.sleep(0)
        await connection.send(last[100:])
        assert [(await connection.answer()).status for _ in bodies] == [200] * 3


@pytest.mark.parametrize(
    "asked",
    [
        b"CONNECT flora.test:443 HTTP/1.1\r\nHost: flora.test:443\r\n\r\n",
        b"CONNECT /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_no_request_to_a_server_is_refused(small_site: Site, asked: bytes) -> None:
    """Neither a tunnel nor another protocol begins here."""
    async with wire(small_site.base_url) as connection:
        await connection.send(asked)
        assert (await connection.answer()).status == 400
        assert await connection.hung_up()


async def test_the_longest_idle_connection_gives_way() -> None:
    """Where all places are taken the next client gets one: of those who have nothing to say."""
    limits = Limits(connections=3)
    async with serving(_hello, limits=limits) as base_url, contextlib.AsyncExitStack() as stack:
        idle, slow, last = [await stack.enter_async_context(wire(base_url)) for _ in range(3)]
        await idle.send(GET, b"\r\n")
        assert (await idle.answer()).status == 200
        await slow.send(GET)
        newcomer = await stack.enter_async_context(wire(base_url))
        await newcomer.send(GET, b"\r\n")
        assert (await newcomer.answer()).status == 200
        assert await idle.hung_up()
        assert await last.hung_up()
        answer = await slow.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")


async def test_a_connection_being_served_does_not_give_way() -> None:
    """Where everybody is being served, a newcomer is told so, and they get their answers."""
    go_on, begun = asyncio.Event(), 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal begun
        begun += 1
        await go_on.wait()
        await _hello(scope, receive, send)

    limits = Limits(connections=2)
    async with serving(app, limits=limits) as base_url, contextlib.AsyncExitStack() as stack:
        served = [await stack.enter_async_context(wire(base_url)) for _ in range(2)]
        for connection in served:
            await connection.send(GET, b"\r\n")
        await eventually(lambda: begun == 2)

        async def refused() -> bool:
            async with wire(base_url) as newcomer:
                answer = await newcomer.answer()
                return (answer.status, answer.headers["connection"]) == (503, "close")

        assert await refused()
        go_on.set()
        assert [(await connection.answer()).status for connection in served] == [200] * 2


@pytest.mark.parametrize("more", ["", "Connection: close\r\n"], ids=["stays", "ends"])
async def test_a_client_that_does_not_read_its_answers_gives_way(more: str) -> None:
    """Clients that ask for much and read next to nothing of it keep nobody else out."""
    large = 16 * 1024 * 1024

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/large":
            await _hello(scope, receive, send)
            return
        length = [(b"content-length", str(large).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": bytes(large)})

    ask = f"GET /large HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode()
    limits = Limits(connections=2)
    async with serving(app, limits=limits) as base_url, contextlib.AsyncExitStack() as stack:
        unread = [await stack.enter_async_context(wire(base_url)) for _ in range(2)]
        for connection in unread:
            await connection.send(ask, ask)

        async def served() -> bool:
            async with wire(base_url) as newcomer:
                await newcomer.send(GET, b"\r\n")
                return (await newcomer.answer()).status == 200

        await eventually(served)
        for connection in unread:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await connection.answer()


async def test_with_few_files_some_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may open no more than 256 files serves as many as it can."""
    monkeypatch.setattr(connections, "_open_files", lambda _: 256)
    async with serving(_hello) as base_url, wire(base_url) as connection:
        await connection.send(GET, b"\r\n")
        assert (await connection.answer()).status == 200


@pytest.fixture
def many_files() -> Iterator[None]:
    """Enough open files for two thousand connections; the tracker begins with the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < CONNECTIONS + 512:
        pytest.skip(f"this user may open {hard} files, and {CONNECTIONS + 512} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (CONNECTIONS + 512, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.asynccontextmanager
async def _crowd(base_url: str) -> AsyncIterator[None]:
    """Clients that say nothing, a part of a head, or a part of a body without a length."""
    head = post(PATH, b"", "Flora-Signature: t=1,v1=00", "Transfer-Encoding: chunked")
    host, _, port = base_url.removeprefix("http://").partition(":")
    writers = []
    try:
        for number in range(CONNECTIONS):
            _, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
            writer.write((b"", GET, head + chunk(b"{"))[number % 3])
        yield
    finally:
        for writer in writers:
            writer.transport.abort()


async def test_two_thousand_connections_keep_no_callback_out(
    tmp_path: Path, sqlite_url: str, many_files: None
) -> None:
    """`tracker serve`, whose files would not suffice, takes callbacks among them as ever."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    async with open_sandbox(tmp_path, sqlite_url) as sandbox:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        server = await sandbox.serve("--no-worker")
        resource.setrlimit(resource.RLIMIT_NOFILE, (CONNECTIONS + 512, hard))
        bodies = [event(f"run_{number}") for number in range(50)]
        async with (
            _crowd(sandbox.tracker),
            httpx.AsyncClient(base_url=sandbox.tracker, trust_env=False, timeout=20) as client,
        ):
            async with asyncio.timeout(8):  # FLORA waits for ten
                answers = await asyncio.gather(
                    *(client.post(PATH, content=b, headers=signed(b, SECRET)) for b in bodies)
                )
            assert {answer.status_code for answer in answers} == {200}

            async def applied() -> bool:
                runs = (await client.get("/api/runs?limit=100")).json()["runs"]
                return len(runs) == len(bodies)

            await eventually(applied)
        assert await server.stop() == 0
        assert "Traceback" not in server.log


async def _hello(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})
