"""`make audit`: every locked release is checked, and an incomplete check does not pass."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.waiting import free_port
from tools.audit import LOCKED

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools"

pytestmark = pytest.mark.skipif(not (TOOLS / "uv").exists(), reason="make install brings uv")


class _Service(BaseHTTPRequestHandler):
    """Reports one vulnerability, in a given release."""

    vulnerable = ""
    asked: set[str] = set()  # noqa: RUF012 - set anew by each test

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["content-length"])))["queries"]
        names = [one["package"]["name"] for one in queries]
        self.asked.update(names)
        known = {"vulns": [{"id": "TEST-1", "modified": "2026-01-01T00:00:00Z"}]}
        self._answer({"results": [known if n == self.vulnerable else {} for n in names]})

    def do_GET(self) -> None:
        self._answer({"id": "TEST-1", "modified": "2026-01-01T00:00:00Z", "summary": "made up"})

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def _service(vulnerable: str) -> Iterator[str]:
    _Service.vulnerable, _Service.asked = vulnerable, set()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Service) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _audit(service: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tools.audit", "--service-url", service],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(TOOLS), "UV_HTTP_RETRIES": "0", "UV_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_locked_release_is_checked() -> None:
    """Every release, and a vulnerable one is named with exit status 1."""
    locked = "".join((ROOT / name).read_text(encoding="utf-8") for name in LOCKED)
    with _service("jinja2") as url:
        done = _audit(url)
        assert _Service.asked == set(re.findall(r"^([a-z0-9-]+)==", locked, re.MULTILINE))
    assert done.returncode == 1, done.stderr
    assert "jinja2" in done.stdout
    with _service("") as url:
        assert _audit(url).returncode == 0


def test_an_incomplete_check_does_not_pass() -> None:
    """Without an answer the exit status is 2, with a message."""
    done = _audit(f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "NOT CHECKED" in done.stderr
