"""A URL with several hosts: the primary among them is found, whatever has become of the others."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sqlalchemy import func, select, text

from tests.support.postgres import PostgresServer
from tests.support.waiting import assert_takes_less, free_port
from tracker.core.errors import StoreUnavailable
from tracker.store.engine import Database
from tracker.store.postgres import NEXT_HOST_SECONDS
from tracker.store.url import DatabaseUrl

BACKEND = select(func.pg_backend_pid())
IN_RECOVERY = text("SELECT pg_is_in_recovery()")
WRITE = text("CREATE TABLE written ()")


@asynccontextmanager
async def silent_host() -> AsyncIterator[int]:
    """A machine that is there and does not answer: the port on which it accepts connections."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def url_of(*ports: int, options: str = "") -> str:
    """A URL that names a host for each of these ports."""
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"postgresql://postgres@{hosts}/tracker{options}"


@pytest.fixture
def standby(_postgres_data: Path) -> Iterator[PostgresServer]:
    """A server that takes no writes."""
    server = PostgresServer(data=_postgres_data)
    (server.data / "standby.signal").touch()
    server.hand_over(server.data)
    with server:
        yield server


@pytest.mark.parametrize("options", ["", "?target_session_attrs=primary"])
async def test_a_silent_host_does_not_keep_the_next_one_from_being_reached(
    own_postgres: PostgresServer, options: str
) -> None:
    """As where the old primary's machine hangs: the first connection waits for it, the others go to
    the host that was reached."""
    async with silent_host() as silent:
        url = url_of(silent, own_postgres.port, options=options)
        async with await Database.open(url) as database:
            await database.ping()
            await assert_takes_less(NEXT_HOST_SECONDS, lambda: database.execute(WRITE))


async def test_the_host_that_was_reached_last_may_fall_silent(own_postgres: PostgresServer) -> None:
    """The others are tried again, as where a failover goes back."""
    async with silent_host() as silent:
        url = url_of(own_postgres.port, silent)
        async with await Database.open(url) as database:
            await database.ping()
        own_postgres.stop()
        async with await Database.open(url) as database:
            with pytest.raises(StoreUnavailable):
                await database.execute(WRITE)
        own_postgres.start()
        async with await Database.open(url) as database:
            await database.execute(WRITE)


async def test_a_standby_is_passed_over(
    own_postgres: PostgresServer, standby: PostgresServer
) -> None:
    """As where the old primary has come back as a standby of the new one."""
    async with await Database.open(url_of(standby.port, own_postgres.port)) as database:
        await database.execute(WRITE)
        assert await database.fetchval(IN_RECOVERY) is False


async def test_a_standby_is_read_as_long_as_there_is_no_primary(
    own_postgres: PostgresServer, standby: PostgresServer
) -> None:
    """And not for longer: what it shows is older."""
    own_postgres.stop()
    async with await Database.open(url_of(own_postgres.port, standby.port)) as database:
        assert await database.fetchval(IN_RECOVERY) is True
        with pytest.raises(StoreUnavailable, match="read-only"):
            await database.execute(WRITE)
        own_postgres.start()
        assert await database.fetchval(IN_RECOVERY) is False
        await database.execute(WRITE)


@pytest.mark.parametrize("wanted", ["standby", "prefer-standby"])
async def test_a_standby_that_is_asked_for_is_used(
    own_postgres: PostgresServer, standby: PostgresServer, wanted: str
) -> None:
    """Where the URL says so, the primary before it is passed over, and connections are kept."""
    url = url_of(own_postgres.port, standby.port, options=f"?target_session_attrs={wanted}")
    async with await Database.open(url) as database:
        assert await database.fetchval(IN_RECOVERY) is True
        assert await database.fetchval(BACKEND) == await database.fetchval(BACKEND)


async def test_what_a_server_says_is_reported_before_that_another_is_not_reached(
    own_postgres: PostgresServer,
) -> None:
    """The answer of the one that is there says what to change."""
    url = url_of(own_postgres.port, free_port()).replace("/tracker", "/missing")
    async with await Database.open(url) as database:
        with pytest.raises(StoreUnavailable, match='"missing" does not exist'):
            await database.ping()


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://u:p@a,b:6000/db?sslmode=require", ["u:p@a", "u:p@b:6000"]),
        ("postgresql://[::1]:1,/db", ["[::1]:1", ""]),
        ("postgresql://a/db", ["a"]),
        ("postgresql:///db?host=a,b", [""]),
        ("postgresql://a,b/db?port=1,2", ["a,b"]),
    ],
)
def test_each_host_has_a_url(url: str, hosts: list[str]) -> None:
    """The options are those of all."""
    each = DatabaseUrl.parse(url).each_host
    assert [urlsplit(one.dsn).netloc for one in each] == hosts
