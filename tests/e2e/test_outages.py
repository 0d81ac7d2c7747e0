"""A database that is down costs an answer, and never a fact: real processes, real outages.

In each test a witness sends, starts, reads and follows, while the database goes away in one way
after the other and comes back; the tracker is not restarted. Afterwards everything acknowledged is
stored, every answer came in time, and none disclosed internals. `bench.soak_outage` is the long
form.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.outages import (
    Outage,
    at_its_limit,
    postgres_on,
    postgres_outages,
    sqlite_outages,
)
from tests.e2e.processes import open_sandbox
from tests.e2e.witness import CALLBACKS, Witness, assert_folded, assert_nothing_lost
from tests.support.databases import sqlite_url_of
from tests.support.disk import CannotMount, SmallDisk
from tests.support.postgres import PostgresServer
from tests.support.shares import share_of
from tests.support.waiting import eventually
from tracker.store.engine import Database

pytestmark = pytest.mark.timeout(120)

PASSWORD = "hunter2-of-the-outages"
BACK_WITHIN = 10.0
NOTICED_WITHIN = 15.0
SETTLED_WITHIN = 30.0
TAKEN_ALL_THE_SAME = 6
"""Deliveries taken during an outage that show that no client needs to be refused."""


class OutageRun:
    """A running tracker, whose process is `writer`, and a witness of its answers."""

    def __init__(self, witness: Witness, writer: int) -> None:
        self.witness = witness
        self.writer = writer

    async def survives(self, outage: Outage) -> None:
        """Sit out an outage until a client is refused or deliveries are taken all the same."""
        refused, taken = self._refused, len(self.witness.acknowledged)

        def noticed() -> bool:
            more = len(self.witness.acknowledged) - taken
            return self._refused > refused or more >= TAKEN_ALL_THE_SAME

        async with outage():
            await eventually(noticed, timeout=NOTICED_WITHIN)
        await self.witness.back(within=BACK_WITHIN)

    async def survives_long(self, outage: Outage) -> None:
        """Sit out an outage until a callback is answered 503, after every other time-out."""
        told = self.witness.statuses[CALLBACKS, 503]
        async with outage():
            await eventually(
                lambda: self.witness.statuses[CALLBACKS, 503] > told, timeout=NOTICED_WITHIN
            )
        await self.witness.back(within=BACK_WITHIN)

    @property
    def _refused(self) -> int:
        return sum(n for (_, status), n in self.witness.statuses.items() if status == 503)


@asynccontextmanager
async def outage_run(directory: Path, database_url: str) -> AsyncIterator[OutageRun]:
    """An outage run; checks every promise when the block ends."""
    url = database_url.replace("postgres@", f"postgres:{PASSWORD}@")
    async with open_sandbox(directory, url) as sandbox:
        await sandbox.simulate(
            *("--seed", "3", "--speed", "20", "--run-seconds", "10"),
            *("--drop", "20%", "--duplicate", "10%"),
        )
        server = await sandbox.serve(TRACKER_CALLBACK_GRACE="1")
        witness = Witness(sandbox.tracker, secrets=(PASSWORD, "whsec_simulator", "sk_test"))
        witness.begin(senders=3, readers=2, starters=1)
        async with await Database.open(url) as database:
            try:
                await eventually(lambda: witness.acknowledged and witness.started)
                yield OutageRun(witness, server.pid)
                await witness.end()
                await assert_nothing_lost(
                    witness, database, sandbox.simulator, within=SETTLED_WITHIN
                )
            finally:
                await witness.close()
            assert witness.broken == []
            assert await server.stop() == 0, server.log
            await assert_folded(database, within=1)
        assert PASSWORD not in server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture
def disks() -> Iterator[tuple[SmallDisk, SmallDisk]]:
    """Two disks that can be full; without the right to mount them the test is left out."""
    try:
        with SmallDisk(megabytes=64) as one, SmallDisk(megabytes=64) as other:
            yield one, other
    except CannotMount as error:
        pytest.skip(f"a disk that can be full cannot be mounted here: {error}")


async def test_postgresql_comes_and_goes(
    own_postgres: PostgresServer, tmp_path: Path, thorough: bool
) -> None:
    """Stopped, crashed, up for a moment at a time, its connections ended, a standby that takes no
    writes, its tables locked: every answer is in time, and nothing is lost."""
    outages = postgres_outages(own_postgres)
    names = ("stopped", "crashed", "restarting", "killed", "read-only", "locked runs")
    async with outage_run(tmp_path, own_postgres.url("tracker")) as run:
        for name in share_of(names, of=2, thorough=thorough):
            await run.survives(outages[name])


async def test_postgresql_falls_silent(own_postgres: PostgresServer, tmp_path: Path) -> None:
    """A server that accepts connections and stays silent delays no answer past its limit."""
    async with outage_run(tmp_path, own_postgres.url("tracker")) as run:
        await run.survives_long(postgres_outages(own_postgres)["frozen"])


async def test_the_disks_of_postgresql_are_full(
    disks: tuple[SmallDisk, SmallDisk], tmp_path: Path, thorough: bool
) -> None:
    """Where the tables have no room the server goes on, where its log has none it ends itself (as
    one does that crashes: `test_postgresql_comes_and_goes`)."""
    async with (
        postgres_on(*disks) as server,
        outage_run(tmp_path, server.url("tracker")) as run,
    ):
        outages = postgres_outages(server, *disks)
        await run.survives(outages["disk full"])
        if thorough:
            await run.survives(outages["log full"])


async def test_a_sqlite_file_comes_and_goes(tmp_path: Path) -> None:
    """Moved away, at a limit of its size: every answer is in time, nothing is lost, and nothing is
    written to an orphaned file."""
    file = _new_file(tmp_path)
    async with outage_run(tmp_path, sqlite_url_of(file)) as run:
        await run.survives(sqlite_outages(file)["moved away"])
        await run.survives(partial(at_its_limit, run.writer))


async def test_a_sqlite_file_is_locked_for_long(tmp_path: Path) -> None:
    """A file that another process locks delays no answer past its limit."""
    file = _new_file(tmp_path)
    async with outage_run(tmp_path, sqlite_url_of(file)) as run:
        await run.survives_long(sqlite_outages(file)["locked exclusively"])


async def test_the_disk_of_a_sqlite_file_is_full(
    disks: tuple[SmallDisk, SmallDisk], tmp_path: Path
) -> None:
    """No space left, or read-only: what was acknowledged is kept, the rest is refused."""
    file = _new_file(disks[0].path)
    async with outage_run(tmp_path, sqlite_url_of(file)) as run:
        outages = sqlite_outages(file, *disks)
        await run.survives(outages["disk full"])
        await run.survives(outages["read-only"])


def _new_file(place: Path) -> Path:
    """Where a database may be, in a folder of its own; the tracker makes it."""
    folder = place / "database"
    folder.mkdir()
    return folder / "tracker.db"
