"""The waits that FLORA asked for, as the processes on one database tell each other."""

from datetime import timedelta

from tests.store.making import NOW
from tracker.store.engine import Database
from tracker.store.queries import waits

SECOND = timedelta(seconds=1)


async def test_the_latest_wait_holds(db: Database, other_db: Database) -> None:
    """Of all waits of a workspace the one that ends last holds, for everybody, whoever was told."""
    assert await waits.until(db, "default") is None
    await waits.keep(db, "default", NOW + 20 * SECOND, told="one")
    await waits.keep(other_db, "default", NOW + 5 * SECOND, told="other")
    assert await waits.until(other_db, "default") == NOW + 20 * SECOND
    await waits.keep(other_db, "default", NOW + 30 * SECOND, told="other")
    assert await waits.until(db, "default") == NOW + 30 * SECOND
    assert await waits.until(db, "ws_2") is None
