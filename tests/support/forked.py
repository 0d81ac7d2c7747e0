"""Short lives of `tracker` processes, by the hundred: forked from one that has imported it all.

A process of its own takes most of a second to import what it needs; one that is forked is there at
once, and is as much a process: SIGKILL takes it alone, with its sockets, files and threads.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TextIO

from tests.support.waiting import eventually
from tracker import worker  # noqa: F401

# What the commands import when they run, and what libraries import when they are first used:
# loaded once, before any is forked.
from tracker.cli import main, output
from tracker.operations import doctor, retention  # noqa: F401
from tracker.simulator import serve  # noqa: F401
from tracker.web import app  # noqa: F401

for _module in (
    "aiosqlite",
    "alembic.command",
    "anyio._backends._asyncio",
    "apscheduler.executors.asyncio",
    "asyncpg",
    "encodings.idna",
    "httpcore",
    "openpyxl.reader.excel",
    "openpyxl.writer.excel",
    "stringprep",
    "tracker.cli.app",
    "tracker.services",
    "tracker.store.copy",
    "tracker.sync",
    "tracker.web.http.server",
    "typer._click._textwrap",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
):
    importlib.import_module(_module)

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload([__name__, "tests.support.warm"])

TRACKER = ("-m", "tracker")


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
        program: Sequence[str] = TRACKER,
    ) -> "Forked":
        """Start `tracker ARGUMENTS…` in `folder`, with these variables alone; it calls `prepare`
        before. What it prints is added to `output`, or where there is `errors`, in parts to both.
        Where `output` is a terminal, it reads from that too. Another `program` is what `python`
        takes: a file, `-m MODULE` or `-c TEXT`, and `-W ACTION` before.
        """
        streams = (output, errors or output)
        command = (*program, *arguments)
        process = _FORKING.Process(
            target=_live, args=(command, dict(env), streams, folder, prepare), daemon=True
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


class _Printed:
    """What a process adds to a file, as if it came from a pipe."""

    def __init__(self, file: TextIO, process: Forked) -> None:
        self._file = file
        self._process = process

    def readline(self) -> str:
        """The next line, once it is whole; what is left of it, or nothing, once the process has
        ended."""
        line = ""
        while not line.endswith("\n"):
            ended = self._process.returncode is not None
            more = self._file.readline()
            line += more
            if not more:
                if ended:
                    break
                time.sleep(0.005)
        return line

    def rest(self) -> str:
        """What it has printed since the last line that was read."""
        return self._file.read()


class ForkedPython:
    """`python COMMAND…`, forked: what `subprocess.Popen` is to a process of its own, as far as the
    tests use it, with text in `stdout` and `stderr`."""

    def __init__(
        self,
        *command: str,
        env: Mapping[str, str],
        cwd: Path | None = None,
        together: bool = False,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Where `together`, what it prints to stderr is in `stdout` too."""
        self._folder = TemporaryDirectory()
        output, errors = (Path(self._folder.name, name) for name in ("stdout", "stderr"))
        output.touch()
        errors.touch()
        self._files = (output.open(), errors.open())
        self._process = Forked.begin(
            env=env,
            output=output,
            errors=output if together else errors,
            folder=cwd,
            prepare=prepare,
            program=command,
        )
        self.pid = self._process.pid
        self.send_signal = self._process.send_signal
        self.stdout, self.stderr = (_Printed(file, self._process) for file in self._files)

    @property
    def returncode(self) -> int | None:
        """The exit status, a signal being negative; `None` while it lives."""
        return self._process.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for its end; what it printed that was not read before. Kills it after so long, and
        raises TimeoutError."""
        self._process.join(timeout)
        return self.stdout.rest(), self.stderr.rest()

    def kill(self) -> None:
        """End it, if it lives, and wait for that."""
        self.send_signal(signal.SIGKILL)
        self._process.join(10)

    def __enter__(self) -> "ForkedPython":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for file in self._files:
            file.close()
        self._folder.cleanup()


def run_python(
    *command: str,
    env: Mapping[str, str],
    cwd: Path | None = None,
    together: bool = False,
    timeout: float = 60,
) -> "subprocess.CompletedProcess[str]":
    """Run `python COMMAND…` to its end, forked."""
    with ForkedPython(*command, env=env, cwd=cwd, together=together) as process:
        output, errors = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _live(
    command: tuple[str, ...],
    env: Mapping[str, str],
    streams: tuple[Path, Path],
    folder: Path | None,
    prepare: Callable[[], None] | None,
) -> None:
    """`python COMMAND…` in this process, which has no other life."""
    os.environ.clear()
    os.environ.update(env)
    for number, stream in enumerate(streams, start=1):
        with stream.open("ab") as output:
            os.dup2(output.fileno(), number)
    is_terminal = streams[0].is_char_device()
    os.dup2(os.open(streams[0] if is_terminal else os.devnull, os.O_RDWR | os.O_NOCTTY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if is_terminal:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if folder is not None:
        os.chdir(folder)
    if prepare is not None:
        prepare()
    if command[: len(TRACKER)] == TRACKER:
        sys.argv = [str(Path(sys.executable).with_name("tracker")), *command[len(TRACKER) :]]
        main()
    try:
        _interpret(command)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _interpret(command: tuple[str, ...]) -> None:
    """What Python does with its command line."""
    # It may have children, which this process's forks are not to have.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    while command[0] == "-W":
        warnings.simplefilter(command[1])  # type: ignore[arg-type]
        command = command[2:]
    what, *arguments = command
    if what == "-c":
        text, *arguments = arguments
        sys.argv = ["-c", *arguments]
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), vars(module))  # noqa: S102
    elif what == "-m":
        name, *arguments = arguments
        sys.argv = [name, *arguments]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *arguments]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")
