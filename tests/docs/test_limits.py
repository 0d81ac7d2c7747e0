"""The sizes and times of docs/proxy.md are those of the tracker, and the proxies shown fit them."""

import re

import pytest

from tests.docs.pages import DOCS, ROOT, blocks
from tracker import worker
from tracker.services import CLOSE_SECONDS
from tracker.web.http import Limits
from tracker.web.http.server import CANCEL_SECONDS, GRACE_SECONDS

PAGE = DOCS / "proxy.md"
LIMITS = Limits()
FLORA_WAITS = 10


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("body of a callback", f"{LIMITS.callback_bytes // 1024} KiB"),
        ("body of an API request", f"{LIMITS.api_bytes // 1024**2} MiB"),
        ("answer to a callback", f"within {LIMITS.callback_seconds:g} s"),
        ("start of other answers", f"{LIMITS.answer_seconds:g} s"),
        ("`/api/stream`", f"every {LIMITS.stream_heartbeat:g} s"),
        ("head of a request", f"{LIMITS.head_bytes // 1024} KiB, within {LIMITS.head_seconds:g} s"),
        ("open connections", f"{LIMITS.connections} per process"),
        ("idle connection", f"{LIMITS.idle_seconds:g} s"),
        ("stopping", f"{GRACE_SECONDS} s"),
    ],
)
def test_the_table_lists_the_limits(row: str, says: str) -> None:
    """Each limit in the table is the one that holds."""
    (cells,) = re.findall(rf"^\| {re.escape(row)}[^|]*\|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    assert says in cells


def test_a_stop_ends_within_its_promise() -> None:
    """The time limits of its steps, and two seconds for what is cut short, add up to no more."""
    (promised,) = set(
        re.findall(r"ends? within (\d+) s", (DOCS / "production.md").read_text(encoding="utf-8"))
    )
    answering = GRACE_SECONDS + CANCEL_SECONDS
    working = worker.STOP_SECONDS + worker.CANCEL_SECONDS  # meanwhile
    assert max(answering, working) + CLOSE_SECONDS + 2 <= int(promised)


def test_the_proxies_that_are_shown_fit() -> None:
    """A proxy waits for as long as the tracker may take, gives up before FLORA does, and keeps no
    connection that the tracker has closed."""
    nginx = {block.title: block.text for block in blocks(PAGE, "nginx")}
    callbacks = nginx["callbacks"].partition("/callbacks/flora")[2].partition("}")[0]
    caddy = {block.title: block.text for block in blocks(PAGE, "caddyfile")}
    compose = (ROOT / "deploy/compose/Caddyfile").read_text(encoding="utf-8")
    public, private = compose.split("http://:8080 {")
    for waits in (
        seconds(r"proxy_read_timeout (\d+)s", callbacks),
        seconds(r"response_header_timeout (\d+)s", caddy["callbacks"]),
        seconds(r"response_header_timeout (\d+)s", public),
    ):
        assert LIMITS.callback_seconds < waits < FLORA_WAITS
    for kept in (
        *(seconds(r"keepalive_timeout (\d+)s", text) for text in nginx.values()),
        *(seconds(r"keepalive (\d+)s", text) for text in (public, private, *caddy.values())),
    ):
        assert kept < LIMITS.idle_seconds
    for title, text in nginx.items():
        most = LIMITS.batch_bytes if title == "dashboard and API" else LIMITS.callback_bytes
        assert seconds(r"client_max_body_size (\d+)m", text) * 1024**2 >= most
    for text, most in ((public, LIMITS.callback_bytes), (private, LIMITS.batch_bytes)):
        assert seconds(r"max_size (\d+)MB", text) * 1000**2 >= most
        assert seconds(r"request_buffers (\d+)MB", text) * 1000**2 >= most


def seconds(pattern: str, text: str) -> int:
    """The one number that a pattern finds."""
    (found,) = re.findall(pattern, text)
    return int(found)
