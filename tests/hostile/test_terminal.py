"""Other people's text on a terminal and in the log: it steers nothing and forges no line."""

import asyncio
import io
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import httpx
import pytest

from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve
from tests.web.dashboard.conftest import TOKEN
from tests.web.dashboard.hostile import attack
from tracker.cli.app import main
from tracker.core.formatting import plain, plain_lines
from tracker.operations.telemetry import configure_logs
from tracker.services import open_services
from tracker.settings import Settings

STEERS = (
    "\x1b[2J\x1b]0;owned\x07\r\n2026-01-01 [info     ] forged\x08\x7f\x9b31m\x85"
    "\N{RIGHT-TO-LEFT OVERRIDE}\N{LINE SEPARATOR}\N{RIGHT-TO-LEFT ISOLATE}"
)
LEFT = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
RUN, TECHNIQUE = f"run_{STEERS}", f"tech_{STEERS}"
COMMANDS = (
    ("runs", "list"),
    ("runs", "show", RUN),
    ("runs", "show", f"none_{STEERS}"),
    ("runs", "explain", RUN),
    ("runs", "explain", f"none_{STEERS}"),
    ("runs", "watch", f"none_{STEERS}"),
    ("runs", "track", RUN),
    ("runs", "start", STEERS, "--input", f"{STEERS}:text={STEERS}"),
    ("runs", "start", "icon-pack", "--input", STEERS),
    ("runs", "download", RUN, "--to", "files"),
    ("runs", STEERS),
    ("deliveries", "list"),
    ("deliveries", "show", f"whd_{STEERS}0"),
    ("deliveries", "show", f"none_{STEERS}"),
    ("deliveries", "replay", "--all"),
    ("techniques", "list"),
    ("techniques", "show", TECHNIQUE),
    ("techniques", "sync"),
    ("batches", "list"),
    ("batches", "show", f"batch_{STEERS}", "--results", "table"),
    ("batch", STEERS, "rows.csv"),
    ("batch", TECHNIQUE, "rows.csv", "--dry-run"),
    ("reconcile",),
    ("poll",),
    ("doctor",),
    (STEERS,),
)


async def _fill(folder: Path) -> None:
    settings = Settings(tracker_database_url=f"sqlite:///{folder / 'tracker.db'}")
    async with open_services(settings) as services:
        await attack(services, STEERS)


class _Flora(BaseHTTPRequestHandler):
    """Refuses everything, in words that would steer."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        fault = {"field": STEERS, "message": STEERS}
        body = json.dumps({"error": {"code": STEERS, "message": STEERS, "fields": [fault]}})
        self.send_response(403 if "/techniques/" in self.path else 400)
        self.send_header("request-id", "req_\x1b[2J\x9b2J")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Says nothing: stderr is what is looked at."""


@contextmanager
def _flora_that_steers() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Flora) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api/v1"
        finally:
            server.shutdown()
            thread.join()


def test_foreign_text_does_not_control_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What FLORA, a sheet or an argument holds is shown with its escapes, on stdout and stderr,
    by every command that shows something."""
    asyncio.run(_fill(tmp_path))
    (tmp_path / "rows.csv").write_text(f'"{STEERS}"\n"{STEERS}"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKER_LOG_FORMAT", "console")
    monkeypatch.setenv("FLORA_API_KEY", "sk_test_key")
    with _flora_that_steers() as base_url:
        monkeypatch.setenv("FLORA_BASE_URL", base_url)
        for command in COMMANDS:
            monkeypatch.setattr(sys, "argv", ["tracker", *command])
            with pytest.raises(SystemExit):
                main()
            shown = capsys.readouterr()
            assert shown.out + shown.err, command
            assert "sk_test_key" not in shown.out + shown.err, command
            assert not LEFT.search(shown.out), (command, shown.out)
            assert not LEFT.search(shown.err), (command, shown.err)
            assert not re.search(r"^2026-01-01", shown.out + shown.err, re.MULTILINE), command


@pytest.mark.parametrize("format", ["console", "json"])
async def test_no_request_forges_a_log_line(
    serve: Serve, sqlite_url: str, format: Literal["console", "json"]
) -> None:
    """Paths, headers, ids and what FLORA answers stay within the line that reports them."""
    stream = io.StringIO()
    with _flora_that_steers() as flora:
        given = {"flora_api_key": "sk_test_key", "flora_base_url": flora}
        given["flora_workspace_id"] = "ws_1"
        async with serve(sqlite_url, tracker_api_token=TOKEN, **given) as site:
            configure_logs(format=format, level="debug", stream=stream)
            site.client.headers["Authorization"] = f"Bearer {TOKEN}"
            await _steer(site.client)
            workspace = next(iter(site.services.workspaces))
            await site.services.sweeper.sweep(workspace)
            await site.services.poller.poll_due()
    told = stream.getvalue()
    assert told.count("callback.") >= 3
    assert "request.failed" in told
    assert not LEFT.search(told), told
    for line in told.splitlines():
        if format == "json":
            assert isinstance(json.loads(line), dict)
        else:
            assert not line.startswith("2026-01-01"), line


async def _steer(client: httpx.AsyncClient) -> None:
    """Requests whose every part would steer a terminal, if it were shown as it is."""
    for number, body in enumerate(
        (
            event(RUN[:255]),
            event(STEERS, id=STEERS, type=STEERS),
            json.dumps({"id": f"{STEERS}2", "type": STEERS}).encode(),
            STEERS.encode(),
        )
    ):
        headers = {"Flora-Webhook-Id": f"whd_\x9b2J{number}", "X-Request-Id": "\x9b2J"}
        sent = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = await client.post(PATH, content=body, headers={**signed(body), **sent})
        assert answer.status_code == 200
        assert re.fullmatch(r"[A-Za-z0-9._-]+", answer.headers["X-Request-Id"])
    await client.post(PATH, content=b"{}", headers={"Flora-Signature": "t=1,v1=\t2J"})
    start = {"technique": STEERS, "inputs": [{"id": STEERS, "type": "text", "value": STEERS}]}
    await client.post("/api/runs", json=start)
    await client.post("/api/runs", json={**start, "technique": "tech_1"})
    await client.post("/api/runs/track", json={"run_id": RUN, "poll_url": STEERS})
    for path in ("/api/techniques/%1B%5B2J%0D%0Aforged", "/runs/%1B%5B2J%0A%C2%9B", "/%0A%1B"):
        await client.get(path, headers={"Accept": "text/html"})


def test_control_characters_are_escaped() -> None:
    """Letters of every script stay as they are, spaces too; `plain_lines` keeps line ends."""
    assert plain("a\tb\nc\x1b[0m\x9b\u202e\ud800") == r"a\x09b\x0ac\x1b[0m\x9b\u202e\ud800"
    assert plain_lines("a\tb\nc\r") == "a\tb\nc\\x0d"
    for text in ("größer 日本語 👩‍🚀 \N{NO-BREAK SPACE}", "שלום", ""):
        assert plain(text) == plain_lines(text) == text
