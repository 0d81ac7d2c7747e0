"""What upgrades meet: the revisions in their order, and writers that know an older schema."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from tests.support.waiting import SteadyClock, eventually, steady_clock
from tracker.core.errors import TrackerError
from tracker.store.engine import Database
from tracker.store.schema import metadata

_NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
_RUN = {
    "status": "running",
    "progress": 0.0,
    "created_at": _NOW,
    "created_at_known": True,
    "output_count": 1,
    "standing": 1,
    "details": 0,
    "ranks": 0,
    "conflict": False,
    "source": "callback",
    "first_seen_at": _NOW,
    "callback_expected": False,
    "tracking": "active",
    "next_check_at": _NOW,
    "looks": 0,
    "checks": 0,
    "missing": 0,
}
_ENDED = {
    "status": "completed",
    "standing": 5,
    "details": 2,
    "ended_via": "poll",
    "tracking": "settled",
    "settled_at": _NOW,
    "next_check_at": None,
}


def revisions() -> list[str]:
    """All revisions, oldest first."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[2] / "migrations"))
    walked = ScriptDirectory.from_config(config).walk_revisions()
    return [each.revision for each in walked][::-1]


class OldWriters:
    """Processes of the version that fits the schema as it is when `knowing` looks at it.

    Each writes what a receiver, a worker and a start write, in their transactions, over the
    tracker's own connections, and reads as the dashboard does; it names the columns of then, and
    no other. `written` are the runs that it was told are on disk, `waits` how long each took, in
    seconds, `errors` what was raised. The time for which the event loop stood still is no wait: the
    upgrade computes in it, which is another process's in a deployment, and other tests take the
    processor.
    """

    def __init__(self, db: Database, tables: dict[str, Any]) -> None:
        self._db = db
        self._tables = tables
        self._numbers = itertools.count(1)
        self._going = True
        self.written: list[str] = []
        self.waits: list[float] = []
        self.errors: list[str] = []

    @classmethod
    async def knowing(cls, db: Database) -> "OldWriters":
        """Writers for the schema that `db` has now."""

        def look(connection: Connection) -> dict[str, set[str]]:
            inspector = sa.inspect(connection)
            return {
                name: {column["name"] for column in inspector.get_columns(name)}
                for name in inspector.get_table_names()
            }

        async with db.read() as connection:
            found = await connection.run_sync(look)
        tables = {
            name: sa.table(
                name,
                *(
                    sa.column(column.name, column.type)
                    for column in metadata.tables[name].columns
                    if column.name in columns
                ),
            )
            for name, columns in found.items()
            if name in metadata.tables
        }
        return cls(db, tables)

    @asynccontextmanager
    async def at_work(self, prefix: str, *, count: int = 3) -> AsyncIterator[None]:
        """So many write again and again for as long as the block lasts; a few runs before it and
        after it in any case."""
        self._going = True
        async with steady_clock() as clock:
            names = [f"{prefix}_{each}" for each in range(count)]
            working = [asyncio.create_task(self._work(name, clock)) for name in names]
            try:
                await self._some_more(2 * count)
                yield
                await self._some_more(2 * count)
            finally:
                self._going = False
                await asyncio.gather(*working)

    async def _some_more(self, count: int) -> None:
        wanted = len(self.waits) + count
        await eventually(lambda: len(self.waits) >= wanted, timeout=20)

    async def _work(self, prefix: str, clock: SteadyClock) -> None:
        while self._going:
            run_id = f"{prefix}_{next(self._numbers)}"
            began = clock()
            try:
                await self._db.write(
                    lambda connection, run_id=run_id: self._hear(connection, run_id)
                )
                self.written.append(run_id)
                await self._db.write(
                    lambda connection, run_id=run_id: self._end(connection, run_id)
                )
                async with self._db.read() as connection:
                    runs = self._tables["runs"]
                    newest = sa.select(*runs.c).order_by(runs.c.created_at.desc()).limit(5)
                    (await connection.execute(newest)).all()
            except TrackerError as error:
                self.errors.append(f"{run_id}: {error}")
            self.waits.append(clock() - began)
            await asyncio.sleep(0.01)

    def _hear(self, connection: Connection, run_id: str) -> None:
        """A callback, the first that is heard of its run, and a start."""
        self._insert(
            connection,
            "deliveries",
            delivery_id=f"whd_{run_id}",
            run_id=run_id,
            received_at=_NOW,
            last_received_at=_NOW,
            receipts=1,
            outcome="applied",
            body=b"{}",
        )
        self._insert(connection, "runs", run_id=run_id, **_RUN)
        self._event(connection, run_id, "running")
        self._insert(
            connection,
            "starts",
            workspace_slot="default",
            idempotency_key=run_id,
            technique_id="tech_1",
            fingerprint="f",
            inputs=[],
            state="started",
            created_at=_NOW,
            run_id=run_id,
        )

    def _end(self, connection: Connection, run_id: str) -> None:
        """A read that ends the run: locked, written, with an output and what it counts for."""
        runs = self._tables["runs"]
        mine = sa.select(*runs.c).where(runs.c.run_id == run_id)
        connection.execute(mine.with_for_update(key_share=True)).one()
        connection.execute(sa.update(runs).where(runs.c.run_id == run_id).values(**_ENDED))
        self._event(connection, run_id, "completed")
        output = {"position": 0, "output_id": "out", "type": "text", "url": "a text"}
        self._insert(connection, "run_outputs", run_id=run_id, **output)
        if "run_tally_changes" in self._tables:
            words = dict.fromkeys(("workspace_id", "technique_id", "status", "word"), "")
            counted = {"measure": "state", "since": _NOW, "bucket": 0, "runs": 1, "amount": 0}
            self._insert(connection, "run_tally_changes", **words, **counted)

    def _event(self, connection: Connection, run_id: str, status: str) -> None:
        event = {"at": _NOW, "source": "poll", "status": status, "detail": {}}
        self._insert(connection, "run_events", run_id=run_id, **event)

    def _insert(self, connection: Connection, name: str, **values: Any) -> None:
        insert: Any = postgresql.insert if self._db.dialect == "postgresql" else sqlite.insert
        connection.execute(insert(self._tables[name]).values(**values))


async def fill(url: str, count: int) -> None:
    """Runs that have ended, in whatever schema is there; they all bear the same moment."""
    names = [f"run_old_{number}" for number in range(count)]
    async with await Database.open(url) as db:
        runs = (await OldWriters.knowing(db))._tables["runs"]
        for start in range(0, count, 1000):
            rows = [_RUN | _ENDED | {"run_id": name} for name in names[start : start + 1000]]
            await db.write(lambda connection, rows=rows: connection.execute(sa.insert(runs), rows))
