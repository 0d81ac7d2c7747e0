"""The API key reaches FLORA's origin alone, whatever a poll_url, an answer or a link says."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.delivering.far_end import FarEnd, answer, far_end
from tests.web.callbacks import event, signature
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import Output, RunStatus
from tracker.delivering.downloads import DownloadOptions, DownloadReport
from tracker.delivering.saving import DownloadOutcome
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.store.queries import runs as read

KEY = "sk_test_the_key_itself"
SECRET = "whsec_of_the_tests"
NOT_FOUND = answer(b'{"error": {"code": "not_found", "message": "no"}}', "404 Not Found")

LEADS_AWAY = (
    "http://127.0.0.1:{trap}/api/v1/runs/r",
    "//127.0.0.1:{trap}/api/v1/runs/r",
    "http://127.0.0.1:{flora}@127.0.0.1:{trap}/",
    "http://key:pw@127.0.0.1:{trap}/",
    "http://127.0.0.1:{flora}\\@127.0.0.1:{trap}/",
    "http:\\\\127.0.0.1:{trap}\\",
    "/\\127.0.0.1:{trap}/",
    "\\\\127.0.0.1:{trap}/",
    "\t//127.0.0.1:{trap}/",
    " http://127.0.0.1:{trap}/",
    "http://127.0.0.1:{flora}#@127.0.0.1:{trap}/",
    "http://127.0.0.1:{trap}#@127.0.0.1:{flora}/",
    "http://127.0.0.1:{flora}%2f@127.0.0.1:{trap}/",
    "http://127.0.0.1:{trap}%23@127.0.0.1:{flora}/",
    "http://127.0.0.1%00.example:{trap}/",
    "http://2130706433:{trap}/",
    "http://0x7f000001:{trap}/",
    "http://0177.0.0.1:{trap}/",
    "http://127.1:{trap}/",
    "http://localhost:{trap}/",
    "http://LOCALHOST:{trap}/",
    "http://0.0.0.0:{trap}/",
    "http://[::1]:{trap}/",
    "http://[::ffff:127.0.0.1]:{trap}/",
    "http://[0:0:0:0:0:ffff:7f00:1]:{trap}/",
    "http://１２７.0.0.1:{trap}/",  # noqa: RUF001 - browsers read such digits as ASCII
    "http://127。0。0。1:{trap}/",
    "https://127.0.0.1:{trap}/",
    "http://127.0.0.1:{trap}:{flora}/",
    "http:127.0.0.1:{trap}/",
    "http:///127.0.0.1:{trap}/",
    "HTTP://127.0.0.1:{trap}/",
    "ftp://127.0.0.1:{trap}/",
    "gopher://127.0.0.1:{trap}/_GET",
    "file:///etc/passwd",
    "javascript:fetch('//127.0.0.1:{trap}')",
    "http://127.0.0.1:{flora}/x\r\nHost: 127.0.0.1:{trap}\r\n\r\nGET / HTTP/1.1",
    "?next=http://127.0.0.1:{trap}/",
)

INSIDE = (  # host names: tests/delivering/test_addresses.py; here no address but these may be asked
    *("127.0.0.1", "user@127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:7f00:1]"),
    *("127。0。0。1", "１２７.0.0.1", "0.0.0.0", "[::]", "[64:ff9b::7f00:1]"),  # noqa: RUF001
)


@asynccontextmanager
async def _between(
    database_url: str, *replies: bytes, **settings: str
) -> AsyncIterator[tuple[Services, FarEnd, FarEnd]]:
    """The services, a FLORA that gives these replies, and a server that must never be asked."""
    async with far_end(*(replies or (NOT_FOUND,))) as flora, far_end(NOT_FOUND) as trap:
        given = Settings(
            tracker_database_url=database_url,
            flora_base_url=f"http://127.0.0.1:{flora.port}/api/v1",
            flora_api_key=KEY,
            flora_webhook_secret=SECRET,
            **settings,
        )
        async with open_services(given) as services:
            yield services, flora, trap


async def _look(services: Services, run_id: str) -> None:
    record = await read.get_run(services.database, run_id)
    assert record is not None
    await services.poller.read_now(record)


async def _told(services: Services, run_id: str, poll_url: str) -> None:
    await services.tracker.track(run_id, technique=None, workspace_id=None, poll_url=poll_url)


async def _listed(services: Services, run_id: str, poll_url: str) -> None:
    seen = Observation(run_id=run_id, source=Source.HISTORY, at=services.clock(), poll_url=poll_url)
    await services.writer.submit(Observed(observation=seen))


async def _called(services: Services, run_id: str, poll_url: str) -> None:
    body = json.loads(event(run_id))
    body["data"] |= {"poll_url": poll_url, "url": poll_url, "callback_url": poll_url}
    raw = json.dumps(body).encode()
    await services.receiver.receive(raw, signature=signature(raw), webhook_id=poll_url)[1]
    await services.applier.drain()


async def test_a_poll_url_sends_the_key_to_no_other_origin(sqlite_url: str) -> None:
    """However another origin is spelt, and whoever names it (a caller, a history page, the body
    of a callback), what it names is never asked; FLORA is, and gets the key."""
    async with _between(sqlite_url) as (services, flora, trap):
        for number, spelt in enumerate(LEADS_AWAY):
            poll_url = spelt.format(trap=trap.port, flora=flora.port)
            run_id = f"run_{number}"
            await (_told, _listed, _called)[number % 3](services, run_id, poll_url)
            await _look(services, run_id)
        assert trap.asked == []
        assert len(flora.asked) >= len(LEADS_AWAY)
        assert {one["authorization"] for one in flora.asked} == {f"Bearer {KEY}"}
        assert {one["host"] for one in flora.asked} == {f"127.0.0.1:{flora.port}"}


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 T", "308 P"])
async def test_redirects_of_flora_are_not_followed(sqlite_url: str, status: str) -> None:
    """Not on a read, not on a list and not on a start, wherever it points."""
    async with far_end(NOT_FOUND) as elsewhere:
        moved = answer(b"", status, location=elsewhere.url("/take"), refresh=elsewhere.url())
        async with _between(sqlite_url, moved) as (services, flora, _):
            await services.tracker.track("run_1", technique="t", workspace_id=None, poll_url=None)
            await _look(services, "run_1")
            workspace = next(iter(services.workspaces))
            assert (await services.sweeper.sweep(workspace)).error is not None
            assert len(flora.asked) >= 2
        assert elsewhere.asked == []


async def test_a_proxy_of_the_environment_does_not_see_a_local_key(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain http goes to this machine alone, and so past every proxy; a `.netrc` adds nothing."""
    async with far_end(NOT_FOUND) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        async with _between(sqlite_url) as (services, flora, _):
            await services.tracker.track("run_1", technique="t", workspace_id=None, poll_url=None)
            await _look(services, "run_1")
            assert flora.asked
        assert proxy.asked == []


async def test_a_download_carries_no_key(sqlite_url: str, tmp_path: Path) -> None:
    """Neither to another server nor to FLORA's own, nor behind a redirect to it."""
    async with _between(sqlite_url, answer(b"a file")) as (services, flora, _):
        moved = answer(b"", "302 Found", location=flora.url("/moved.png"))
        async with far_end(moved) as elsewhere:
            outputs = (
                Output("o1", "imageUrl", flora.url("/own.png")),
                Output("o2", "imageUrl", elsewhere.url("/other.png")),
            )
            ended = Observation(
                run_id="run_1",
                source=Source.POLL,
                at=services.clock(),
                status=RunStatus.COMPLETED,
                outputs=outputs,
            )
            await services.writer.submit(Observed(observation=ended))
            report = DownloadReport()
            await services.downloader.download(
                services.downloader.named(["run_1"], watch=False),
                DownloadOptions(to=tmp_path / "files", allow_private=True),
                report,
            )
            assert len(report.of(DownloadOutcome.FETCHED)) == 2
            asked = [*flora.asked, *elsewhere.asked]
            assert len(asked) == 3
            for one in asked:
                assert not {"authorization", "cookie", "idempotency-key"} & set(one)
                assert KEY not in str(one)


async def test_a_download_reaches_no_internal_address(sqlite_url: str, tmp_path: Path) -> None:
    """A link into this network is refused before anything is sent, however it is spelt."""
    async with far_end(answer(b"inside")) as inside, _between(sqlite_url) as (services, _, _):
        links = [f"http://{host}:{inside.port}/" for host in INSIDE]
        outputs = tuple(Output(f"o{n}", "imageUrl", link) for n, link in enumerate(links))
        seen = Observation(
            run_id="run_1",
            source=Source.POLL,
            at=services.clock(),
            status=RunStatus.COMPLETED,
            outputs=outputs,
        )
        await services.writer.submit(Observed(observation=seen))
        report = DownloadReport()
        await services.downloader.download(
            services.downloader.named(["run_1"], watch=False),
            DownloadOptions(to=tmp_path / "f"),
            report,
        )
        assert inside.asked == []
        assert len(report.of(DownloadOutcome.FAILED)) == len(INSIDE)
