"""hookspool, "durable, coalescing intake for inbound webhooks", a program in Python.

It is sent FLORA's callbacks as they are, signed as its generic source `hookspool.webhook` wants it,
and coalesces by run, so that each callback opens a batch; its dispatcher does not run, as the
tracker's worker does not. For a callback it

- keeps the body twice (as it came and as JSON), with its headers, and an id against doubles,
- opens a batch, which its dispatcher would pass on, and notes when it last heard of the source,
- writes a line to its log, which the tracker does not,
- knows nothing of what the body says: no merge, no state, no timeline, no rollups, no schedule,
- checks no signed time: its scheme has none.

Both have `journal_mode=WAL` and `synchronous=FULL`: each commit waits for the disk. hookspool
leaves `wal_autocheckpoint` at SQLite's 1,000 pages (the tracker: 8,000), which decides about speed
alone. It serves a connection with a thread of its own and has 16 of them by default; here it gets
one for each connection, because a kept-alive connection beyond them would never be answered.

It sends an answer as two packets, head and body, and the kernel keeps the second back until the
sender has acknowledged the first: about 40 ms over a kept-alive connection, to whichever client
waits with acknowledgements, as Linux does. So it is measured as it is and once more with
`TCP_NODELAY` set, which is what its own work costs. To close connections instead is no way out for
it: it opens SQLite for each, and does no better.
"""

import hashlib
import hmac
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.ingest.contenders import Contender, Running
from bench.ingest.load import SECRET, callbacks
from bench.ingest.rounds import count
from bench.others.installing import HERE, from_python
from bench.ready import served
from tests.support.waiting import free_port

TABLE: Final = "events"
HOOKSPOOL: Final = Contender("hookspool 0.2.0", "bench.others.serve_hookspool", (), TABLE)

_SPARE_THREADS: Final = 8
"""For connections that it has not yet seen to be closed."""

_SETTINGS: Final = """
[intake]
listen = "127.0.0.1:{port}"
threads = {threads}

[bobbins.flora]
bobbin = "hookspool.webhook"
secrets.secret = {{ file = "{secret}" }}
outputs = {{ "*" = "nowhere" }}

[bobbins.flora.settings]
scheme = "hmac-sha256-hex"
header = "X-Signature"
prefix = "sha256="
key = ["data.run_id"]
dedup = "id"
event_type = "type"
sender_retries = true

[destinations.nowhere]
type = "http"
url = "http://127.0.0.1:9/"
allow_insecure = true
secret = {{ file = "{secret}" }}
"""


class Hookspool:
    """hookspool's intake, on SQLite; as it is, or with `TCP_NODELAY` on its connections."""

    kind = "sqlite"
    path = "/hooks/flora"
    header = "X-Signature"

    def __init__(self, *, no_delay: bool = False) -> None:
        self._no_delay = no_delay
        self.name = f"{HOOKSPOOL.name}, TCP_NODELAY" if no_delay else HOOKSPOOL.name

    def install(self, into: Path) -> None:
        """The wheel alone: it depends on nothing."""
        from_python(HERE / "hookspool.txt", into)

    def signed(self, count: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        """FLORA's callbacks, signed without a time."""
        for _, body in callbacks(count, prefix=prefix):
            yield f"sha256={hmac.digest(SECRET.encode(), body, hashlib.sha256).hex()}", body

    @contextmanager
    def storage(self) -> Iterator[str]:
        """Its home directory."""
        with tempfile.TemporaryDirectory() as home:
            yield home

    @contextmanager
    def started(self, installed: Path, storage: str, *, connections: int) -> Iterator[Running]:
        """Migrate the spool, then run the intake on it."""
        home, port = Path(storage), free_port()
        secret = home / "secret"
        secret.write_text(SECRET, encoding="utf-8")
        secret.chmod(0o600)
        settings = _SETTINGS.format(
            port=port, threads=connections + _SPARE_THREADS, secret=secret.as_posix()
        )
        (home / "config.toml").write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", HOOKSPOOL.module, "--home", storage]
        environment = _environment(installed, no_delay=self._no_delay)
        subprocess.run(
            [*command, "migrate"], env=environment, stdout=subprocess.DEVNULL, check=True
        )
        with served([*command, "intake"], port, environment) as process:
            yield Running(HOOKSPOOL, port, process.pid)

    def kept(self, storage: str) -> int:
        """Its events, each of which is a callback."""
        return count(f"sqlite:///{storage}/spool.db", TABLE)


def _environment(installed: Path, *, no_delay: bool) -> Mapping[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": str(installed),
        "BENCH_NO_DELAY": "1" if no_delay else "",
    }
