"""Quarantined deliveries by cause, on both engines."""

from dataclasses import replace
from datetime import timedelta

from tests.store.making import NOW, TestWriter, quarantined
from tracker.store.engine import Database
from tracker.store.queries.deliveries import (
    CAUSE_LENGTH,
    Cause,
    acknowledge,
    causes,
    list_deliveries,
    unseen_deliveries,
)

MINUTE = timedelta(minutes=1)


async def test_deliveries_are_found_by_cause(db: Database, writer: TestWriter) -> None:
    """The most frequent cause first, without what is acknowledged. A reason that is too long is
    grouped by its beginning."""
    long = "x" * CAUSE_LENGTH
    for number, reason in enumerate(("not JSON", f"{long}1", f"{long}2", None, "not JSON")):
        one = quarantined(f"whd_{number}", at=NOW + number * MINUTE)
        await writer.submit(replace(one, reason=reason))
    await db.write(lambda connection: acknowledge(connection, ["whd_4"], NOW))

    found = await causes(db, limit=9)
    assert [(one.text, one.count) for one in found] == [(long, 2), ("", 1), ("not JSON", 1)]
    assert found[0] == Cause(text=long, count=2, first_at=NOW + MINUTE, last_at=NOW + 2 * MINUTE)
    assert len(await causes(db, limit=1)) == 1

    async def unseen(cause: str, until: timedelta) -> list[str]:
        return await unseen_deliveries(db, cause=cause, until=NOW + until, limit=9)

    assert await unseen(long, 2 * MINUTE) == ["whd_1", "whd_2"]
    assert await unseen(long, MINUTE) == ["whd_1"]
    assert await unseen("", 9 * MINUTE) == ["whd_3"]
    assert await unseen("not JSON", 9 * MINUTE) == ["whd_0"]

    rows, _ = await list_deliveries(db, outcome="quarantined", cause="not JSON")
    assert [row.delivery_id for row in rows] == ["whd_4", "whd_0"]
    rows, _ = await list_deliveries(db, outcome="quarantined", acknowledged=True)
    assert [(row.delivery_id, row.acknowledged_at) for row in rows] == [("whd_4", NOW)]
    rows, _ = await list_deliveries(db, since=NOW + 3 * MINUTE)
    assert [row.delivery_id for row in rows] == ["whd_4", "whd_3"]
