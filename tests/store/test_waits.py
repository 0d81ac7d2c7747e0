"""The waits that FLORA asked for, as the processes on one database tell each other."""

from datetime import timedelta

from tests.store.making import NOW
from tracker.store.engine import Database
from tracker.store.queries import workspaces

SECOND = timedelta(seconds=1)
LATEST = NOW + 60 * SECOND


async def test_the_latest_wait_holds(db: Database, other_db: Database) -> None:
    """Of all waits of a workspace the one that ends last holds, for everybody, whoever was told."""
    assert await workspaces.waits_until(db, "default") is None
    await workspaces.keep_wait(db, "default", NOW + 20 * SECOND, process="one", latest=LATEST)
    await workspaces.keep_wait(
        other_db, "default", NOW + 5 * SECOND, process="other", latest=LATEST
    )
    assert await workspaces.waits_until(other_db, "default") == NOW + 20 * SECOND
    await workspaces.keep_wait(
        other_db, "default", NOW + 30 * SECOND, process="other", latest=LATEST
    )
    assert await workspaces.waits_until(db, "default") == NOW + 30 * SECOND
    assert await workspaces.waits_until(db, "ws_2") is None
