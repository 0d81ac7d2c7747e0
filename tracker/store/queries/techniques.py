"""The catalogue of techniques as last read from FLORA.

A single read has the definition and replaces what was stored. A list may leave out inputs and
outputs, which then stay. A technique that a complete list lacks is kept and marked `gone_at` until
it appears again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import (
    Connection,
    Row,
    Select,
    Text,
    and_,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from tracker.core.starts import TechniqueDefinition
from tracker.store.engine import Database
from tracker.store.queries import paging
from tracker.store.schema import runs, techniques


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueRow(TechniqueDefinition):
    """A technique as it is stored.

    `slug` is its alternative id, if it was requested by one. `synced_at` is the last read of any
    kind, `defined_at` the last read of the definition (`None`: never, or outdated), `listed_at` the
    last list that had it, `gone_at` the first complete list without it.
    """

    slug: str | None = None
    synced_at: datetime | None = None
    defined_at: datetime | None = None
    listed_at: datetime | None = None
    gone_at: datetime | None = None

    @classmethod
    def of(cls, found: TechniqueDefinition, *, slug: str | None = None) -> Self:
        """A technique that was read, to be stored."""
        return cls(
            **{one.name: getattr(found, one.name) for one in fields(TechniqueDefinition)}, slug=slug
        )


class ListResult(NamedTuple):
    """The effect of a page of the list: the number of new and of returned techniques."""

    new: int
    back: int


async def define(db: Database, row: TechniqueRow, at: datetime) -> TechniqueRow:
    """Store a technique from a single read, and return its row.

    Its slug is kept if `row` has none, and taken from other techniques otherwise.
    """
    values = _values(row, at) | {"defined_at": at}
    insert = db.insert(techniques).values(values)
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


async def add_listed(db: Database, rows: Sequence[TechniqueRow], at: datetime) -> ListResult:
    """Store techniques from a list; of equal ids the last counts.

    Inputs and outputs that the list leaves out stay unchanged.
    """
    latest = {row.technique_id: row for row in rows}
    if not latest:
        return ListResult(0, 0)
    insert = db.insert(techniques)
    shown = ("name", "description", "run_cost", "synced_at", "listed_at", "gone_at")
    defined = {
        name: case((cast(insert.excluded[name], Text) == "[]", column), else_=insert.excluded[name])
        for name, column in (("inputs", techniques.c.inputs), ("outputs", techniques.c.outputs))
    }
    statement = insert.on_conflict_do_update(
        index_elements=[techniques.c.technique_id],
        set_={name: insert.excluded[name] for name in shown} | defined,
    )
    values = [_values(latest[one], at) | {"listed_at": at} for one in sorted(latest)]
    known = select(techniques.c.technique_id, techniques.c.gone_at).where(
        techniques.c.technique_id.in_(list(latest))
    )

    def work(connection: Connection) -> ListResult:
        before = connection.execute(known).all()
        connection.execute(statement, values)
        back = sum(row.gone_at is not None for row in before)
        return ListResult(new=len(latest) - len(before), back=back)

    return await db.write(work)


async def mark_gone(db: Database, *, since: datetime, at: datetime) -> int:
    """Mark techniques that no list has shown since `since`; returns their number."""
    statement = (
        update(techniques)
        .where(techniques.c.gone_at.is_(None), techniques.c.listed_at < since)
        .values(gone_at=at)
    )
    return await db.execute(statement)


async def doubt(db: Database, technique_id: str, *, before: datetime) -> None:
    """Mark a definition that was read before `before` as outdated."""
    statement = (
        update(techniques)
        .where(techniques.c.technique_id == technique_id, techniques.c.defined_at < before)
        .values(defined_at=None)
    )
    await db.execute(statement)


async def get(db: Database, technique_id: str) -> TechniqueRow | None:
    """The technique with this id, if known."""
    return await _one(db, select(techniques).where(techniques.c.technique_id == technique_id))


async def by_slug(db: Database, slug: str) -> TechniqueRow | None:
    """The technique last read with this slug, if any."""
    return await _one(
        db,
        select(techniques)
        .where(techniques.c.slug == slug)
        .order_by(techniques.c.synced_at.desc())
        .limit(1),
    )


async def id_of(db: Database, technique: str | None) -> str | None:
    """The id of a technique in a filter, from its id or slug; FLORA is not asked."""
    if technique is None or technique.startswith("tech_"):
        return technique
    known = await by_slug(db, technique)
    return f"tech_{technique}" if known is None else known.technique_id


async def list_all(db: Database) -> list[TechniqueRow]:
    """All techniques that are still in FLORA's catalogue, by name."""
    statement = select(techniques).where(techniques.c.gone_at.is_(None)).order_by(*_BY_NAME)
    return [_row(row) for row in await db.fetch(statement)]


async def page(
    db: Database, *, query: str = "", gone: bool = False, cursor: str | None = None, limit: int = 50
) -> tuple[list[TechniqueRow], str | None]:
    """A page of techniques by name, and the cursor of the next page, if any.

    All words of `query` have to be in the id, slug, name or description, ignoring case. `gone`
    includes retired techniques. Raises `InvalidRequest` for an invalid cursor.
    """
    statement = select(techniques)
    for word in query.split():
        has_word = (techniques.c[name].icontains(word, autoescape=True) for name in _SEARCHED)
        statement = statement.where(or_(*has_word))
    if not gone:
        statement = statement.where(techniques.c.gone_at.is_(None))
    if cursor is not None:
        name, technique_id = paging.decode(cursor)
        text = techniques.c.name.type
        last = (func.lower(literal(name, text)), literal(technique_id, text))
        statement = statement.where(tuple_(*_BY_NAME) > tuple_(*last))
    rows = await db.fetch(statement.order_by(*_BY_NAME).limit(limit + 1))
    found = [_row(row) for row in rows[:limit]]
    more = len(rows) > limit
    return found, paging.encode(found[-1].name, found[-1].technique_id) if more else None


async def technique_names(db: Database, technique_ids: Sequence[str]) -> dict[str, str]:
    """Names of techniques, from the catalogue or else from their newest run."""
    if not technique_ids:
        return {}
    known = select(techniques.c.technique_id, techniques.c.name).where(
        techniques.c.technique_id.in_(technique_ids)
    )
    async with db.read() as connection:
        names = {row.technique_id: row.name for row in await connection.execute(known)}
        for technique_id in technique_ids:
            if technique_id not in names:
                newest = (
                    select(runs.c.technique_name)
                    .where(runs.c.technique_id == technique_id)
                    .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
                    .limit(1)
                )
                name = (await connection.execute(newest)).scalar()
                if name:
                    names[technique_id] = name
    return names


_BY_NAME: Final = (func.lower(techniques.c.name), techniques.c.technique_id)
_SEARCHED: Final = ("technique_id", "slug", "name", "description")


async def _one(db: Database, statement: Select[Any]) -> TechniqueRow | None:
    found = await db.fetchrow(statement)
    return None if found is None else _row(found)


def _values(row: TechniqueRow, at: datetime) -> dict[str, Any]:
    shown = {one.name: getattr(row, one.name) for one in fields(TechniqueDefinition)}
    return shown | {"slug": row.slug, "synced_at": at, "gone_at": None}


def _row(row: Row[Any]) -> TechniqueRow:
    values = row._asdict()
    return TechniqueRow(
        **values | {"inputs": tuple(values["inputs"]), "outputs": tuple(values["outputs"])}
    )
