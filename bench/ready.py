"""A server as a process of its own: started, ready, ended, and heard where it fails."""

import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0


@contextmanager
def served(
    command: Sequence[str], port: int, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run what serves on that port of this machine; it is ready, and ends with the block.

    Where it or the block fails, the end of what it said goes to stderr.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _await_ready(process, port)
            yield process
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            _end(process)


def _await_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return once `/readyz` of that port is answered well.

    Raises `RuntimeError` where the process has ended, or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
        else:
            return
    raise RuntimeError("it did not become ready")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell it to stop, and see to it that it does."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
