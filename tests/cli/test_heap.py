"""A process that stays does not scatter its memory over a heap for each of its threads."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys, threading
from tracker.cli.serve import share_heap
if sys.argv[1:]:
    share_heap()
kept = []
threads = [threading.Thread(target=lambda: kept.append(bytearray(5000))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_share_one_heap() -> None:
    """After the call all threads use the main heap; without it they make others."""

    def heaps(*arguments: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stderr.count("Arena ")

    assert heaps() > 1
    assert heaps("shared") == 1


COLLECTING = """
import gc
usual = gc.get_threshold()
from tracker.cli import app
app._collect_late()
before = gc.get_stats()[0]["collections"]
few = [[] for _ in range(100_000)]
assert gc.get_stats()[0]["collections"] == before
many = [[] for _ in range(100_001)]
assert gc.get_stats()[0]["collections"] > before
assert gc.get_threshold() == usual
"""


def test_a_process_that_stays_collects_garbage_as_python_does(tmp_path: Path) -> None:
    """Only short commands do without, so that a service grows no more than it has to."""
    subprocess.run([sys.executable, "-c", COLLECTING], cwd=tmp_path, check=True)
