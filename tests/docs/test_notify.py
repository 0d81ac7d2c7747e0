"""The receivers that docs/notify.md shows take what the tracker signs, and nothing else."""

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs.pages import DOCS, blocks
from tests.docs.session import SECRETS
from tests.support.waiting import eventually, free_port
from tracker.core.clock import utc_now
from tracker.core.events import WAITS, new_secret, signed_headers
from tracker.core.formatting import duration

PAGE = DOCS / "notify.md"
SECRET = SECRETS["shop_secret"]
BODY = (
    b'{"type":"run.settled","data":{"run_id":"run_1","status":"completed","charged_cost":0.25,'
    b'"technique_name":"Gr\xc3\xb6\xc3\x9fe"}}'
)
Receive = Callable[[bytes, dict[str, str]], int]


def judge(receive: Receive) -> None:
    """A signed request is taken; a changed, foreign or old one is not."""

    def headers(*secrets: str, at: Any = None) -> dict[str, str]:
        return signed_headers("msg_1", BODY, secrets, at=at or utc_now())

    assert receive(BODY, headers(SECRET)) == 204
    assert receive(BODY, headers(new_secret(), SECRET)) == 204  # a rotation
    assert receive(BODY + b" ", headers(SECRET)) == 401
    assert receive(BODY, headers(new_secret())) == 401
    assert receive(BODY, headers(SECRET, at=utc_now() - timedelta(hours=1))) == 401


def test_the_python_receiver_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of the page, as it stands there."""
    block = blocks(PAGE, "python")[0]
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    names: dict[str, Any] = {}
    exec(compile(block.text, PAGE.name, "exec"), names)  # noqa: S102
    judge(names["receive"])


@pytest.mark.parametrize(
    ("program", "command"),
    [("receiver.mjs", ("node", "receiver.mjs")), ("receiver.go", ("go", "run", "receiver.go"))],
)
async def test_other_receivers_verify(
    program: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    """The whole program of the page, where its language is installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    (block,) = (one for one in blocks(PAGE) if one.title == program)
    port = free_port()
    (tmp_path / program).write_text(block.text.replace("127.0.0.1:3000", f"127.0.0.1:{port}"))
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"WEBHOOK_SECRET": SECRET, "PORT": str(port)},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:

            def receive(body: bytes, headers: dict[str, str]) -> int:
                return client.post("/hook", content=body, headers=headers).status_code

            def serves() -> bool:
                with suppress(httpx.TransportError):
                    return receive(b"", {}) == 401
                return False

            await eventually(serves, timeout=30)
            judge(receive)
    finally:
        process.terminate()
        process.wait()


def test_the_schedule_is_that_of_the_page() -> None:
    """The waits between attempts stand there, in order."""
    waits = [duration(wait) for wait in WAITS]
    assert f"{', '.join(waits[:-1])} and {waits[-1]} later" in PAGE.read_text().replace(
        "24 h", "1 d"
    )
