"""What retention removes, a few rows at a time: old runs and what hangs on them, bodies, sweeps.

What is to go is looked for in reads, page by page, which block nobody. Then a few rows are locked,
looked at once more and removed, in a transaction of their own. Nobody is waited for: what somebody
else holds at that moment stays for the next time. So it can be broken off anywhere, repeated, and
done by several processes at once.

Keys stay: of a start its key and its fingerprint, of a batch its rows, so that nothing that was
paid for can be asked for again by mistake; unless somebody says after how long nobody will, and
then too those of a batch's rows stay. How far it has come stays as well: see
`tracker.store.writing.retention`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    delete,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    update,
)

from tracker.store.engine import Database
from tracker.store.schema import (
    UtcDateTime,
    audit,
    batch_rows,
    deliveries,
    run_events,
    run_outputs,
    runs,
    starts,
    sweeps,
    word,
)
from tracker.store.schema import retention as marks
from tracker.store.writing import retention
from tracker.store.writing import rollups as tallies

AROUND: Final = timedelta(days=1)
"""A start of which nobody knows what came of it may be any run of its technique that was created
within this of its sending; no clock is further off."""

BEGINNING: Final = datetime(1, 1, 2, tzinfo=UTC)
"""Before everything."""

_HAS_BODY: Final = and_(
    deliveries.c.outcome == word("applied"), deliveries.c.body_removed_at.is_(None)
)
"""An applied delivery whose body is still there."""

Counts = Counter[str]
"""Rows by table; and as `bodies` the bodies that are gone, with their delivery or without it."""


class Key(NamedTuple):
    """Where a row stands in the order in which its table is walked through: by age."""

    at: datetime
    id: Any


@dataclass(frozen=True, slots=True)
class Page:
    """Those rows of a stretch of a table that are to go, and where the next stretch begins; `None`
    at the end."""

    found: list[Key]
    end: Key | None


Spared = dict[str | None, list[tuple[datetime, datetime]]]
"""For each technique the times of creation of runs that are still needed."""


async def spared(db: Database) -> Spared:
    """Which runs may be those of starts that are open or unresolved."""
    columns = (starts.c.technique_id, starts.c.created_at, starts.c.sent_at)
    unknown = (
        select(*columns)
        .where(starts.c.state.in_([word("stored"), word("sent")]))
        .union_all(
            select(*columns).where(starts.c.state == word("in_doubt")),
            select(*columns).where(starts.c.state == word("unresolved")),
        )
    )
    found: Spared = {}
    async with db.read() as connection:
        for technique_id, created_at, sent_at in await connection.execute(unknown):
            span = (created_at - AROUND, (sent_at or created_at) + AROUND)
            for one in (technique_id, None):  # a run of unknown technique may be anybody's
                found.setdefault(one, []).append(span)
    return found


async def old_runs(
    db: Database, before: datetime, spared: Spared, *, after: Key | None, limit: int
) -> Page:
    """Settled runs that FLORA made and that settled here before that moment."""
    key = (runs.c.created_at, runs.c.run_id)
    statement = select(*key, runs.c.settled_at, runs.c.technique_id).where(
        runs.c.tracking == word("settled"), runs.c.created_at < before
    )
    async with db.read() as connection:
        rows = (await connection.execute(_walk(statement, key, after, limit))).all()
    found = [
        Key(row.created_at, row.run_id)
        for row in rows
        if row.settled_at < before
        and not any(
            first <= row.created_at <= last for first, last in spared.get(row.technique_id, ())
        )
    ]
    return Page(found, _end(rows, limit))


def count_runs(connection: Connection, keys: Sequence[Key], before: datetime) -> Counts:
    """What `delete_runs` would remove, bodies apart."""
    run_ids = [key.id for key in keys]
    counted = Counts(runs=len(run_ids))
    for table, condition in (
        (run_outputs, run_outputs.c.run_id.in_(run_ids)),
        (run_events, run_events.c.run_id.in_(run_ids)),
        (deliveries, _came_for(run_ids, before)),
    ):
        statement = select(func.count()).select_from(table).where(condition)
        counted[table.name] = connection.execute(statement).scalar_one()
    return counted


def delete_runs(connection: Connection, keys: Sequence[Key], before: datetime) -> Counts:
    """Remove those of the runs that nobody holds, with their outputs, timelines and deliveries.

    What their starts asked for goes as well; that they were asked for stays.
    """
    still = (runs.c.tracking == word("settled"), runs.c.settled_at < before)
    wanted = select(runs.c.run_id, runs.c.workspace_id, runs.c.created_at).where(
        runs.c.run_id.in_([key.id for key in keys]), *still
    )
    rows = connection.execute(wanted.order_by(runs.c.run_id).with_for_update(skip_locked=True))
    taken = rows.all()
    run_ids = [row.run_id for row in taken]
    if not run_ids:
        return Counts()
    tallies.forget(connection, run_ids)
    retention.reach(connection, "runs", [(row.workspace_id or "", row.created_at) for row in taken])
    connection.execute(update(starts).where(starts.c.run_id.in_(run_ids)).values(inputs=[]))
    removed = _delete_deliveries(connection, _came_for(run_ids, before))
    for table in (run_outputs, run_events, runs):
        statement = delete(table).where(table.c.run_id.in_(run_ids))
        removed[table.name] = connection.execute(statement).rowcount
    return removed


async def old_bodies(db: Database, before: datetime, *, after: Key | None, limit: int) -> Page:
    """Applied deliveries that came before that moment and still have their body.

    It goes on where the last one came to, whoever that was.
    """
    reached = (await retention.marks(db, "bodies")).get("")
    return await _old_deliveries(db, before, _HAS_BODY, after=after, since=reached, limit=limit)


def empty_bodies(connection: Connection, keys: Sequence[Key], at: datetime) -> Counts:
    """Empty the bodies of those that nobody holds; a repetition is still recognised."""
    ids = [row.delivery_id for row in _lock(connection, and_(_among(keys), _HAS_BODY))]
    emptied = (
        update(deliveries)
        .where(deliveries.c.delivery_id.in_(ids))
        .values(body=b"", body_removed_at=at)
    )
    connection.execute(emptied)
    retention.reach(connection, "bodies", [("", _bodies_gone_until(connection, keys[-1].at))])
    return Counts(bodies=len(ids))


def _bodies_gone_until(connection: Connection, at: datetime) -> datetime:
    """That moment, or when the first of those came that are still to go: what was held, or
    what is not applied yet."""
    mark = select(marks.c.through).where(marks.c.what == word("bodies")).scalar_subquery()
    first_left = (
        select(deliveries.c.received_at)
        .where(
            or_(_HAS_BODY, deliveries.c.outcome == word("waiting")),
            deliveries.c.received_at >= func.coalesce(mark, literal(BEGINNING, UtcDateTime)),
            deliveries.c.received_at <= at,
        )
        .order_by(deliveries.c.received_at)
        .limit(1)
    )
    return connection.scalar(first_left) or at


async def left_deliveries(db: Database, before: datetime, *, after: Key | None, limit: int) -> Page:
    """Applied deliveries that last came before that moment and whose run is gone."""
    page = await _old_deliveries(db, before, _applied_before(before), after=after, limit=limit)
    # Asked by itself, so that no planner thinks of reading all runs for one page.
    about = select(deliveries.c.delivery_id).join(runs, runs.c.run_id == deliveries.c.run_id)
    about = about.where(_among(page.found))
    async with db.read() as connection:
        needed = set((await connection.execute(about)).scalars())
    return Page([key for key in page.found if key.id not in needed], page.end)


async def quarantined(db: Database, before: datetime, *, after: Key | None, limit: int) -> Page:
    """Quarantined deliveries that last came before that moment."""
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    statement = select(*key).where(_quarantined_before(before), deliveries.c.received_at < before)
    async with db.read() as connection:
        rows = (await connection.execute(_walk(statement, key, after, limit))).all()
    return Page([Key(*row) for row in rows], _end(rows, limit))


def delete_left(connection: Connection, keys: Sequence[Key], before: datetime) -> Counts:
    """Remove those of the applied deliveries that nobody holds and that did not come again."""
    return _delete_deliveries(connection, and_(_among(keys), _applied_before(before)))


def delete_quarantined(connection: Connection, keys: Sequence[Key], before: datetime) -> Counts:
    """The same for quarantined ones."""
    return _delete_deliveries(connection, and_(_among(keys), _quarantined_before(before)))


async def old_keys(db: Database, before: datetime, *, after: Key | None, limit: int) -> Page:
    """Starts from before that moment that became a run which is gone, or that were refused.

    One technique after the other, by age, as there is an index for that. Those of batches stay: a
    row whose start is not known would be started.
    """
    last = (BEGINNING, "", "")
    async with db.read() as connection:
        if after is None:
            technique_id = await connection.scalar(select(func.min(starts.c.technique_id)))
            if technique_id is None:
                return Page([], None)
        else:
            technique_id, *ids = after.id
            last = (after.at, *ids)
        key = (starts.c.created_at, starts.c.workspace_slot, starts.c.idempotency_key)
        values = (literal(value, of.type) for value, of in zip(last, key, strict=True))
        statement = select(*key, starts.c.state, starts.c.run_id).where(
            starts.c.technique_id == technique_id,
            starts.c.created_at < before,
            tuple_(*key) > tuple_(*values),
        )
        rows = (await connection.execute(statement.order_by(*key).limit(limit))).all()
        doomed = await connection.run_sync(_no_longer_needed, rows)
        found = [Key(row[0], (technique_id, *row[1:3])) for row in rows if row[1:3] in doomed]
        if len(rows) == limit:
            return Page(found, Key(rows[-1][0], (technique_id, *rows[-1][1:3])))
        others = select(func.min(starts.c.technique_id)).where(starts.c.technique_id > technique_id)
        following = await connection.scalar(others)
    return Page(found, None if following is None else Key(BEGINNING, (following, "", "")))


def delete_keys(connection: Connection, keys: Sequence[Key]) -> Counts:
    """Forget those of the starts that nobody holds and that are still not needed."""
    mine = tuple_(starts.c.workspace_slot, starts.c.idempotency_key)
    columns = (starts.c.workspace_slot, starts.c.idempotency_key, starts.c.state, starts.c.run_id)
    wanted = select(starts.c.created_at, *columns).where(mine.in_([key.id[1:] for key in keys]))
    wanted = wanted.order_by(*columns[:2]).with_for_update(skip_locked=True)
    doomed = _no_longer_needed(connection, connection.execute(wanted).all())
    removed = connection.execute(delete(starts).where(mine.in_(doomed)))
    return Counts(starts=removed.rowcount)


def _no_longer_needed(connection: Connection, rows: Sequence[Any]) -> list[tuple[str, str]]:
    """The keys of those starts that have come to their end, of which nothing is here any more."""
    here = select(runs.c.run_id).where(runs.c.run_id.in_([row.run_id for row in rows]))
    asked = [row.idempotency_key for row in rows]
    batched = select(batch_rows.c.idempotency_key).where(batch_rows.c.idempotency_key.in_(asked))
    known = set(connection.execute(here).scalars())
    kept = set(connection.execute(batched).scalars())
    return [
        (row.workspace_slot, row.idempotency_key)
        for row in rows
        if row.state in ("started", "refused")
        and row.run_id not in known
        and row.idempotency_key not in kept
    ]


async def old_sweeps(db: Database, before: datetime, *, after: Key | None, limit: int) -> Page:
    """Sweeps that began before that moment and on which nothing rests any more.

    Of each workspace the last one stays, the last complete one, and those that say how far the
    history is here.
    """
    statement = select(sweeps.c.started_at, sweeps.c.id).where(sweeps.c.started_at < before)
    if after is not None:
        statement = statement.where(sweeps.c.id > after.id)
    async with db.read() as connection:
        kept = await connection.run_sync(_resting_on)
        walk = statement.where(sweeps.c.id.not_in(kept)).order_by(sweeps.c.id).limit(limit)
        rows = (await connection.execute(walk)).all()
    return Page([Key(*row) for row in rows], _end(rows, limit))


def delete_sweeps(connection: Connection, keys: Sequence[Key]) -> Counts:
    """Remove these sweeps."""
    statement = delete(sweeps).where(sweeps.c.id.in_([key.id for key in keys]))
    return Counts(sweeps=connection.execute(statement).rowcount)


async def old_audit(db: Database, before: datetime, *, after: Key | None, limit: int) -> Page:
    """Entries of the audit log from before that moment."""
    key = (audit.c.at, audit.c.id)
    statement = select(*key).where(audit.c.at < before)
    async with db.read() as connection:
        rows = (await connection.execute(_walk(statement, key, after, limit))).all()
    return Page([Key(*row) for row in rows], _end(rows, limit))


def delete_audit(connection: Connection, keys: Sequence[Key]) -> Counts:
    """Remove these entries."""
    statement = delete(audit).where(audit.c.id.in_([key.id for key in keys]))
    return Counts(audit=connection.execute(statement).rowcount)


def _resting_on(connection: Connection) -> list[int]:
    complete = and_(sweeps.c.finished_at.is_not(None), sweeps.c.error.is_(None))
    conditions = (
        true(),
        complete,
        and_(complete, sweeps.c.through.is_not(None)),
        and_(complete, sweeps.c.generations_through.is_not(None)),
    )
    found: list[int] = []
    for workspace_id in connection.execute(select(sweeps.c.workspace_id).distinct()).scalars():
        mine = sweeps.c.workspace_id == workspace_id  # IS NULL for the one that is not known
        for condition in conditions:
            newest = select(sweeps.c.id).where(mine, condition)
            newest = newest.order_by(sweeps.c.started_at.desc(), sweeps.c.id.desc()).limit(1)
            found += connection.execute(newest).scalars()
    return found


def _came_for(run_ids: Sequence[str], before: datetime) -> ColumnElement[bool]:
    return and_(deliveries.c.run_id.in_(run_ids), _applied_before(before))


def _applied_before(before: datetime) -> ColumnElement[bool]:
    return and_(deliveries.c.outcome == word("applied"), deliveries.c.last_received_at < before)


def _quarantined_before(before: datetime) -> ColumnElement[bool]:
    return and_(deliveries.c.outcome == word("quarantined"), deliveries.c.last_received_at < before)


async def _old_deliveries(
    db: Database,
    before: datetime,
    doomed: ColumnElement[bool],
    *,
    after: Key | None,
    limit: int,
    since: datetime | None = None,
) -> Page:
    """The next stretch of the deliveries by age, and those in it that are doomed."""
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    statement = select(*key, doomed.label("doomed")).where(deliveries.c.received_at < before)
    if since is not None:
        statement = statement.where(deliveries.c.received_at >= since)
    async with db.read() as connection:
        rows = (await connection.execute(_walk(statement, key, after, limit))).all()
    return Page([Key(*row[:2]) for row in rows if row.doomed], _end(rows, limit))


def _delete_deliveries(connection: Connection, doomed: ColumnElement[bool]) -> Counts:
    rows = _lock(connection, doomed)
    ids = [row.delivery_id for row in rows]
    connection.execute(delete(deliveries).where(deliveries.c.delivery_id.in_(ids)))
    bodies = sum(row.body_removed_at is None for row in rows)
    return Counts(deliveries=len(ids), bodies=bodies)


def _lock(connection: Connection, wanted: ColumnElement[bool]) -> Sequence[Any]:
    statement = select(deliveries.c.delivery_id, deliveries.c.body_removed_at).where(wanted)
    statement = statement.order_by(deliveries.c.delivery_id)
    return connection.execute(statement.with_for_update(skip_locked=True)).all()


def _among(keys: Sequence[Key]) -> ColumnElement[bool]:
    return deliveries.c.delivery_id.in_([key.id for key in keys])


def _walk(
    statement: Select[Any], key: Sequence[ColumnElement[Any]], after: Key | None, limit: int
) -> Select[Any]:
    if after is not None:
        values = (literal(value, of.type) for value, of in zip(after, key, strict=True))
        statement = statement.where(tuple_(*key) > tuple_(*values))
    return statement.order_by(*key).limit(limit)


def _end(rows: Sequence[Any], limit: int) -> Key | None:
    return Key(*rows[-1][:2]) if len(rows) == limit else None
