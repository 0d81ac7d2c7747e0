"""Fixtures: commands that run to their end, and processes that stay until the test is over."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from tests.support.forked import TRACKER, Forked, ForkedPython, report_no_waits


class Terminal:
    """What a command shows on its terminal."""

    def __init__(self, descriptor: int, process: Forked) -> None:
        self.process = process
        self._descriptor = descriptor
        self._shown = b""

    @property
    def status(self) -> int:
        """The exit status of the command, which has ended."""
        return self.process.join(timeout=15)

    def read(self, until: str | None = None, timeout: float = 40) -> str:
        """All that is shown until a text appears, or the command ends; without colours."""
        deadline = time.monotonic() + timeout
        while until is None or until not in self._text:
            left = deadline - time.monotonic()
            assert left > 0, f"{until!r} does not appear in {self._text!r}"
            ended = self.process.returncode is not None
            if select.select([self._descriptor], [], [], 0 if ended else min(left, 0.05))[0]:
                self._shown += os.read(self._descriptor, 65536)
            elif ended:
                break
        assert until is None or until in self._text, f"{until!r} does not appear in {self._text!r}"
        return self._text

    @property
    def _text(self) -> str:
        text = self._shown.decode(errors="replace").replace("\r\n", "\n")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def _prepare(prepare: Callable[[], None] | None) -> None:
    report_no_waits()
    if prepare is not None:
        prepare()


class Commands:
    """Runs `tracker` in a folder of its own, where `tracker.db` comes to lie.

    `environ` holds all that the commands find set, but for the essentials.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ: dict[str, str] = {}

    def __call__(
        self, *arguments: str, prepare: Callable[[], None] | None = None, **environ: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; its process calls `prepare` first, and does not report that
        it waits for FLORA."""
        with TemporaryDirectory() as place:
            output, errors = Path(place, "stdout"), Path(place, "stderr")
            process = Forked.begin(
                *arguments,
                env=self._environ(environ),
                output=output,
                errors=errors,
                folder=self.folder,
                prepare=partial(_prepare, prepare),
            )
            status = process.join(timeout=50)
            return subprocess.CompletedProcess(
                arguments, status, output.read_text(), errors.read_text()
            )

    def json(self, *arguments: str, **environ: str) -> Any:
        """What a command that has to succeed prints with `--json`; all of stdout has to be that."""
        done = self(*arguments, "--json", **environ)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def on_terminal(
        self, *arguments: str, columns: int, **environ: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end on a terminal so wide; all that it shows is `stdout`."""
        with self.terminal(*arguments, columns=columns, **environ) as shown:
            text = shown.read()
        return subprocess.CompletedProcess(arguments, shown.status, text, "")

    @contextmanager
    def terminal(self, *arguments: str, columns: int = 80, **environ: str) -> "Iterator[Terminal]":
        """A command on a terminal of its own; at the end it is told to stop, and has to."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, columns))
        process = Forked.begin(
            *arguments,
            env=self._environ({"TERM": "xterm", "COLUMNS": "", **environ}),
            output=Path(os.ttyname(theirs)),
            folder=self.folder,
        )
        shown = Terminal(ours, process)
        try:
            yield shown
        finally:
            process.send_signal(signal.SIGINT)
            shown.read()
            process.join(timeout=15)
            os.close(ours)
            os.close(theirs)

    @contextmanager
    def running(self, *arguments: str, **environ: str) -> Iterator[ForkedPython]:
        """A command that stays; at the end it is told to stop, and has to."""
        env = self._environ(environ)
        with ForkedPython(*TRACKER, *arguments, env=env, cwd=self.folder) as process:
            yield process
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=15)

    @property
    def essential(self) -> dict[str, str]:
        """What every process finds set."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return kept | {"COLUMNS": "100"}

    def _environ(self, more: Mapping[str, str]) -> dict[str, str]:
        return {**self.essential, **self.environ, **more}


@pytest.fixture
def tracker(tmp_path: Path, sqlite_url: str) -> Commands:
    """The command line, with nothing set, where `tracker.db` has the schema already: to migrate it
    takes longer than a command."""
    return Commands(tmp_path)


@pytest.fixture
def new_tracker(tmp_path: Path) -> Commands:
    """The command line, with nothing set, where no database is yet."""
    return Commands(tmp_path)


@pytest.fixture(autouse=True)
def _patient(patient: None) -> None:
    """A test's own access to the database is not given up while another process pauses."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends what a test leaves running."""
    with ExitStack() as stack:
        yield stack


def first_line(process: ForkedPython) -> str:
    """The first line that a process writes to stderr, but for those that report that it waits for a
    FLORA that stands still."""
    while (line := process.stderr.readline()).startswith("tracker: Waiting for FLORA's answer"):
        pass
    return line


def set_faults(tracker: Commands, **faults: Any) -> None:
    """Change faults of the FLORA that `simulate` started."""
    root = tracker.environ["FLORA_BASE_URL"].removesuffix("/api/v1")
    httpx.post(f"{root}/simulator/faults", json=faults).raise_for_status()


def simulate(tracker: Commands, stack: ExitStack, *arguments: str) -> None:
    """Start `tracker simulate` on a free port, and let later commands use it."""
    output, errors = (tracker.folder / f"simulate.{name}" for name in ("out", "err"))
    output.write_text("")
    simulator = Forked.begin(
        *("simulate", "--port", "0", "--json", *arguments),
        env=tracker.essential,
        output=output,
        errors=errors,
        folder=tracker.folder,
    )
    stack.callback(simulator.join, timeout=15)
    stack.callback(simulator.send_signal, signal.SIGTERM)
    while not (text := output.read_text()).endswith("}}\n"):
        assert simulator.returncode is None, errors.read_text()
        time.sleep(0.01)
    tracker.environ |= json.loads(text)["environment"]
