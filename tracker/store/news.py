"""What is new in the timeline: who brought the last news of a run, and which runs have settled.

The timeline is read by its numbers. PostgreSQL gives them out before the commit, so that a smaller
one may show after a greater one: whoever reads on begins a little before where it ended.
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import func, select

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.store.engine import Database
from tracker.store.records import read_records
from tracker.store.rows import RUN_COLUMNS
from tracker.store.tables import run_events, runs, word

OVERLAP: Final = 1000
"""So many numbers before the last one are read again."""


async def last_sources(db: Database, run_ids: Sequence[str]) -> dict[str, Source]:
    """Who brought the last news of each of the runs."""
    last = select(func.max(run_events.c.id)).where(run_events.c.run_id.in_(run_ids))
    statement = select(run_events.c.run_id, run_events.c.source).where(
        run_events.c.id.in_(last.group_by(run_events.c.run_id))
    )
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
    return {run_id: Source(source) for run_id, source in rows}


async def last_number(db: Database) -> int:
    """The number of the newest line of the timeline; 0 where there is none."""
    async with db.read() as connection:
        return (await connection.execute(select(func.max(run_events.c.id)))).scalar() or 0


async def settled_since(
    db: Database, number: int, *, technique_id: str | None = None
) -> tuple[list[Record], int]:
    """Runs that have settled and have news since that line, and the number to go on from.

    Some come again and again: lines shortly before `number` are looked at too.
    """
    reached = await last_number(db)
    changed = select(run_events.c.run_id).where(
        run_events.c.id > number - OVERLAP, run_events.c.id <= reached
    )
    statement = select(*RUN_COLUMNS).where(
        runs.c.run_id.in_(changed), runs.c.tracking == word("settled")
    )
    if technique_id is not None:
        statement = statement.where(runs.c.technique_id == technique_id)
    async with db.read() as connection:
        rows = (await connection.execute(statement)).all()
        return await read_records(connection, rows), max(reached, number)
