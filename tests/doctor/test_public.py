"""The public URL: where it leads, its certificate, and what is not sent there."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.delivering.far_end import Asked, FarEnd, answer, far_end
from tests.doctor.conftest import look, with_flora
from tests.support.waiting import free_port
from tracker.core.clock import utc_now
from tracker.delivering.addresses import Address
from tracker.operations.doctor import Finding, Level, webhooks
from tracker.settings import read_settings
from tracker.simulator import Simulator

REFUSED = answer(
    b'{"error": {"code": "unauthorized", "message": "The signature is wrong."}}',
    "401 Unauthorized",
    x_request_id="1",
)


async def _public_url(url: str, **options: Any) -> Finding:
    return await webhooks.check_public_url(
        read_settings({"TRACKER_PUBLIC_URL": url}).settings, **options
    )


@pytest.mark.parametrize(
    ("found", "level", "seen"),
    [
        (["203.0.114.7"], Level.OK, "leads to 203.0.114.7"),
        (["203.0.114.7", "10.0.0.7"], Level.WARNING, "resolves to 10.0.0.7, which is not a public"),
        (None, Level.FAILED, "cannot be resolved"),
    ],
)
async def test_the_name_of_the_public_url_is_resolved(
    found: list[str] | None, level: Level, seen: str
) -> None:
    """A public address is ok, a private one is warned of, and no address fails."""

    async def resolve(host: str, port: int) -> list[Address]:
        if found is None:
            raise OSError(-2, "Name or service not known")
        return [ip_address(each) for each in found]

    got = await _public_url("https://tracker.example.com", resolver=resolve)
    assert got.level is level
    assert seen in got.seen


async def test_a_lookup_that_hangs_is_given_up() -> None:
    """If DNS does not answer, the finding says so."""

    async def resolve(host: str, port: int) -> list[Address]:
        await asyncio.Event().wait()
        return []

    got = await _public_url("https://tracker.example.com", resolver=resolve, timeout=0.01)
    assert "no answer within" in got.seen


async def test_a_loopback_address_is_for_a_flora_on_this_machine() -> None:
    """FLORA itself refuses one, so that it fails; beside a simulator it is ok."""
    assert (await _public_url("http://localhost:8080")).level is Level.FAILED
    assert (await _public_url("https://10.1.2.3")).level is Level.WARNING
    assert (await webhooks.check_public_url(read_settings({}).settings)).level is Level.WARNING


async def test_nothing_signed_is_sent_if_it_could_not_be_deleted(
    flora: Simulator, sqlite_url: str, empty_sqlite_url: str
) -> None:
    """With no secret, or a database that cannot be written, only forged ones go out."""
    async with far_end(REFUSED) as far:
        environ = with_flora(flora, TRACKER_PUBLIC_URL=far.url(""))
        for more in (
            {"TRACKER_DATABASE_URL": sqlite_url, "FLORA_WEBHOOK_SECRET": ""},
            {"TRACKER_DATABASE_URL": empty_sqlite_url},
        ):
            report = await look(**environ | more)
            assert report.level("callbacks") is Level.WARNING
            assert "Fix that first" in report["callbacks"].advice
        assert len(far.asked) == 4  # each time to the bare address, and to one below it


async def test_an_address_where_nothing_listens_fails(flora: Simulator, sqlite_url: str) -> None:
    """A refused connection, and one that is cut, name what to start."""
    async with far_end(b"") as cut:
        for url in (f"http://127.0.0.1:{free_port()}", cut.url("")):
            report = await look(
                **with_flora(flora, TRACKER_DATABASE_URL=sqlite_url, TRACKER_PUBLIC_URL=url)
            )
            assert report.level("callbacks") is Level.FAILED
            assert "cannot be sent" in report["callbacks"].seen
            assert "Start `tracker serve`" in report["callbacks"].advice


@asynccontextmanager
async def _with_own_certificate(folder: Path) -> AsyncIterator[str]:
    """A server whose certificate nobody but itself has signed."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    port = free_port()
    server = await asyncio.start_server(
        FarEnd(port, REFUSED).connected, "127.0.0.1", port, ssl=context
    )
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        server.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_an_untrusted_certificate_fails(
    flora: Simulator, sqlite_url: str, tmp_path: Path
) -> None:
    """What is wrong with it is told, and nothing is sent."""
    async with _with_own_certificate(tmp_path) as url:
        report = await look(
            **with_flora(flora, TRACKER_DATABASE_URL=sqlite_url, TRACKER_PUBLIC_URL=url)
        )
    assert report.level("certificate") is Level.FAILED
    assert "self-signed certificate" in report["certificate"].seen
    assert "public authority" in report["certificate"].advice
    assert "callbacks" not in report


def test_a_certificate_is_to_be_renewed_in_time() -> None:
    """One that ends within days is a warning."""
    now = utc_now()
    assert webhooks.judge_certificate(now + timedelta(days=60), now=now).level is Level.OK
    assert webhooks.judge_certificate(now + timedelta(days=3), now=now).level is Level.WARNING


async def test_a_proxy_that_passes_on_the_exact_path_alone_fails(
    flora: Simulator, sqlite_url: str
) -> None:
    """Callbacks of new starts come to an address below it, and would all be lost."""

    elsewhere = answer(b"<html>", "404 Not Found")

    async def exact(asked: Asked, writer: asyncio.StreamWriter) -> None:
        bare = asked[""].startswith("POST /callbacks/flora HTTP")
        writer.write(REFUSED if bare else elsewhere)
        await writer.drain()

    async with far_end(exact) as far:
        report = await look(
            **with_flora(flora, TRACKER_PUBLIC_URL=far.url(""), TRACKER_DATABASE_URL=sqlite_url)
        )
    assert report.level("own addresses") is Level.FAILED
    assert "as a prefix" in report["own addresses"].advice
