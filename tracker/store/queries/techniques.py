"""The catalogue of techniques as it was last read from FLORA.

A technique comes in by two ways. Read by itself, it shows its definition, and whatever was known is
replaced. In a list its inputs and outputs may be left out, which says nothing about them. One that
a complete list lacks is kept and marked (`gone_at`), until it is seen again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    func,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from tracker.store.engine import Database
from tracker.store.queries import cursors
from tracker.store.schema import techniques


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueRow:
    """A technique. `inputs` and `outputs` are FLORA's own objects; `run_cost` is USD.

    `slug` is the other name under which it was asked for, where it was. `synced_at` is when
    anything was last read of it, `defined_at` when its definition was (`None`: never by itself, or
    it is in doubt), `listed_at` when a list last showed it, `gone_at` since when lists lack it.
    """

    technique_id: str
    name: str
    description: str | None = None
    run_cost: Decimal | None = None
    inputs: tuple[dict[str, Any], ...] = ()
    outputs: tuple[dict[str, Any], ...] = ()
    slug: str | None = None
    synced_at: datetime | None = None
    defined_at: datetime | None = None
    listed_at: datetime | None = None
    gone_at: datetime | None = None


class Listed(NamedTuple):
    """What a page of the list brought: techniques that were not known, and that had been gone."""

    new: int
    back: int


async def define(db: Database, row: TechniqueRow, at: datetime) -> TechniqueRow:
    """Keep a technique as it was read by itself at that moment; the row as it then is.

    A slug that is known stays where the row brings none; one that it brings is nobody else's.
    """
    values = _values(row, at) | {"defined_at": at}
    insert = _inserter(db)(techniques).values(values)
    replaced = {name: insert.excluded[name] for name in values if name != "technique_id"}
    replaced["slug"] = func.coalesce(insert.excluded.slug, techniques.c.slug)
    statement = insert.on_conflict_do_update(
        index_elements=[techniques.c.technique_id], set_=replaced
    ).returning(*techniques.c)
    others = and_(techniques.c.slug == row.slug, techniques.c.technique_id != row.technique_id)

    def work(connection: Connection) -> TechniqueRow:
        if row.slug is not None:
            connection.execute(update(techniques).where(others).values(slug=None))
        return _row(connection.execute(statement).one())

    return await db.write(work)


async def add_listed(db: Database, rows: Sequence[TechniqueRow], at: datetime) -> Listed:
    """Keep these techniques as a list showed them at that moment; the last of equal ids counts.

    Inputs and outputs that the list leaves out stay as they are known.
    """
    latest = {row.technique_id: row for row in rows}
    if not latest:
        return Listed(0, 0)
    in_order = sorted(latest.values(), key=lambda row: (*_shows(row), row.technique_id))
    groups = [
        (
            _list_statement(db, shows_inputs=shows[0], shows_outputs=shows[1]),
            [_values(row, at) | {"listed_at": at} for row in group],
        )
        for shows, group in groupby(in_order, key=_shows)
    ]
    known = select(techniques.c.technique_id, techniques.c.gone_at).where(
        techniques.c.technique_id.in_(list(latest))
    )

    def work(connection: Connection) -> Listed:
        before = connection.execute(known).all()
        for statement, values in groups:
            connection.execute(statement, values)
        back = sum(row.gone_at is not None for row in before)
        return Listed(new=len(latest) - len(before), back=back)

    return await db.write(work)


async def mark_gone(db: Database, *, since: datetime, at: datetime) -> int:
    """Mark what lists have shown before `since` and not from then on; returns how many."""
    statement = (
        update(techniques)
        .where(techniques.c.gone_at.is_(None), techniques.c.listed_at < since)
        .values(gone_at=at)
    )
    return await db.write(lambda connection: connection.execute(statement).rowcount)


async def doubt(db: Database, technique_id: str, *, before: datetime) -> None:
    """Forget that the definition was read, where that was before then: it has to be read again."""
    statement = (
        update(techniques)
        .where(techniques.c.technique_id == technique_id, techniques.c.defined_at < before)
        .values(defined_at=None)
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


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
    statement = select(techniques).where(techniques.c.gone_at.is_(None)).order_by(*_BY_NAME)
    async with db.read() as connection:
        return [_row(row) for row in await connection.execute(statement)]


async def page(
    db: Database,
    *,
    query: str = "",
    gone: bool = False,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[TechniqueRow], str | None]:
    """A page of techniques by name, and the cursor of the next page, if any.

    `query` is words that all have to stand in the id, the slug, the name or the description,
    whatever their case. `gone` shows those too that FLORA no longer has. Raises `InvalidRequest`,
    naming the field, for a cursor that was not given out here.
    """
    statement = select(techniques).where(*(_holds(word) for word in query.split()))
    if not gone:
        statement = statement.where(techniques.c.gone_at.is_(None))
    if cursor is not None:
        name, technique_id = cursors.decode(cursor)
        text = techniques.c.name.type
        last = (func.lower(literal(name, text)), literal(technique_id, text))
        statement = statement.where(tuple_(*_BY_NAME) > tuple_(*last))
    async with db.read() as connection:
        rows = (await connection.execute(statement.order_by(*_BY_NAME).limit(limit + 1))).all()
    found = [_row(row) for row in rows[:limit]]
    more = len(rows) > limit
    return found, cursors.encode(found[-1].name, found[-1].technique_id) if more else None


_BY_NAME: Final = (func.lower(techniques.c.name), techniques.c.technique_id)
_SEARCHED: Final = ("technique_id", "slug", "name", "description")


def _holds(word: str) -> ColumnElement[bool]:
    return or_(*(techniques.c[name].icontains(word, autoescape=True) for name in _SEARCHED))


async def _one(db: Database, statement: Select[Any]) -> TechniqueRow | None:
    async with db.read() as connection:
        found = (await connection.execute(statement)).first()
    return None if found is None else _row(found)


def _inserter(db: Database) -> Any:
    return postgresql.insert if db.dialect == "postgresql" else sqlite.insert


def _shows(row: TechniqueRow) -> tuple[bool, bool]:
    """Whether the list has shown its inputs, and its outputs."""
    return bool(row.inputs), bool(row.outputs)


def _list_statement(db: Database, *, shows_inputs: bool, shows_outputs: bool) -> Any:
    """One statement for all those of a page of which the list shows the same."""
    insert = _inserter(db)(techniques)
    shown = ["name", "description", "run_cost", "synced_at", "listed_at", "gone_at"]
    shown += ["inputs"] * shows_inputs + ["outputs"] * shows_outputs
    return insert.on_conflict_do_update(
        index_elements=[techniques.c.technique_id],
        set_={name: insert.excluded[name] for name in shown},
    )


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
