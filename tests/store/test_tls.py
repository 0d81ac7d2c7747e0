"""What goes to a PostgreSQL on another machine (here 0.0.0.0, which is no loopback address by its
name): never the password in clear, and a word about a server that is not verified."""

import asyncio
import shutil
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.logs import capture_logs
from tests.support.postgres import PostgresServer
from tests.support.waiting import eventually, free_port
from tracker.core.errors import StoreUnavailable
from tracker.services import open_services
from tracker.settings import Settings
from tracker.store.engine import Database, migration_engine
from tracker.store.url import DatabaseUrl

PASSWORD = "of-the-tests-alone"
ASKS_IN_CLEAR = b"R" + struct.pack("!ii", 8, 3)
OK = b"R" + struct.pack("!ii", 8, 0)
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


@asynccontextmanager
async def impostor(*says: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server without TLS that answers whatever it is told with the next of `says`: its port, and
    what it was told."""
    told: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(says)
        while data := await reader.read(4096):
            told.append(data)
            writer.write(b"N" if data == SSL_REQUEST else left.pop(0) if left else b"")
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], told


@pytest.mark.parametrize("mode", ["", "?sslmode=allow", "?sslmode=prefer", "?sslmode=disable"])
@pytest.mark.parametrize("says", [ASKS_IN_CLEAR, OK + ASKS_IN_CLEAR], ids=["at once", "later"])
@pytest.mark.usefixtures("patient")
async def test_a_password_is_not_sent_in_clear(mode: str, says: bytes) -> None:
    """Anyone who says "no TLS" and asks for it gets none, and the error says why and what to do."""
    async with impostor(says) as (port, told):
        url = f"postgresql://someone:{PASSWORD}@0.0.0.0:{port}/tracker{mode}"
        async with await Database.open(url) as db:
            with pytest.raises(StoreUnavailable, match="in clear, so it was not sent") as refused:
                await db.ping()
        engine = migration_engine(DatabaseUrl.parse(url))
        with pytest.raises(ConnectionError, match="in clear"):
            async with engine.connect():
                pass
        await engine.dispose()
    assert b"someone" in b"".join(told)
    assert PASSWORD.encode() not in b"".join(told)
    assert PASSWORD not in str(refused.value)


async def test_why_it_was_not_sent_is_reported_before_that_another_host_is_not_reached() -> None:
    """With several hosts, the one that answers says what to change."""
    async with impostor(ASKS_IN_CLEAR) as (port, told):
        url = f"postgresql://someone:{PASSWORD}@0.0.0.0:{free_port()},0.0.0.0:{port}/tracker"
        async with await Database.open(url) as db:
            with pytest.raises(StoreUnavailable, match="in clear, so it was not sent"):
                await db.ping()
    assert PASSWORD.encode() not in b"".join(told)


@pytest.mark.usefixtures("patient")
async def test_this_machine_may_ask_for_it() -> None:
    """On loopback nobody listens in between."""
    async with impostor(ASKS_IN_CLEAR) as (port, told):
        url = f"postgresql://someone:{PASSWORD}@127.0.0.1:{port}/tracker"
        async with await Database.open(url) as db:
            asking = asyncio.create_task(db.ping())
            await eventually(lambda: PASSWORD.encode() in b"".join(told))
            asking.cancel()
            with suppress(asyncio.CancelledError, StoreUnavailable):
                await asking
    assert PASSWORD.encode() in b"".join(told)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("mode", ["prefer", "require", "verify-full", "verify-ca of others"])
@pytest.mark.usefixtures("patient")
async def test_within_tls_it_is_sent(mode: str, tmp_path: Path) -> None:
    """Where the server speaks TLS nothing goes past it; one that is verified and is another gets
    nothing."""
    ours, others = (certificate(tmp_path / name) for name in ("ours", "others"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ours)
    told: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(SSL_REQUEST))
        writer.write(b"S")
        with suppress(ConnectionError, ssl.SSLError):
            await writer.start_tls(context)
            told.append(await reader.read(4096))
            writer.write(ASKS_IN_CLEAR)
            told.append(await reader.read(4096))
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    authority = (others if "others" in mode else ours)[0]
    root = f"&sslrootcert={authority}" if "verify" in mode else ""
    async with server:
        port = server.sockets[0].getsockname()[1]
        url = f"postgresql://someone:{PASSWORD}@0.0.0.0:{port}/t?sslmode={mode.split(maxsplit=1)[0]}{root}"
        async with await Database.open(url) as db:
            with pytest.raises(StoreUnavailable):
                await db.ping()
    assert (PASSWORD.encode() in b"".join(told)) is ("others" not in mode)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 0.0.0.0, signed by itself, and its key."""
    folder.mkdir()
    made, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=postgres", "-addext"),
            *("subjectAltName=IP:0.0.0.0", "-out", made, "-keyout", key),
        ],
        check=True,
        capture_output=True,
    )
    return made, key


@pytest.mark.usefixtures("patient")
async def test_without_tls_a_password_is_proved_by_scram(own_postgres: PostgresServer) -> None:
    """A server without TLS that asks for a proof, and not for the password, is connected to."""
    trusted = own_postgres.url("tracker")
    async with await Database.open(trusted) as db:
        hba = await db.write(lambda c: c.exec_driver_sql("SHOW hba_file").scalar_one())
        await db.write(
            lambda c: c.exec_driver_sql(f"CREATE ROLE someone LOGIN PASSWORD '{PASSWORD}'")
        )
        rules = Path(hba).read_text()
        Path(hba).write_text(f"host all someone all scram-sha-256\n{rules}")
        await db.write(lambda c: c.exec_driver_sql("SELECT pg_reload_conf()"))
    port = DatabaseUrl.parse(trusted).dsn.rpartition(":")[2].partition("/")[0]
    url = f"postgresql://someone:{PASSWORD}@0.0.0.0:{port}/tracker"
    async with await Database.open(url) as db:
        await db.ping()
    async with await Database.open(url.replace(PASSWORD, "wrong")) as db:
        with pytest.raises(StoreUnavailable, match="password authentication failed"):
            await db.ping()


@pytest.mark.parametrize(
    ("url", "trouble"),
    [
        ("sqlite:///tracker.db", None),
        ("postgresql://u:p@127.0.0.1/t", None),
        ("postgresql://u:p@[::1]:5432/t", None),
        ("postgresql://u:p@localhost:5432/t", None),
        ("postgresql:///t?host=/run/postgresql", None),
        ("postgresql://u:p@%2Frun%2Fpostgresql/t", None),
        ("postgresql:///t", None),
        ("postgresql://u:p@db/t?sslmode=verify-full", None),
        ("postgresql://u:p@db/t?sslmode=verify-ca", None),
        ("postgresql://u:p@db/t?sslmode=require&sslrootcert=ca.pem", None),
        ("postgresql://u:p@db/t", "sslmode=prefer does not verify"),
        ("postgresql://u:p@localhost,db:5433/t", "sslmode=prefer does not verify"),
        ("postgresql:///t?host=db", "sslmode=prefer does not verify"),
        ("postgresql://u:p@db/t?sslmode=require", "sslmode=require does not verify"),
        ("postgresql://u:p@db/t?sslmode=disable", "sslmode=disable: anyone between"),
    ],
)
def test_a_server_that_is_not_verified_is_reported_of(
    url: str, trouble: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only where it is on another machine, and nothing makes sure that it is the right one."""
    for name in ("PGHOST", "PGSSLMODE", "PGSSLROOTCERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    told = DatabaseUrl.parse(url).tls_trouble
    assert (told or "").startswith(trouble or "")
    assert (told is None) is (trouble is None)


async def test_a_long_running_process_warns_of_it(postgres_url: str) -> None:
    """Once, when it opens the database, and goes on."""
    there = postgres_url.replace("127.0.0.1", "0.0.0.0")
    with capture_logs() as logs:
        async with open_services(Settings(tracker_database_url=there), background=True) as services:
            await services.database.ping()
    (warned,) = [one for one in logs if one["event"] == "database.not_verified"]
    assert warned["log_level"] == "warning"
    assert "the next release refuses this" in warned["trouble"]


def test_what_libpq_reads_from_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PGHOST` and `PGSSLMODE` are for the tracker too."""
    monkeypatch.setenv("PGHOST", "db.example.com")
    assert DatabaseUrl.parse("postgresql:///tracker").tls_trouble
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    assert DatabaseUrl.parse("postgresql:///tracker").tls_trouble is None
