"""The catalogue of techniques as it was last read from FLORA."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select
from sqlalchemy.dialects import postgresql, sqlite

from tracker.store.engine import Database
from tracker.store.tables import techniques


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueRow:
    """A technique. `inputs` and `outputs` are FLORA's own objects; `run_cost` is USD.

    `slug` is the other name under which it was asked for, where it was.
    """

    technique_id: str
    name: str
    description: str | None = None
    run_cost: Decimal | None = None
    inputs: tuple[dict[str, Any], ...] = ()
    outputs: tuple[dict[str, Any], ...] = ()
    slug: str | None = None
    synced_at: datetime | None = None
    gone_at: datetime | None = None


async def upsert(db: Database, rows: Sequence[TechniqueRow], at: datetime) -> None:
    """Keep these techniques as they were read at that moment; the last of equal ids counts.

    A slug that is known stays where the row brings none.
    """
    latest = {row.technique_id: row for row in rows}
    if not latest:
        return
    values = [_values(latest[key], at) for key in sorted(latest)]
    insert: Any = postgresql.insert if db.dialect == "postgresql" else sqlite.insert
    statement = insert(techniques)
    replaced = {name: statement.excluded[name] for name in values[0] if name != "technique_id"}
    replaced["slug"] = func.coalesce(statement.excluded.slug, techniques.c.slug)
    statement = statement.on_conflict_do_update(
        index_elements=[techniques.c.technique_id], set_=replaced
    )

    def work(connection: Connection) -> None:
        connection.execute(statement, values)

    await db.write(work)


async def get(db: Database, technique_id: str) -> TechniqueRow | None:
    """The technique with that id."""
    return await _one(db, select(techniques).where(techniques.c.technique_id == technique_id))


async def by_slug(db: Database, slug: str) -> TechniqueRow | None:
    """The technique that was last read under that slug."""
    return await _one(
        db,
        select(techniques)
        .where(techniques.c.slug == slug)
        .order_by(techniques.c.synced_at.desc())
        .limit(1),
    )


async def list_all(db: Database) -> list[TechniqueRow]:
    """All techniques that FLORA's catalogue still has, by name."""
    statement = (
        select(techniques)
        .where(techniques.c.gone_at.is_(None))
        .order_by(techniques.c.name, techniques.c.technique_id)
    )
    async with db.read() as connection:
        return [_row(row) for row in await connection.execute(statement)]


async def _one(db: Database, statement: Select[Any]) -> TechniqueRow | None:
    async with db.read() as connection:
        found = (await connection.execute(statement)).first()
    return None if found is None else _row(found)


def _values(row: TechniqueRow, at: datetime) -> dict[str, Any]:
    return {
        "technique_id": row.technique_id,
        "slug": row.slug,
        "name": row.name,
        "description": row.description,
        "run_cost": row.run_cost,
        "inputs": list(row.inputs),
        "outputs": list(row.outputs),
        "synced_at": at,
        "gone_at": None,
    }


def _row(row: Row[Any]) -> TechniqueRow:
    values = row._asdict()
    return TechniqueRow(
        **values | {"inputs": tuple(values["inputs"]), "outputs": tuple(values["outputs"])}
    )
