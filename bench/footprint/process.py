"""A tracker as a process of its own, seen from outside."""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.footprint.counted import COUNTS
from bench.ingest.load import SECRET, WORKSPACE
from bench.ready import served
from tests.support.waiting import free_port


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far: seconds of processor time, and how often one of its threads
    was woken."""

    processor: float
    wakings: int

    def __sub__(self, earlier: "Usage") -> "Usage":
        return Usage(self.processor - earlier.processor, self.wakings - earlier.wakings)


@dataclass(slots=True)
class Serving:
    """`tracker serve`, with its worker. `ready_after` is how long it took, in seconds, and
    `ready_processor` what processor time."""

    pid: int
    port: int
    counts: Path
    ready_after: float = 0.0
    ready_processor: float = 0.0

    def memory(self) -> float:
        """Resident memory, in MB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

    def seen(self) -> Usage:
        """What all its threads have used."""
        processor, wakings = 0, 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(OSError):  # it may have ended
                processor += int((task / "schedstat").read_text().split()[0])
                lines = (task / "status").read_text().splitlines()
                counted = next(line for line in lines if line.startswith("voluntary_ctxt"))
                wakings += int(counted.split()[1])
        return Usage(processor / 1e9, wakings)

    def statements(self) -> dict[str, int]:
        """The statements that it has sent so far."""
        self.counts.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not self.counts.exists():
            if time.monotonic() > deadline:
                raise RuntimeError("it did not say what it has sent")
            time.sleep(0.05)
        found: dict[str, int] = json.loads(self.counts.read_text(encoding="utf-8"))
        return found


@contextmanager
def serving(
    url: str,
    *,
    module: str = "tracker",
    environ: Mapping[str, str] | None = None,
    called_back: bool = False,
) -> Iterator[Serving]:
    """Start one on that database; it is ready, and ends with the block. `called_back`: the runs
    that it starts have its address."""
    port = free_port()
    given = {"TRACKER_PUBLIC_URL": f"http://127.0.0.1:{port}"} if called_back else {}
    command = [sys.executable, "-m", module, "serve", "--port", str(port)]
    with tempfile.TemporaryDirectory() as directory:
        counts = Path(directory) / "counts.json"
        env = essential(url) | given | {COUNTS: str(counts)} | dict(environ or {})
        began = time.monotonic()
        with served(command, port, env) as process:
            found = Serving(process.pid, port, counts)
            found.ready_after = time.monotonic() - began
            found.ready_processor = found.seen().processor
            yield found


def essential(url: str) -> dict[str, str]:
    """What a tracker that receives has to be told."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "FLORA_WEBHOOK_SECRET": SECRET,
        "FLORA_WORKSPACE_ID": WORKSPACE,
        "TRACKER_DATABASE_URL": url,
        "TRACKER_LOG_FORMAT": "json",
    }
