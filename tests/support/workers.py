"""Processes of pytest-xdist that are forked from one that has imported all tests.

A process that begins as a new Python spends seconds on its imports, the more of them the fewer
processors there are.
"""

import gc
import importlib
import multiprocessing
import os
import sys
import warnings
from contextlib import suppress
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import IO, Any

import execnet.gateway_io
import pytest

_FORKING = multiprocessing.get_context("fork")


class _ForkedWorker:
    """What execnet asks of the process that it would have started: its two pipes and its end."""

    def __init__(self, others: "list[_ForkedWorker]") -> None:
        reads, writes = os.pipe()
        answers, says = os.pipe()
        self.stdin: IO[bytes] = open(writes, "wb")  # noqa: SIM115
        self.stdout: IO[bytes] = open(answers, "rb")  # noqa: SIM115
        ours = [pipe for one in (*others, self) for pipe in (one.stdin, one.stdout)]
        self._process: BaseProcess = _FORKING.Process(target=_work, args=(reads, says, ours))
        self._process.start()
        os.close(reads)
        os.close(says)

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _work(stdin: int, stdout: int, not_ours: list[IO[bytes]]) -> None:
    """Do what execnet's own command line does: run the first line that comes."""
    for pipe in not_ours:
        pipe.close()  # an end that is open here keeps the others from seeing that it is closed
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.close(stdin)
    os.close(stdout)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(eval(sys.stdin.readline()), vars(main))  # noqa: S102, S307


class _ForkedIO(execnet.gateway_io.Popen2IOMaster):
    """The controller's end of the pipes to one of them."""

    def __init__(self, worker: _ForkedWorker, execmodel: Any) -> None:
        self.popen = worker
        execnet.gateway_base.Popen2IO.__init__(self, worker.stdin, worker.stdout, execmodel)


def fork_workers(config: pytest.Config, number: int) -> None:
    """Import the tests, fork so many workers, and let execnet use them: before it has threads.

    One that takes the place of a crashed worker is a new Python, as ever.
    """
    _import_tests(config)
    if forked := sys.modules.get("tests.support.forked"):
        forked.share_server()
    gc.collect()
    gc.freeze()
    workers: list[_ForkedWorker] = []
    for _ in range(number):
        workers.append(_ForkedWorker(workers))
    create_io = execnet.gateway_io.create_io

    def take_forked(spec: Any, execmodel: Any) -> Any:
        return _ForkedIO(workers.pop(), execmodel) if workers else create_io(spec, execmodel)

    execnet.gateway_io.create_io = take_forked


def _import_tests(config: pytest.Config) -> None:
    """Import what will be collected. What cannot be imported without a warning is the worker's to
    report."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for argument in config.args:
            path = (config.invocation_params.dir / argument.split("::")[0]).resolve()
            files = [path]
            if path.is_dir():  # a folder's conftest.py comes before its tests
                files = sorted(path.rglob("conftest.py")) + sorted(path.rglob("test_*.py"))
            for file in files:
                name = ".".join(file.relative_to(config.rootpath).with_suffix("").parts)
                with suppress(Exception):
                    importlib.import_module(name)
    with suppress(ImportError):  # Hypothesis reads all modules for their constants, once
        from hypothesis.internal.conjecture.providers import _get_local_constants

        _get_local_constants()
    with suppress(ImportError):  # and asks every character whether UTF-8 has it
        from hypothesis.internal.charmap import intervals_from_codec

        intervals_from_codec("utf-8")
