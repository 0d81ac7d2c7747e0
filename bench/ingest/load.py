"""Unique signed callbacks over kept-alive connections.

They are made and signed beforehand, so that while the clock runs the sender only sends. wrk costs
least; a sender in Python takes its place where wrk is not installed.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.filling import SCATTER
from bench.ingest.sender import HEADER, PATH, Sender
from tracker.flora.callback import sign

SECRET: Final = "whsec_bench"  # noqa: S105 - of no workspace
WORKSPACE: Final = "ws_bench"

_WRK_SCRIPT: Final = """
local requests = {}
local next_one = 0
function init(args)
  for line in io.lines(args[1]) do
    local signature, body = line:match("^(%S+) (.*)$")
    requests[#requests + 1] = "POST " .. args[2] .. " HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n" ..
      "Content-Type: application/json\\r\\n" .. args[3] .. ": " .. signature ..
      "\\r\\nContent-Length: " .. #body .. "\\r\\n\\r\\n" .. body
  end
end
function request()
  next_one = next_one + 1
  if next_one > #requests then
    wrk.thread:stop()
    next_one = #requests
  end
  return requests[next_one]
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What a sender counted. `seconds` is how long it sent; latencies are in milliseconds."""

    acknowledged: int
    refused: int
    seconds: float

    @property
    def rate(self) -> float:
        """Acknowledged callbacks a second."""
        return self.acknowledged / self.seconds


def callbacks(count: int, *, prefix: str, scattered: bool = False) -> Iterator[tuple[str, bytes]]:
    """Signature header and body of that many callbacks, each of a run of its own.

    `scattered` ones have ids each of which comes to lie somewhere else in an index.
    """
    now = int(time.time())
    for number in range(count):
        key = f"{number * SCATTER % 2**32:08x}{prefix}" if scattered else f"{prefix}{number:08x}"
        data = {
            "run_id": f"run_{key}",
            "run_type": "technique",
            "workspace_id": WORKSPACE,
            "status": "completed",
        }
        event = {
            "id": f"whd_{key}",
            "type": "run.completed",
            "api_version": "2026-06-11",
            "created_at": now * 1000 + number % 1000,
            "data": data,
        }
        body = json.dumps(event).encode()
        yield sign(body, SECRET, at=now), body


@contextmanager
def prepared(count: int, *, prefix: str, scattered: bool = False) -> Iterator[Path]:
    """A file of that many callbacks."""
    with written(callbacks(count, prefix=prefix, scattered=scattered)) as requests:
        yield requests


@contextmanager
def written(signed: Iterable[tuple[str, bytes]]) -> Iterator[Path]:
    """A file of signed bodies, one a line: signature, blank, body."""
    with tempfile.NamedTemporaryFile("wb", suffix=".requests") as file:
        for signature, body in signed:
            file.write(b"%b %b\n" % (signature.encode(), body))
        file.flush()
        yield Path(file.name)


def send(
    requests: Path,
    port: int,
    *,
    connections: int,
    seconds: float,
    path: str = PATH,
    header: str = HEADER,
) -> Load:
    """Send them to a server on this machine until the time, or what was prepared, is up.

    `path` is where it takes them, `header` the one that holds their signature.
    """
    if shutil.which("wrk"):
        return _by_wrk(requests, port, connections, seconds, path, header)
    sender = Sender(requests, port, connections=connections, path=path, header=header)
    return asyncio.run(_by_python(sender, seconds))


def send_all(requests: Path, port: int, *, connections: int) -> Load:
    """Send all that was prepared, however long that takes; from Python, as wrk stops by the clock
    alone."""
    return asyncio.run(_all_by_python(requests, port, connections))


def _by_wrk(
    requests: Path, port: int, connections: int, seconds: float, path: str, header: str
) -> Load:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_WRK_SCRIPT)
        script.flush()
        command = [
            *("wrk", "-t", "1", "-c", str(connections), "-d", f"{seconds:.0f}s"),
            *("--timeout", "10s", "-s", script.name),
            *(f"http://127.0.0.1:{port}{path}", "--", str(requests), path, header),
        ]
        with _last_processor_only():
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    counted = re.search(r"(\d+) requests in ([\d.]+)(m?s)", done.stdout)
    if counted is None:
        raise RuntimeError(f"wrk said something else:\n{done.stdout}{done.stderr}")
    took = float(counted[2]) / (1000 if counted[3] == "ms" else 1)
    other = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    refused = int(other[1]) if other else 0
    return Load(int(counted[1]) - refused, refused, took)


@contextmanager
def _last_processor_only() -> Iterator[None]:
    """What is started here runs on the last processor alone.

    Otherwise the kernel often puts wrk beside the server, on the same one, where each answer
    interrupts the server for wrk, however idle the other processors are.
    """
    if not hasattr(os, "sched_setaffinity"):  # not on macOS
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(all_of_them)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


async def _by_python(sender: Sender, seconds: float) -> Load:
    async with sender:
        await sender.flat_out(seconds)
    return Load(sender.answers.acknowledged, sender.answers.refused, seconds)


async def _all_by_python(requests: Path, port: int, connections: int) -> Load:
    async with Sender(requests, port, connections=connections) as sender:
        seconds = await sender.all_of_them()
    return Load(sender.answers.acknowledged, sender.answers.refused, seconds)
