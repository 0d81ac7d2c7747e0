"""The catalogue as it was last read."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

from sqlalchemy import update

from tests.store.making import NOW
from tracker.store import techniques
from tracker.store.engine import Database
from tracker.store.tables import techniques as table
from tracker.store.techniques import TechniqueRow

CAM = TechniqueRow(
    technique_id="tech_cam",
    name="CCTV cam",
    description="Looks\0down",
    run_cost=Decimal("0.125"),
    inputs=({"id": "photo", "type": "imageUrl", "later": {"unknown": [1, None]}},),
    outputs=({"id": "out", "type": "videoUrl"},),
    slug="cctv-cam",
)


async def test_a_technique_is_kept_as_it_was_read(db: Database) -> None:
    """Unknown fields of inputs survive, and text that no database holds is made fit."""
    await techniques.upsert(db, [CAM], NOW)
    kept = await techniques.get(db, "tech_cam")
    assert kept == replace(CAM, synced_at=NOW, description="Looks\ufffddown")
    assert await techniques.by_slug(db, "cctv-cam") == kept
    assert await techniques.get(db, "tech_other") is None
    assert await techniques.by_slug(db, "other") is None


async def test_the_newest_reading_counts(db: Database) -> None:
    """A second reading replaces the first; a list, which brings no slug, leaves it."""
    await techniques.upsert(db, [CAM], NOW)
    later = NOW + timedelta(hours=1)
    changed = replace(CAM, name="Cam 2", run_cost=None, slug=None)
    other = TechniqueRow(technique_id="tech_b", name="B")
    await techniques.upsert(db, [other, CAM, changed], later)
    kept = await techniques.by_slug(db, "cctv-cam")
    assert kept == replace(changed, slug="cctv-cam", synced_at=later, description="Looks\ufffddown")
    assert [row.technique_id for row in await techniques.list_all(db)] == ["tech_b", "tech_cam"]
    await techniques.upsert(db, [], later)


async def test_a_slug_leads_to_its_latest_owner(db: Database) -> None:
    """Where a slug has moved to another technique, the one read last has it."""
    await techniques.upsert(db, [CAM], NOW)
    heir = TechniqueRow(technique_id="tech_a", name="Heir", slug="cctv-cam")
    await techniques.upsert(db, [heir], NOW + timedelta(hours=1))
    found = await techniques.by_slug(db, "cctv-cam")
    assert found is not None
    assert found.technique_id == "tech_a"


async def test_what_the_catalogue_lacks_is_not_listed(db: Database) -> None:
    """A technique that is gone is still known by its id, and comes back when it is read again."""
    await techniques.upsert(db, [CAM], NOW)
    await db.write(lambda connection: connection.execute(update(table).values(gone_at=NOW)))
    assert await techniques.list_all(db) == []
    assert await techniques.get(db, "tech_cam")
    await techniques.upsert(db, [CAM], NOW)
    assert len(await techniques.list_all(db)) == 1
