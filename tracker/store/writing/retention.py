"""How far retention has come, so that what it removed is not taken for news.

FLORA's lists show a removed run for as long as FLORA keeps it, and nothing here tells it from one
that was never heard of but its age. So in the transaction that removes runs the newest of them, by
FLORA's time of creation, is noted for their workspace.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, func, select, update

from tracker.core.run import RunType
from tracker.store.engine import Database, insert_on
from tracker.store.queries.sweeps import covers, everything
from tracker.store.schema import retention, runs


class Sighting(NamedTuple):
    """A run that somebody speaks of, and a moment of FLORA's at which it was there already."""

    run_id: str
    workspace_id: str | None
    at: datetime
    kind: RunType = "technique"


async def removed(db: Database, sightings: Iterable[Sighting]) -> set[str]:
    """Those of the runs that are not here and that retention must have removed."""
    reached = await within_reach(db, sightings)
    if not reached:
        return set()
    async with db.read() as connection:
        here = await connection.execute(select(runs.c.run_id).where(runs.c.run_id.in_(reached)))
        return reached - set(here.scalars())


async def within_reach(db: Database, sightings: Iterable[Sighting]) -> set[str]:
    """Those of the runs that retention has removed, unless they are here or came back.

    It has removed runs as new as these, and these were here once: FLORA's history has been read at
    that time. What was never read is news, however old it is.
    """
    reached = await marks(db, "runs")
    if not reached:
        return set()
    # A run whose workspace was not known may be anybody's.
    old = [
        one
        for one in sightings
        if any(
            mark is not None and one.at <= mark
            for mark in (reached.get(one.workspace_id or ""), reached.get(""))
        )
    ]
    if not old:
        return set()
    coverage = await everything(db)
    return {
        one.run_id
        for one in old
        if any(
            covers(intervals, one.at)
            for (workspace_id, kind), intervals in coverage.items()
            if kind == one.kind and one.workspace_id in (None, workspace_id)
        )
    }


async def marks(db: Database, what: Literal["runs", "bodies"]) -> dict[str, datetime]:
    """How far it has come, by workspace; bodies are no workspace's."""
    statement = select(retention.c.workspace_id, retention.c.through)
    async with db.read() as connection:
        rows = await connection.execute(statement.where(retention.c.what == what))
        return dict(rows.all())


def reach(
    connection: Connection, what: Literal["runs", "bodies"], moments: Iterable[tuple[str, datetime]]
) -> None:
    """Note how far it has come, in one order, so that no two wait for each other crosswise."""
    reached: dict[str, datetime] = {}
    for workspace_id, at in moments:
        reached[workspace_id] = max(at, reached.get(workspace_id, at))
    dialect = connection.dialect.name
    later: Any = func.greatest if dialect == "postgresql" else func.max
    kept = insert_on(dialect)(retention).values(
        [
            {"what": what, "workspace_id": workspace_id, "through": through}
            for workspace_id, through in sorted(reached.items())
        ]
    )
    connection.execute(
        kept.on_conflict_do_update(
            index_elements=[retention.c.what, retention.c.workspace_id],
            set_={"through": later(retention.c.through, kept.excluded.through)},
        )
    )


def step_back(connection: Connection, what: Literal["bodies"], at: datetime) -> None:
    """Note that something as old as that is there to be removed again: it is looked for anew."""
    beyond = (retention.c.what == what, retention.c.through > at)
    connection.execute(update(retention).where(*beyond).values(through=at))
