"""Where runs stand in FLORA's list of technique runs, as far as it is known here: newest first.

FLORA's pages are read one after the other, so that a run's place tells how many it takes to see it.
"""

from collections.abc import Collection, Mapping
from typing import Final

from sqlalchemy import func, literal, or_, select

from tracker.store.claims import Workspaces, within
from tracker.store.engine import Database
from tracker.store.tables import runs

FARTHEST: Final = 10_000
"""So many of the newest runs are looked through at most, whatever was asked."""


async def places(
    db: Database, run_ids: Collection[str], workspaces: Workspaces, *, among: int
) -> Mapping[str, int]:
    """How many runs of these workspaces are as new as each of the runs or newer, itself included.

    A run that is not `among` so many of the newest of all workspaces is left out.
    """
    newest = (
        select(runs.c.run_id, runs.c.run_type, runs.c.workspace_id)
        .add_columns(runs.c.created_at)
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(min(among, FARTHEST))
        .subquery()
    )
    place = func.row_number().over(order_by=(newest.c.created_at.desc(), newest.c.run_id.desc()))
    listed = (
        select(newest.c.run_id, place.label("place"))
        .where(
            or_(newest.c.run_type.is_(None), newest.c.run_type != literal("generation")),
            within(workspaces, newest.c.workspace_id),
        )
        .subquery()
    )
    statement = select(listed.c.run_id, listed.c.place).where(listed.c.run_id.in_(run_ids))
    async with db.read() as connection:
        found = await connection.execute(statement)
        return {row.run_id: row.place for row in found}
