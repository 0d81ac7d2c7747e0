"""The servers that are compared: each a process of its own on this machine."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import NamedTemporaryFile
from typing import Final

from bench.ingest.load import SECRET, WORKSPACE
from bench.ready import served
from tests.support.waiting import free_port

_ENDPOINT: Final = """
[[endpoints]]
id = "endpoint-{0}"
url = "https://127.0.0.1:9/{0}"
secrets = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz"
allow_private = true
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that takes callbacks: how it is started, which of its tables has a row for each, and
    for how many a second some are prepared; beyond that a round ends early. One that `applies`
    brings runs up to date after it has answered; `endpoints` is how many it has in its settings."""

    name: str
    module: str
    arguments: tuple[str, ...]
    table: str | None
    fastest: int = 25_000
    applies: bool = False
    endpoints: int = 0


TRACKER: Final = Contender(
    "tracker", "tracker", ("serve", "--no-worker"), "deliveries", applies=True
)
WITH_WORKER: Final = Contender("with worker", "tracker", ("serve",), "deliveries", applies=True)
WITH_ENDPOINTS: Final = replace(WITH_WORKER, name="with endpoints", endpoints=3)
"""Its outbox and endpoints are idle: callbacks alone settle no run."""
CEILING: Final = Contender(
    "ceiling", "bench.ingest.ceiling", ("serve", "--no-worker"), None, fastest=35_000
)
BARE: Final = Contender("bare", "bench.ingest.bare", (), None, fastest=40_000)
PEER: Final = Contender("peer", "bench.ingest.peer", (), "peer_deliveries", fastest=2_000)


@dataclass(frozen=True, slots=True)
class Running:
    """A contender at work."""

    contender: Contender
    port: int
    pid: int

    def processor_seconds(self) -> float:
        """Processor time that the process has used, in user and kernel mode."""
        with open(f"/proc/{self.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(contender: Contender, database_url: str) -> Iterator[Running]:
    """The contender, ready for callbacks, on that database."""
    port = free_port()
    command = [sys.executable, "-m", contender.module, *_arguments(contender, port)]
    with NamedTemporaryFile("w", suffix=".toml") as config:
        config.write("".join(_ENDPOINT.format(number) for number in range(contender.endpoints)))
        config.flush()
        environment = {**_environment(database_url, port), "TRACKER_CONFIG": config.name}
        with served(command, port, environment) as process:
            yield Running(contender, port, process.pid)


def _arguments(contender: Contender, port: int) -> tuple[str, ...]:
    if not contender.arguments:
        return ()
    return (*contender.arguments, "--port", str(port))


def _environment(database_url: str, port: int) -> Mapping[str, str]:
    scheme, _, rest = database_url.partition("://")
    driver = {"sqlite": "sqlite+aiosqlite"}.get(scheme, "postgresql+asyncpg")
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "FLORA_WEBHOOK_SECRET": SECRET,
        "FLORA_WORKSPACE_ID": WORKSPACE,
        "TRACKER_DATABASE_URL": database_url,
        "TRACKER_LOG_FORMAT": "json",
        "PEER_DATABASE_URL": f"{driver}://{rest}",
        "PEER_PORT": str(port),
    }
