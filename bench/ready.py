"""A server that was started, and when it takes requests; and its end, one way or the other."""

import subprocess
import time
import urllib.error
import urllib.request
from typing import Final

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0


def await_ready(process: subprocess.Popen[bytes], port: int) -> None:
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


def end(process: subprocess.Popen[bytes]) -> None:
    """Tell it to stop, and see to it that it does."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
