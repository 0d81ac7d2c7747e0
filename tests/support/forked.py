"""Short lives of `tracker` processes, by the hundred: forked from one that has imported it all.

A process of its own takes most of a second to import what it needs; one that is forked is there at
once, and is as much a process: SIGKILL takes it alone, with its sockets, files and threads.
"""

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.support.waiting import eventually

# What the commands import when they run, and what libraries import when they are first used:
# loaded once, before any is forked.
from tracker import demo  # noqa: F401
from tracker.cli import main, output
from tracker.operations import doctor, retention  # noqa: F401
from tracker.simulator import serve  # noqa: F401
from tracker.store.writing import statements_postgres, statements_sqlite  # noqa: F401
from tracker.web import app  # noqa: F401
from tracker.worker import scheduler  # noqa: F401

for _module in (
    "aiosqlite",
    "alembic.command",
    "anyio._backends._asyncio",
    "apscheduler.executors.asyncio",
    "httpcore",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
):
    importlib.import_module(_module)

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload([__name__, "tests.support.warm"])


def share_server() -> None:
    """Start the process that forks them now: the processes that are forked from this one later use
    it together."""
    forkserver.ensure_running()
    # They could not ask for its end, as it is no child of theirs.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]


def report_no_waits() -> None:
    """Let a command not report that it waits for FLORA: one that stands still for a second is no
    part of what a test expects on stderr."""
    output._WAIT_SHOWN_AFTER = 60.0  # type: ignore[misc]


class Forked:
    """One `tracker` process, from its start to its end."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @classmethod
    def begin(
        cls,
        *arguments: str,
        env: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
        folder: Path | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> "Forked":
        """Start `tracker ARGUMENTS…` in `folder`, with these variables alone; it calls `prepare`
        before. What it prints is added to `output`, or where there is `errors`, in parts to both.
        Where `output` is a terminal, it reads from that too.
        """
        streams = (output, errors or output)
        process = _FORKING.Process(
            target=_live, args=(arguments, env, streams, folder, prepare), daemon=True
        )
        process.start()
        return cls(process)

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, a signal being negative; `None` while it lives."""
        return self._process.exitcode

    def send_signal(self, what: signal.Signals) -> None:
        """Tell it something, if it is there to hear it."""
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it may have ended just now
                os.kill(self.pid, what)

    async def wait(self, timeout: float = 60) -> int:
        """Wait for its end; the exit status."""
        await eventually(lambda: self.returncode is not None, timeout=timeout, interval=0.005)
        assert self.returncode is not None
        return self.returncode

    def join(self, timeout: float) -> int:
        """Wait for its end without an event loop; the exit status. Kills it after so long, and
        raises TimeoutError."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"tracker did not end within {timeout:g} s")
        return self.returncode


def _live(
    arguments: tuple[str, ...],
    env: Mapping[str, str],
    streams: tuple[Path, Path],
    folder: Path | None,
    prepare: Callable[[], None] | None,
) -> None:
    """`tracker ARGUMENTS…` in this process, which has no other life."""
    os.environ.clear()
    os.environ.update(env)
    for number, stream in enumerate(streams, start=1):
        with stream.open("ab") as output:
            os.dup2(output.fileno(), number)
    if streams[0].is_char_device():
        os.dup2(os.open(streams[0], os.O_RDWR | os.O_NOCTTY), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if folder is not None:
        os.chdir(folder)
    if prepare is not None:
        prepare()
    sys.argv = ["tracker", *arguments]
    main()
