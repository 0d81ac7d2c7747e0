"""The databases that are compared: a small and a big one, filled alike but for their size."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg

from bench.filling import fill
from bench.report import say
from tests.support.databases import Background, PostgresDatabases, sqlite_url_of
from tests.support.postgres import PostgresServer
from tracker.store import migrate
from tracker.store.engine import Database

ACTIVE: Final = 1000
"""Runs that are still active, in either: how much is under way does not follow from how much is
kept. Half of them are overdue."""

SETTINGS: Final = {
    "shared_buffers": "1GB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
}
"""As someone would set them who expects millions of runs."""


@dataclass(slots=True)
class Plot:
    """One database: how many runs it was filled with, and how long that took, in seconds."""

    kind: str
    url: str
    runs: int
    filled_in: float = 0.0
    server: PostgresServer | None = field(default=None, repr=False)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Any]:
        """A connection of asyncpg's own."""
        connection = await asyncpg.connect(self.url)
        try:
            yield connection
        finally:
            await connection.close()

    async def rest(self) -> None:
        """A checkpoint, so that what was written before does not count; the server's log is then
        at its longest for what follows."""
        if self.kind == "postgresql":
            async with self.connected() as connection:
                await connection.execute("CHECKPOINT")

    async def written(self) -> int:
        """How many bytes the server has written to its log."""
        async with self.connected() as connection:
            return int(await connection.fetchval("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"))

    def server_seconds(self) -> float:
        """Processor time that the server's processes have used, as far as they are still there."""
        assert self.server is not None
        postmaster = int((self.server.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return sum(processor_seconds(pid) for pid in (postmaster, *map(int, children)))


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used, in user and kernel mode; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bytes_written(pid: int) -> int:
    """What a process has had written to disk."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


@contextmanager
def filled(
    kind: str, sizes: Sequence[int], settings: Mapping[str, str] | None = None
) -> Iterator[list[Plot]]:
    """A database for each of the sizes, migrated and filled; on one server, with `fsync` on."""
    with _empty(kind, len(sizes), dict(SETTINGS) | dict(settings or {})) as (urls, server):
        plots = [
            Plot(kind, url, runs, server=server) for url, runs in zip(urls, sizes, strict=True)
        ]
        for plot in plots:
            began = time.perf_counter()
            asyncio.run(_fill(plot))
            plot.filled_in = time.perf_counter() - began
            say(f"{kind}: {plot.runs:,} runs, made in {plot.filled_in:.0f} s")
        yield plots


async def _fill(plot: Plot) -> None:
    await migrate.upgrade(plot.url)
    async with await Database.open(plot.url) as db:
        await fill(db, plot.runs, active=ACTIVE, scattered=True)


@contextmanager
def _empty(
    kind: str, count: int, settings: Mapping[str, str]
) -> Iterator[tuple[list[str], PostgresServer | None]]:
    names = [f"tracker_{number}" for number in range(count)]
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as directory:
            yield [sqlite_url_of(Path(directory) / f"{name}.db") for name in names], None
        return
    with PostgresServer(fsync=True, settings=settings) as server:
        background = Background()
        databases = PostgresDatabases(server.url(), background)
        for name in names:
            databases.create(name)
        databases.close()
        background.close()
        yield [server.url(name) for name in names], server
