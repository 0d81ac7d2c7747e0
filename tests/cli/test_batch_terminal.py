"""`tracker batch` at a terminal: it asks before it spends, and its lines fit."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Commands, simulate
from tests.support.forked import Forked

COLUMNS = 80
SHEET = "SKU,prompt\nA-1,garden tools\nA-2,garden tools\nA-3,garden tools\nA-4,kitchen tools\n"


@pytest.fixture
def flora(tracker: Commands, stack: ExitStack) -> Commands:
    """The command line, with a FLORA whose runs are short and complete, and a sheet."""
    simulate(tracker, stack, "--run-seconds", "0.5", "--failures", "0%")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    (tracker.folder / "products.csv").write_text(SHEET)
    return tracker


def at_terminal(
    tracker: Commands, *arguments: str, answer: str | signal.Signals = ""
) -> tuple[int, str]:
    """Run a command at a terminal of 80 columns; its status and what it shows. The `answer` is
    typed, or the signal sent, once it asks."""
    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    process = Forked.begin(
        *arguments,
        env=tracker._environ({"TERM": "xterm", "COLUMNS": str(COLUMNS)}),
        output=Path(os.ttyname(theirs)),
        folder=tracker.folder,
    )
    shown, deadline = b"", time.monotonic() + 40
    try:
        while time.monotonic() < deadline:
            ended = process.returncode is not None
            if select.select([own], [], [], 0 if ended else 0.05)[0]:
                shown += os.read(own, 65_536)
            elif ended:
                break
            if answer and b"[y/N]" in shown:
                if isinstance(answer, str):
                    os.write(own, answer.encode())
                else:
                    process.send_signal(answer)
                answer = ""
        return process.join(timeout=10), shown.decode()
    finally:
        process.send_signal(signal.SIGKILL)
        process.join(timeout=10)
        os.close(own)
        os.close(theirs)


def runs(tracker: Commands) -> int:
    """How many runs FLORA knows."""
    root = tracker.environ["FLORA_BASE_URL"].removesuffix("/api/v1")
    return len(httpx.get(f"{root}/simulator/runs").json()["runs"])


def test_nothing_is_spent_without_a_yes(flora: Commands) -> None:
    """Number and price are asked for, no by default; repeated rows and their price are named."""
    command = ("batch", "icon-pack", "products.csv")
    for answer in ("n\n", "\n"):
        status, shown = at_terminal(flora, *command, answer=answer)
        assert status == 1
        assert "Lines 3 and 4 repeat line 2: each is a run of its own, $0.50 more" in shown
        assert "Start 4 runs, up to $1.00? [y/N]" in shown
        assert "nothing was started" in shown
    status, shown = at_terminal(flora, *command, answer=signal.SIGINT)
    assert status == 130
    assert "interrupted; nothing was started" in shown
    assert runs(flora) == 0


def test_the_progress_fits_the_terminal(flora: Commands) -> None:
    """With a yes the rows start; no line of the progress is wider than the terminal, and a repeated
    command with nothing to start does not ask."""
    (flora.folder / "a-sheet-with-quite-a-long-name-for-a-file.csv").write_text(SHEET)
    command = ("batch", "icon-pack", "a-sheet-with-quite-a-long-name-for-a-file.csv")
    status, shown = at_terminal(flora, *command, answer="y\n")
    assert status == 0, shown
    assert runs(flora) == 4
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\r", shown)
    bars = [line for line in re.split(r"[\r\n]+", plain) if "a-sheet-with-q" in line]
    assert any("4 of 4 completed" in line for line in re.split(r"[\r\n]+", plain))
    assert max(map(len, bars)) <= COLUMNS
    status, shown = at_terminal(flora, *command)
    assert status == 0
    assert "[y/N]" not in shown
    assert "tracker runs download --batch bat_" in shown
    assert "--to out --name-by SKU" in shown
