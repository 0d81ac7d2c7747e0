"""Secrets stay where they are: with every way driven, nothing that comes out holds one.

The log is read without its redactor, which is only the last net: what it would have caught would be
a fault here.
"""

import gc
import io
import re
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import asyncpg
import httpx
import pytest

from tests.delivering.far_end import answer, far_end
from tests.support.waiting import free_port
from tests.web.callbacks import PATH, event, signed
from tests.web.dashboard.conftest import csrf_of, sign_in
from tests.web.flora import START
from tests.web.serving import serving
from tracker.cli.app import main
from tracker.core import log as core_log
from tracker.core.errors import TrackerError
from tracker.flora.callback import sign
from tracker.flora.client import FloraClient
from tracker.operations.telemetry import configure_logs
from tracker.services import open_services
from tracker.settings import load_settings
from tracker.web.app import build_app

KEY, TOKEN, PASSWORD = "marked-flora-key", "marked-api-token-of-the-tests", "marked-p%40ssword"
SECRETS = ("marked-webhook-one", "marked-webhook-two")
MARKED = re.compile(rb"marked-(flora-key|api-token-of-the-tests|p(%40|@)ssword|webhook-(one|two))")
"""None has the shape of a secret, so that nothing knows it by that."""
NOT_FOUND = answer(b'{"error": {"code": "not_found", "message": "no"}}', "404 Not Found")
PAGES = ("/", "/runs", "/runs/run_1", "/deliveries", "/deliveries/whd_run_1", "/techniques")
PAGES += ("/batches", "/sweeps", "/login", "/no/such/page", "/metrics", "/openapi.json")
PAGES += ("/api/runs", "/api/runs/run_1", "/api/runs/run_1/events", "/api/techniques", "/readyz")
LOOKED_AT = ("tracker.", "httpx", "httpcore", "sqlalchemy.engine", "sqlalchemy.ext.asyncio")
"""Whose objects are asked how they show themselves: whatever holds a secret is one of these."""


def _environ(database_url: str, flora: str) -> dict[str, str]:
    return {
        "TRACKER_DATABASE_URL": database_url,
        "FLORA_API_KEY": KEY,
        "FLORA_BASE_URL": flora,
        "FLORA_WEBHOOK_SECRET": " ".join(SECRETS),
        "TRACKER_API_TOKEN": TOKEN,
        "TRACKER_PUBLIC_URL": "http://127.0.0.1:8080",
    }


def _with_password(database_url: str) -> str:
    """The same database; its server asks for no password, and so takes any."""
    return re.sub(r"://([^@/:]+)(:[^@]*)?@", rf"://\1:{PASSWORD}@", database_url)


def _log(format: Literal["console", "json"], monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """All that is logged, from the lowest level on, and nothing taken out of it."""
    stream = io.StringIO()
    monkeypatch.setattr(core_log, "_SHAPES", ())
    configure_logs(format=format, level="debug", secrets=(), stream=stream)
    return stream


@pytest.mark.both_databases
async def test_no_secret_leaks(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a log, an answer, a page, a metric, an error, a `repr` or the database, on the ways
    that go well and on those that do not."""
    log = _log("console" if database_url.startswith("sqlite") else "json", monkeypatch)
    url = _with_password(database_url)
    garbage, refused, moved = answer(b"no json"), answer(b"", "403 F"), answer(b"", "302 Found")
    came_out: list[bytes] = []
    async with far_end(garbage, garbage, garbage, refused, moved, NOT_FOUND) as flora:
        settings = load_settings(_environ(url, f"http://127.0.0.1:{flora.port}/api/v1"))
        async with (
            open_services(settings, background=True) as services,
            serving(build_app(services)) as root,
        ):
            came_out += [one async for one in _over_http(root)]
            for workspace in services.workspaces:
                await services.sweeper.sweep(workspace)
            await services.poller.poll_due()
            came_out += [one async for one in _errors(url)]
            came_out += _shown(settings, services)
        assert {one["authorization"] for one in flora.asked} == {f"Bearer {KEY}"}
    came_out.append(await _dump(database_url))
    told = log.getvalue()
    assert "callback.taken" in told
    assert "flora.request" in told
    came_out.append(told.encode())
    for text in came_out:
        found = MARKED.search(text)
        assert found is None, text[max(found.start() - 300, 0) : found.end() + 100]


async def _over_http(root: str) -> AsyncIterator[bytes]:
    """What the service answers: to FLORA, to clients without a token, to programs and to people."""
    async with httpx.AsyncClient(base_url=root, timeout=20) as client:
        body = event()
        odd = b'{"id": "whd_odd"}'
        for headers, content in (
            (signed(body, SECRETS[0]), body),
            (signed(body, SECRETS[1]), body),
            (signed(odd, SECRETS[1]), odd),
            (signed(odd, "another"), odd),
            ({"Flora-Signature": sign(odd, SECRETS[0], at=1)}, odd),
            ({"Flora-Signature": "t=1"}, odd),
        ):
            yield _all_of(await client.post(PATH, content=content, headers=headers))
        for path in PAGES:
            yield _all_of(await client.get(path, headers={"Accept": "text/html"}))
            yield _all_of(await client.get(path, headers={"Authorization": "Bearer wrong"}))
        yield _all_of(await sign_in(client, "wrong"))
        yield _all_of(await sign_in(client, TOKEN))
        for path in PAGES:
            yield _all_of(await client.get(path, headers={"Accept": "text/html"}))
        csrf = csrf_of((await client.get("/")).text)
        for path in ("/runs/run_1/check", "/deliveries/whd_odd/replay", "/logout"):
            yield _all_of(await client.post(path, data={"csrf_token": csrf}))
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        for path, given in (
            ("/api/runs", START),
            ("/api/runs", {"technique": 1}),
            ("/api/runs/track", {"run_id": "run_2", "technique_id": "tech_1"}),
            ("/api/runs/track", {"run_id": "run_3", "poll_url": "https://evil.example/"}),
        ):
            yield _all_of(await client.post(path, json=given))


def _all_of(answer: httpx.Response) -> bytes:
    return repr(answer.headers.raw).encode() + answer.content


async def _errors(url: str) -> AsyncIterator[bytes]:
    """How what is set wrong, or does not answer, is told: whole tracebacks."""
    nobody = f"http://127.0.0.1:{free_port()}/api/v1"
    good = _environ(url, nobody)
    down = f"postgresql://tracker:{PASSWORD}@127.0.0.1:{free_port()}/tracker"
    for wrong in (
        {"TRACKER_DATABASE_URL": down},
        {"TRACKER_DATABASE_URL": f"postgresql://tracker:{PASSWORD}@127.0.0.1:port/tracker"},
        {"TRACKER_DATABASE_URL": f"postgresql://tracker:{PASSWORD}@[::1/tracker"},
        {"TRACKER_DATABASE_URL": f"{down}?sslmode=never&password={PASSWORD}"},
        {"TRACKER_DATABASE_URL": f"mysql://tracker:{PASSWORD}@127.0.0.1/tracker"},
        {"TRACKER_DATABASE_URL": f"sqlite:////no/such/folder/{free_port()}.db"},
        {"FLORA_API_KEY": f"{KEY} {KEY}"},
        {"FLORA_BASE_URL": f"https://tracker:{PASSWORD}@127.0.0.1/"},
        {"TRACKER_PUBLIC_URL": f"https://tracker:{PASSWORD}@127.0.0.1/"},
        {"TRACKER_API_TOKEN": f"{TOKEN}\n"},
        {"TRACKER_API_TOKEN": f"{TOKEN}ä"},
        {"TRACKER_POLL_INTERVAL": "never"},
    ):
        try:
            async with open_services(load_settings(good | wrong)):
                pass
        except TrackerError as error:
            yield "".join(traceback.format_exception(error)).encode() + repr(error).encode()
        else:
            assert wrong["TRACKER_API_TOKEN"] == f"{TOKEN}\n"  # spaces around it are no part of it
    async with FloraClient(base_url=nobody, api_key=KEY, deadline=0.2) as client:
        with pytest.raises(TrackerError) as caught:
            await client.get_any_run("run_1")
        yield "".join(traceback.format_exception(caught.value)).encode()


def _shown(*holders: object) -> Iterator[bytes]:
    """How all that is alive shows itself; `holders` is kept alive meanwhile."""
    seen = 0
    for one in gc.get_objects():
        if str(type(one).__module__).startswith(LOOKED_AT):
            seen += 1
            yield f"{one!r} {one}".encode(errors="replace")
    assert seen > 100, holders


async def _dump(database_url: str) -> bytes:
    """Everything in the database."""
    if database_url.startswith("sqlite"):
        path = Path(database_url.removeprefix("sqlite:///"))
        return b"".join(one.read_bytes() for one in sorted(path.parent.glob(f"{path.name}*")))
    connection = await asyncpg.connect(database_url)
    try:
        names = await connection.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        )
        rows = [await connection.fetch(f'SELECT * FROM "{name[0]}"') for name in names]
    finally:
        await connection.close()
    return repr([[tuple(row) for row in table] for table in rows]).encode()


def test_no_command_prints_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither what works nor what fails, whether the database, FLORA or a setting is to blame."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKER_LOG_LEVEL", "debug")
    nobody = f"http://127.0.0.1:{free_port()}/api/v1"
    for name, value in _environ("sqlite:///tracker.db", nobody).items():
        monkeypatch.setenv(name, value)
    down = f"postgresql://tracker:{PASSWORD}@127.0.0.1:{free_port()}/tracker"
    for command, more in (
        (("runs", "show", "run_1"), {}),
        (("runs", "list", "--json"), {}),
        (("runs", "explain", "run_1"), {}),
        (("deliveries", "list"), {}),
        (("doctor",), {"FLORA_API_KEY": ""}),  # with one it asks a FLORA that is not there for long
        (("doctor", "--json"), {"FLORA_API_KEY": "", "TRACKER_DATABASE_URL": down}),
        (("db", "current"), {"TRACKER_DATABASE_URL": down}),
        (("db", "upgrade"), {"TRACKER_DATABASE_URL": down.replace("@127.0.0.1", "@[127")}),
        (("runs", "list"), {"FLORA_API_KEY": f"{KEY} "}),
        (("runs", "list"), {"FLORA_API_KEY": f"{KEY}\t{KEY}"}),
        (("runs", "list"), {"TRACKER_PUBLIC_URL": f"https://a:{PASSWORD}@b"}),
        (("--help",), {}),
    ):
        with monkeypatch.context() as patch:
            for name, value in more.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["tracker", *command])
            with pytest.raises(SystemExit):
                main()
        shown = capsys.readouterr()
        assert shown.out + shown.err, command
        assert not MARKED.search((shown.out + shown.err).encode()), command


def test_the_search_finds_leaked_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search finds each of them in a log, so that finding none says something."""
    log = _log("json", monkeypatch)
    for secret in (KEY, TOKEN, PASSWORD, "marked-p@ssword", *SECRETS):
        core_log.get_logger("x").info("oops", value=secret)
    assert len(MARKED.findall(log.getvalue().encode())) == 6
