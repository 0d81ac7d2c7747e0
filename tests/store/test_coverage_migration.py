"""What the sweeps of the version before had read is covered: migration 0013."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import column as named
from sqlalchemy import insert, table, text

from tests.store.making import NOW
from tests.store.upgrading import OldWriters
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.queries import sweeps as coverage
from tracker.store.schema import CleanText, UtcDateTime

# The revision does not change any more; that it is done without an error, test_migrations.py tests.
pytestmark = pytest.mark.thorough

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
OLD_SWEEPS = table(
    "sweeps",
    named("workspace_id", CleanText),
    *(named(name) for name in ("pages", "items", "discovered", "repaired", "unreadable")),
    *(named(name, UtcDateTime) for name in ("started_at", "finished_at")),
    *(named(name, UtcDateTime) for name in ("through", "generations_through")),
    named("error", CleanText),
)
COUNTS = dict.fromkeys(("pages", "items", "discovered", "repaired", "unreadable"), 0)


def swept(workspace_id: str | None, hours: float, **more: Any) -> dict[str, Any]:
    """A complete sweep so many hours ago, through two minutes before."""
    started_at = NOW - hours * HOUR
    times = {"started_at": started_at, "finished_at": started_at + HOUR / 60}
    none = {"generations_through": None, "error": None}
    through = {"through": started_at - HOUR / 30}
    return {"workspace_id": workspace_id} | times | COUNTS | none | through | more


async def test_what_old_sweeps_had_read_is_covered(empty_database_url: str) -> None:
    """From as far back as the first of them had gone until where the last had come, each kind
    apart; failed ones, and those of nobody, say nothing. Old writers notice nothing of it."""
    await migrate.upgrade(empty_database_url, "0012")
    rows = [
        swept("ws_1", 48, generations_through=NOW - 49 * HOUR),
        swept("ws_1", 2),
        swept("ws_1", 1, through=NOW, error="FLORA answered 503"),
        swept("ws_2", 3, through=None),
        swept(None, 1),
    ]
    async with await Database.open(empty_database_url) as db:
        await db.write(lambda connection: connection.execute(insert(OLD_SWEEPS), rows).rowcount)
        writers = await OldWriters.knowing(db)
        async with writers.at_work("old"):
            await migrate.upgrade(empty_database_url, history_since=7 * DAY)
        assert writers.errors == []
        found = await coverage.everything(db)
        assert found.keys() == {("ws_1", "technique"), ("ws_1", "generation")}
        [one] = found["ws_1", "technique"]
        assert one.to_at == NOW - 2 * HOUR - HOUR / 15
        assert one.from_at <= NOW - 48 * HOUR - 7 * DAY
        [other] = found["ws_1", "generation"]
        assert (other.from_at, other.to_at) == (
            NOW - 48 * HOUR - 7 * DAY,
            NOW - 49 * HOUR - HOUR / 30,
        )
        async with db.read() as connection:
            view = text("SELECT last_error, last_generations_error FROM v_sweeps")
            assert len((await connection.execute(view)).all()) == 3
