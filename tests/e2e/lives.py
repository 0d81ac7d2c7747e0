"""Short lives of `tracker` processes, by the hundred: forked from one that has imported it all.

A process of its own takes a second to import what it needs; one that is forked is there at once,
and is as much a process: SIGKILL takes it alone, with its sockets, files and threads.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx

# What a process imports when it serves: loaded once, before any is forked.
from tests.e2e import hurried  # noqa: F401
from tests.support.waiting import eventually
from tracker.cli import main
from tracker.store import batch_postgres, batch_sqlite  # noqa: F401
from tracker.web import app, server  # noqa: F401
from tracker.worker import scheduler  # noqa: F401

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.e2e.lives"])


class Life:
    """One `tracker` process, from its start to its end. What it says goes to `log`."""

    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    def begin(
        cls,
        *arguments: str,
        env: Mapping[str, str],
        log: Path,
        prepare: Callable[[], None] | None = None,
    ) -> "Life":
        """Start `tracker ARGUMENTS…` with these variables alone; it calls `prepare` before."""
        env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env}
        process = _FORKING.Process(target=_live, args=(arguments, env, log, prepare))
        process.start()
        return cls(process, log)

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, a signal being negative; `None` while it lives."""
        return self._process.exitcode

    @property
    def killed(self) -> bool:
        """Whether SIGKILL has ended it."""
        return self.status == -signal.SIGKILL

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def ready(self, url: str) -> bool:
        """Wait until it answers 200 there, or ends; whether it lives."""

        async def settled() -> bool:
            if self.status is not None:
                return True
            try:
                return (await client.get(url)).status_code == 200
            except httpx.TransportError:
                return False

        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            await eventually(settled, timeout=20)
        return self.status is None

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def tell(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def freeze(self) -> None:
        """SIGSTOP: connections are taken, and nothing is ever answered."""
        os.kill(self.pid, signal.SIGSTOP)

    async def end(self, timeout: float = 30) -> int:
        """Wait for its end; the exit status."""
        try:
            await eventually(lambda: self.status is not None, timeout=timeout, interval=0.005)
        finally:
            if self.status is None:
                self.kill()
                await asyncio.to_thread(self._process.join)
        assert self.status is not None
        return self.status


def _live(
    arguments: tuple[str, ...],
    env: Mapping[str, str],
    log: Path,
    prepare: Callable[[], None] | None,
) -> None:
    """`tracker ARGUMENTS…` in this process, which has no other life."""
    os.environ.clear()
    os.environ.update(env)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if prepare is not None:
        prepare()
    sys.argv = ["tracker", *arguments]
    main()
