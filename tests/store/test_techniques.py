"""The catalogue as it was last read."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest

from tests.store.making import NOW
from tracker.core.errors import InvalidRequest
from tracker.store.engine import Database
from tracker.store.queries import paging, techniques
from tracker.store.queries.techniques import TechniqueRow

LATER = NOW + timedelta(hours=1)
CAM = TechniqueRow(
    technique_id="tech_cam",
    name="CCTV cam",
    description="Looks\0down",
    run_cost=Decimal("0.125"),
    inputs=({"id": "photo", "type": "imageUrl", "later": {"unknown": [1, None]}},),
    outputs=({"id": "out", "type": "videoUrl"},),
    slug="cctv-cam",
)
STORED = replace(CAM, description="Looks\ufffddown", synced_at=NOW, defined_at=NOW)


async def test_a_technique_is_kept_as_it_was_read(db: Database) -> None:
    """Unknown fields of inputs survive, and text that no database holds is made fit."""
    assert await techniques.define(db, CAM, NOW) == STORED
    assert await techniques.get(db, "tech_cam") == STORED
    assert await techniques.by_slug(db, "cctv-cam") == STORED
    assert await techniques.get(db, "tech_other") is None
    assert await techniques.by_slug(db, "other") is None


async def test_the_newest_reading_counts(db: Database) -> None:
    """A second reading replaces the first, an empty definition included; the slug stays."""
    await techniques.define(db, CAM, NOW)
    changed = TechniqueRow(technique_id="tech_cam", name="Cam 2")
    kept = await techniques.define(db, changed, LATER)
    assert kept == replace(changed, slug="cctv-cam", synced_at=LATER, defined_at=LATER)


async def test_a_list_leaves_what_it_does_not_show(db: Database) -> None:
    """Name, words and price are the list's; inputs, outputs and slug stay where it has none."""
    await techniques.define(db, CAM, NOW)
    shown = TechniqueRow(technique_id="tech_cam", name="Cam 2", run_cost=Decimal("0.25"))
    other = TechniqueRow(technique_id="tech_b", name="B", outputs=({"id": "o", "type": "text"},))
    assert await techniques.add_listed(db, [other, CAM, shown], LATER) == (1, 0)
    kept = await techniques.get(db, "tech_cam")
    assert kept == replace(
        shown,
        inputs=CAM.inputs,
        outputs=CAM.outputs,
        slug="cctv-cam",
        synced_at=LATER,
        defined_at=NOW,
        listed_at=LATER,
    )
    listed = await techniques.get(db, "tech_b")
    assert listed == replace(other, synced_at=LATER, listed_at=LATER)
    assert await techniques.add_listed(db, [], LATER) == (0, 0)


async def test_a_list_may_show_the_definition(db: Database) -> None:
    """Inputs that a list does show are taken, and count as not read by themselves."""
    await techniques.add_listed(db, [replace(CAM, slug=None)], NOW)
    kept = await techniques.get(db, "tech_cam")
    assert kept is not None
    assert (kept.inputs, kept.defined_at) == (CAM.inputs, None)


async def test_a_slug_belongs_to_its_latest_owner(db: Database) -> None:
    """Where a slug has moved to another technique, the one read last has it alone."""
    await techniques.define(db, CAM, NOW)
    heir = TechniqueRow(technique_id="tech_a", name="Heir", slug="cctv-cam")
    await techniques.define(db, heir, LATER)
    await techniques.add_listed(db, [CAM], LATER + timedelta(hours=1))
    found = await techniques.by_slug(db, "cctv-cam")
    assert found is not None
    assert found.technique_id == "tech_a"


async def test_what_lists_lack_is_marked_until_it_is_back(db: Database) -> None:
    """Only what a list showed before can be missing; it is kept, and any observation unmarks it."""
    never_listed = TechniqueRow(technique_id="tech_own", name="Own")
    await techniques.define(db, never_listed, NOW)
    await techniques.add_listed(db, [CAM], NOW)
    stays = TechniqueRow(technique_id="tech_b", name="B")
    await techniques.add_listed(db, [stays], LATER)
    assert await techniques.mark_gone(db, since=LATER, at=LATER) == 1
    assert await techniques.mark_gone(db, since=LATER, at=LATER + timedelta(hours=1)) == 0
    gone = await techniques.get(db, "tech_cam")
    assert gone is not None
    assert gone.gone_at == LATER
    assert [row.technique_id for row in await techniques.list_all(db)] == ["tech_b", "tech_own"]
    assert await techniques.add_listed(db, [CAM], LATER) == (0, 1)
    assert len(await techniques.list_all(db)) == 3
    await techniques.mark_gone(db, since=LATER + timedelta(hours=1), at=LATER)
    assert (await techniques.define(db, CAM, LATER)).gone_at is None


async def test_a_doubted_definition_counts_as_not_read(db: Database) -> None:
    """It stays, but has to be read again; one that was read since then is not doubted."""
    await techniques.define(db, CAM, NOW)
    await techniques.doubt(db, "tech_cam", before=NOW)
    assert await techniques.get(db, "tech_cam") == STORED
    await techniques.doubt(db, "tech_cam", before=LATER)
    assert await techniques.get(db, "tech_cam") == replace(STORED, defined_at=None)


NAMES = ["apple", "Banana", "banana", "Cherry 100%", "date_palm", "Élan"]


async def _names(db: Database, **wanted: object) -> list[str]:
    """The names on all pages of two."""
    names: list[str] = []
    cursor = None
    while True:
        rows, cursor = await techniques.page(db, cursor=cursor, limit=2, **wanted)  # type: ignore[arg-type]
        assert 1 <= len(rows) <= 2 or not names
        names += [row.name for row in rows]
        if cursor is None:
            return names


async def test_pages_are_in_order_of_names(db: Database) -> None:
    """Every technique once, by name whatever its case, over as many pages as it takes."""
    rows = [
        TechniqueRow(technique_id=f"tech_{number}", name=name) for number, name in enumerate(NAMES)
    ]
    await techniques.add_listed(db, rows, NOW)
    names = await _names(db)
    assert sorted(names) == sorted(NAMES)
    plain = [name for name in names if name != "Élan"]  # where it sorts is the database's choice
    assert plain == ["apple", "Banana", "banana", "Cherry 100%", "date_palm"]


async def test_pages_are_searched(db: Database) -> None:
    """Each word has to be somewhere, whatever its case, and stands for itself alone."""
    await techniques.define(db, CAM, NOW)
    fruit = TechniqueRow(technique_id="tech_1", name="Cherry 100%", description="A red date_palm")
    await techniques.add_listed(db, [fruit], NOW)
    for query, found in (
        ("", ["CCTV cam", "Cherry 100%"]),
        ("CAM", ["CCTV cam"]),
        ("cctv-cam", ["CCTV cam"]),
        ("looks cam", ["CCTV cam"]),
        ("tech_1 RED", ["Cherry 100%"]),
        ("0%", ["Cherry 100%"]),
        ("e_p", ["Cherry 100%"]),
        ("c%y", []),
        ("cherry cam", []),
        ("\\", []),
    ):
        assert await _names(db, query=query) == found, query
    await techniques.mark_gone(db, since=LATER, at=LATER)
    assert await _names(db) == ["CCTV cam"]
    assert await _names(db, gone=True) == ["CCTV cam", "Cherry 100%"]


async def test_a_foreign_cursor_is_refused(db: Database) -> None:
    """A cursor that was not given out here is the caller's fault, and the field is named."""
    for cursor in ("", "x", "bnVsbA", "WzEsMl0", "WyJhIl0", "é"):
        with pytest.raises(InvalidRequest) as refused:
            await techniques.page(db, cursor=cursor)
        assert [fault.field for fault in refused.value.fields] == ["cursor"]


async def test_a_cursor_carries_any_name(db: Database) -> None:
    """Other people's names come through a cursor whole, and NUL in one is no error."""
    assert paging.decode(paging.encode("a/b?\N{GRINNING FACE}", "x")) == (
        "a/b?\N{GRINNING FACE}",
        "x",
    )
    assert await techniques.page(db, cursor=paging.encode("\0", "\0")) == ([], None)
