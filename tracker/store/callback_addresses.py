"""Whether callbacks come to the starts' own addresses."""

from datetime import datetime

from sqlalchemy import and_, select

from tracker.core.observation import Source
from tracker.store.engine import Database
from tracker.store.tables import runs, starts


async def are_missing(
    db: Database, *, count: int, ended_before: datetime, sent_after: datetime
) -> bool:
    """Whether the last `count` runs that were to call back to an address of their own, and ended
    before that moment, did not; and one of them was sent after the other moment."""
    statement = (
        select(runs.c.callback_at, starts.c.sent_at)
        .join(starts, and_(starts.c.run_id == runs.c.run_id, starts.c.callback_token.is_not(None)))
        .where(
            runs.c.source == Source.START,
            runs.c.callback_expected,
            runs.c.end_seen_at < ended_before,
            starts.c.callback_url.like("%/" + starts.c.callback_token),
        )
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(count)
    )
    async with db.read() as connection:
        found = (await connection.execute(statement)).all()
    return (
        len(found) == count
        and all(row.callback_at is None for row in found)
        and any(row.sent_at is not None and row.sent_at > sent_after for row in found)
    )
