"""Whether callbacks come to the starts' own addresses.

A proxy may pass on the exact path `/callbacks/flora` alone, so that all of them are lost.
"""

from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import and_, select

from tracker.core.observation import Source
from tracker.store.engine import Database
from tracker.store.tables import runs, starts

MISSING: Final = 5
"""So many missing callbacks in a row, and new starts use the bare address."""
MISSING_AFTER: Final = timedelta(minutes=2)
"""How long after the end of its run a callback counts as missing: by then FLORA has sent it three
times."""
TRY_AGAIN_AFTER: Final = timedelta(hours=1)
"""How long after the last of them own addresses are tried again."""


async def own_are_missing(db: Database, *, now: datetime) -> bool:
    """Whether the last five runs that were to call back to an address of their own did not, and one
    of them was sent within the hour."""
    statement = (
        select(runs.c.callback_at, starts.c.sent_at)
        .join(starts, and_(starts.c.run_id == runs.c.run_id, starts.c.callback_token.is_not(None)))
        .where(
            runs.c.source == Source.START,
            runs.c.callback_expected,
            runs.c.end_seen_at < now - MISSING_AFTER,
            starts.c.callback_url.like("%/" + starts.c.callback_token),
        )
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(MISSING)
    )
    async with db.read() as connection:
        found = (await connection.execute(statement)).all()
    return (
        len(found) == MISSING
        and all(row.callback_at is None for row in found)
        and any(row.sent_at is not None and row.sent_at > now - TRY_AGAIN_AFTER for row in found)
    )
