"""Removing one run, as though it had never been known."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, delete, exists, select

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.schema import run_events, run_outputs, runs
from tracker.store.writing import rollups
from tracker.store.writing.statements import Statements, statements_for


class ShownByFlora(Exception):
    """FLORA has shown the run, and does not deny it."""


async def forget_run(
    db: Database, run_id: str, *, force: bool, entry: Mapping[str, Any]
) -> Record | None:
    """Remove a run with its outputs and timeline, and write the audit `entry`; the run as it was.

    Returns `None` for an unknown run. Raises `ShownByFlora`, unless `force`, for a run that FLORA
    has shown and that is not lost; and `StoreUnavailable`.
    """
    return await db.write(
        partial(_forget_run, statements=statements_for(db), run_id=run_id, force=force, entry=entry)
    )


def _forget_run(
    connection: Connection,
    *,
    statements: Statements,
    run_id: str,
    force: bool,
    entry: Mapping[str, Any],
) -> Record | None:
    record = statements.lock_runs(connection, [run_id]).get(run_id)
    if record is None:
        return None
    mine = run_events.c.run_id == run_id
    shown = exists().where(mine, run_events.c.source != Source.TRACK.value)
    if not (force or record.lost) and connection.execute(select(shown)).scalar():
        raise ShownByFlora
    rollups.remove(connection, record)
    for table in (run_outputs, run_events, runs):
        connection.execute(delete(table).where(table.c.run_id == run_id))
    audit.note(connection, entry)
    return record
