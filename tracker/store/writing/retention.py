"""What retention removes, a few rows at a time, and how far it has come.

Rows to remove are found in reads, page by page, which block nothing. Then a few of them are locked,
checked again and removed, in a transaction of their own; rows that are locked elsewhere stay for
the next run. So it can be interrupted anywhere, repeated, and done by several processes at once.

Keys stay: the key and the fingerprint of a start, the rows of a batch, so that nothing that was
paid for is started again by mistake; unless an age is given for keys, and even then those of
batches stay.

FLORA's lists show a removed run for as long as FLORA keeps it, and only its age distinguishes it
from a run that was never known. So the transaction that removes runs notes the newest of them, by
FLORA's time of creation, for each workspace.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    and_,
    delete,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)

from tracker.core.observation import Observation, Source
from tracker.core.record import Record
from tracker.core.run import RunType
from tracker.store.engine import Database, insert_on
from tracker.store.queries.starts import LISTED, is_in
from tracker.store.queries.sweeps import covers, everything
from tracker.store.schema import (
    UtcDateTime,
    audit,
    batch_rows,
    deliveries,
    endpoints,
    message_attempts,
    messages,
    retention,
    run_events,
    run_outputs,
    runs,
    starts,
    sweeps,
    word,
)
from tracker.store.writing import rollups
from tracker.store.writing.rollups import BEGINNING

KNOWN_WITHIN: Final = timedelta(days=1)
"""A swept history makes a run known sooner; retention removes nothing that is younger."""
AROUND: Final = timedelta(days=1)
"""The run of a start without a known outcome was created within this time of its sending; no clock
is further off."""

_IS_DONE: Final = and_(runs.c.tracking == word("settled"), runs.c.recheck_at.is_(None))
_HAS_BODY: Final = and_(
    deliveries.c.outcome == word("applied"), deliveries.c.body_removed_at.is_(None)
)

Counts = Counter[str]
"""Removed rows by table; `bodies` are those removed with their delivery or without it."""
Mark = Literal["runs", "bodies"]


class PruneKey(NamedTuple):
    """The position of a row in its table, by age."""

    at: datetime
    id: Any


@dataclass(frozen=True, slots=True)
class PrunePage:
    """Rows of a page that are to be removed, and where the next page begins (`None`: no more)."""

    found: list[PruneKey]
    end: PruneKey | None


class ListedRun(NamedTuple):
    """A run that a list or a callback shows, and a time (FLORA's) at which it existed already."""

    run_id: str
    workspace_id: str | None
    at: datetime
    kind: RunType = "technique"


async def find_removed(db: Database, listed: Sequence[ListedRun]) -> tuple[set[str], set[str]]:
    """Those of the runs that are not stored here and that retention must have removed, and those
    that are stored.

    These are read first: one that retention removes meanwhile is in one of the sets.
    """
    ids = [one.run_id for one in listed]
    stored = set(await db.fetchcol(select(runs.c.run_id).where(runs.c.run_id.in_(ids))))
    unknown = [one for one in listed if one.run_id not in stored]
    return await find_possibly_removed(db, unknown) if unknown else set(), stored


async def find_possibly_removed(db: Database, listed: Iterable[ListedRun]) -> set[str]:
    """Those of the runs that retention has removed, unless they are stored here (again).

    Retention has removed runs as new as these, and FLORA's history has been read at their time, so
    that they were known once. A run of a time that was never read is new, however old it is.
    """
    removed_until = await marks(db, "runs")
    if not removed_until:
        return set()
    # A run without a known workspace may belong to any.
    old = [
        one
        for one in listed
        if any(
            mark is not None and one.at <= mark
            for mark in (removed_until.get(one.workspace_id or ""), removed_until.get(""))
        )
    ]
    if not old:
        return set()
    coverage = await everything(db)
    return {
        one.run_id
        for one in old
        if any(
            covers(intervals, one.at)
            for (workspace_id, kind), intervals in coverage.items()
            if kind == one.kind and one.workspace_id in (None, workspace_id)
        )
    }


async def without_removed(
    db: Database, items: Sequence[Observation]
) -> tuple[list[Observation], set[str]]:
    """The items without runs that retention has removed, which must not come back; and the ids of
    those that it may remove before the items are written (`Observed.only_stored`)."""
    ended = _ended(items)
    removed, stored = await find_removed(db, ended) if ended else (set[str](), set[str]())
    return [item for item in items if item.run_id not in removed], stored


async def counted_before(
    db: Database, records: Mapping[str, Record], items: Iterable[Observation]
) -> set[str]:
    """The items that show the end of a run which retention had removed and which was tracked again:
    the rollups have counted that end."""
    ended = [
        one
        for one in _ended(items)
        if (record := records.get(one.run_id)) is not None
        and record.source is Source.TRACK
        and not record.run.precedence.ended
        and record.first_seen_at - one.at > KNOWN_WITHIN
    ]
    return await find_possibly_removed(db, ended) if ended else set()


def _ended(items: Iterable[Observation]) -> list[ListedRun]:
    return [
        ListedRun(
            item.run_id,
            item.workspace_id,
            item.created_at,
            "generation" if item.run_type == "generation" else "technique",
        )
        for item in items
        if item.created_at is not None and item.may_have_ended
    ]


async def marks(db: Database, what: Mark) -> dict[str, datetime]:
    """Up to when retention has come, by workspace; bodies have one mark, under ""."""
    statement = select(retention.c.workspace_id, retention.c.through)
    return {row[0]: row[1] for row in await db.fetch(statement.where(retention.c.what == what))}


def advance(connection: Connection, what: Mark, removed: Iterable[tuple[str, datetime]]) -> None:
    """Move the marks forward, given workspaces and times, in one order so that no two processes
    deadlock."""
    latest = dict(sorted(removed))  # of each workspace the last
    rows = [{"what": what, "workspace_id": one, "through": at} for one, at in latest.items()]
    kept = insert_on(connection.dialect.name)(retention).values(rows)
    later = kept.on_conflict_do_update(
        index_elements=[retention.c.what, retention.c.workspace_id],
        set_={"through": kept.excluded.through},
        where=kept.excluded.through > retention.c.through,
    )
    connection.execute(later)


Protected = dict[str | None, list[tuple[datetime, datetime]]]
"""The spans of creation times, by technique, whose runs are still needed."""


async def protected_runs(db: Database) -> Protected:
    """Where the runs of open and unresolved starts may be."""
    of_start = select(starts.c.technique_id, starts.c.created_at, starts.c.sent_at)
    unknown = union_all(*(of_start.where(is_in(state)) for state in LISTED))
    found: Protected = {}
    for technique_id, created_at, sent_at in await db.fetch(unknown):
        span = (created_at - AROUND, (sent_at or created_at) + AROUND)
        for one in (technique_id, None):  # a run of unknown technique may belong to any start
            found.setdefault(one, []).append(span)
    return found


async def old_runs(
    db: Database, before: datetime, protected: Protected, *, after: PruneKey | None, limit: int
) -> PrunePage:
    """Settled runs that FLORA created, and that settled here, before that time, and that are not
    read again for their bill or outputs."""
    statement = select(
        runs.c.created_at, runs.c.run_id, runs.c.settled_at, runs.c.technique_id
    ).where(_IS_DONE, runs.c.created_at < before)
    rows, end = await _next_rows(db, statement, after, limit)
    found = [
        PruneKey(row.created_at, row.run_id)
        for row in rows
        if row.settled_at < before
        and not any(
            first <= row.created_at <= last for first, last in protected.get(row.technique_id, ())
        )
    ]
    return PrunePage(found, end)


def count_runs(connection: Connection, keys: Sequence[PruneKey], before: datetime) -> Counts:
    """What `delete_runs` would remove, without bodies."""
    run_ids = [key.id for key in keys]
    return Counts(
        runs=len(run_ids),
        run_outputs=_count(connection, run_outputs.c.run_id.in_(run_ids)),
        run_events=_count(connection, run_events.c.run_id.in_(run_ids)),
        deliveries=_count(connection, _applied_for(run_ids, before)),
    )


def _count(connection: Connection, condition: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).where(condition)).scalar_one()


def delete_runs(connection: Connection, keys: Sequence[PruneKey], before: datetime) -> Counts:
    """Remove runs that are not locked, with their outputs, timelines and deliveries.

    The inputs of their starts are emptied; the starts stay.
    """
    wanted = select(runs.c.run_id, runs.c.workspace_id, runs.c.created_at).where(
        runs.c.run_id.in_([key.id for key in keys]), _IS_DONE, runs.c.settled_at < before
    )
    rows = connection.execute(wanted.order_by(runs.c.run_id).with_for_update(skip_locked=True))
    locked = rows.all()
    run_ids = [row.run_id for row in locked]
    if not run_ids:
        return Counts()
    rollups.remove_states(connection, run_ids)
    advance(connection, "runs", [(row.workspace_id or "", row.created_at) for row in locked])
    connection.execute(update(starts).where(starts.c.run_id.in_(run_ids)).values(inputs=[]))
    removed = _delete_deliveries(connection, _applied_for(run_ids, before))
    for table in (run_outputs, run_events, runs):
        statement = delete(table).where(table.c.run_id.in_(run_ids))
        removed[table.name] = connection.execute(statement).rowcount
    return removed


async def old_bodies(
    db: Database, before: datetime, *, after: PruneKey | None, limit: int
) -> PrunePage:
    """Applied deliveries received before that time that still have their body, from the mark on."""
    since = (await marks(db, "bodies")).get("")
    return await _old_deliveries(db, _HAS_BODY, before, after, limit, since)


def empty_bodies(connection: Connection, keys: Sequence[PruneKey], at: datetime) -> Counts:
    """Empty the bodies of those that are not locked; a repetition is still recognised."""
    ids = [row.delivery_id for row in _lock(connection, and_(_among(keys), _HAS_BODY))]
    emptied = (
        update(deliveries)
        .where(deliveries.c.delivery_id.in_(ids))
        .values(body=b"", body_removed_at=at)
    )
    connection.execute(emptied)
    advance(connection, "bodies", [("", _bodies_emptied_until(connection, keys[-1].at))])
    return Counts(bodies=len(ids))


def _bodies_emptied_until(connection: Connection, at: datetime) -> datetime:
    """That time, or the receipt of the first body left: locked, or not applied yet."""
    mark = select(retention.c.through).where(retention.c.what == word("bodies")).scalar_subquery()
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


async def orphaned_deliveries(
    db: Database, before: datetime, after: PruneKey | None, limit: int
) -> PrunePage:
    """Applied deliveries last received before that time whose run is gone."""
    page = await _old_deliveries(db, _last_received("applied", before), before, after, limit)
    # A query of its own, so that the planner never reads all runs for one page.
    about = select(deliveries.c.delivery_id).join(runs, runs.c.run_id == deliveries.c.run_id)
    needed = set(await db.fetchcol(about.where(_among(page.found))))
    return PrunePage([key for key in page.found if key.id not in needed], page.end)


def quarantined(before: datetime) -> Select[Any]:
    """Quarantined deliveries last received before that time."""
    return select(deliveries.c.received_at, deliveries.c.delivery_id).where(
        _last_received("quarantined", before), deliveries.c.received_at < before
    )


def delete_deliveries(
    connection: Connection, keys: Sequence[PruneKey], outcome: str, before: datetime
) -> Counts:
    """Remove those with this outcome that are not locked and were not received again."""
    return _delete_deliveries(connection, and_(_among(keys), _last_received(outcome, before)))


async def old_start_keys(
    db: Database, before: datetime, after: PruneKey | None, limit: int
) -> PrunePage:
    """Starts from before that time that were refused, or whose run is gone.

    One technique after the other, by age, because that has an index. Those of batches stay: a row
    without a known start would be started again.
    """
    technique_id, *ids = after.id if after else ("", "", "")
    key = (starts.c.created_at, *_START_KEY)
    async with db.read() as connection:
        statement = select(*key, starts.c.state, starts.c.run_id).where(
            starts.c.technique_id == technique_id,
            starts.c.created_at < before,
            _is_after(key, (after.at if after else BEGINNING, *ids)),
        )
        rows = (await connection.execute(statement.order_by(*key).limit(limit))).all()
        doomed = await connection.run_sync(_no_longer_needed, rows)
        keys = [PruneKey(row[0], (technique_id, *row[1:3])) for row in rows]
        end = keys[-1] if len(keys) == limit else None
        if end is None:
            following = select(func.min(starts.c.technique_id))
            following = following.where(starts.c.technique_id > technique_id)
            if (following_id := await connection.scalar(following)) is not None:
                end = PruneKey(BEGINNING, (following_id, "", ""))
    return PrunePage([one for one in keys if one.id[1:] in doomed], end)


def delete_start_keys(connection: Connection, keys: Sequence[PruneKey]) -> Counts:
    """Remove starts that are not locked and still not needed."""
    key = tuple_(*_START_KEY)
    wanted = select(*_START_KEY, starts.c.state, starts.c.run_id)
    wanted = wanted.where(key.in_([one.id[1:] for one in keys])).order_by(*_START_KEY)
    rows = connection.execute(wanted.with_for_update(skip_locked=True)).all()
    removed = connection.execute(delete(starts).where(key.in_(_no_longer_needed(connection, rows))))
    return Counts(starts=removed.rowcount)


_START_KEY: Final = (starts.c.workspace_slot, starts.c.idempotency_key)


def _no_longer_needed(connection: Connection, rows: Sequence[Any]) -> list[tuple[str, str]]:
    """The keys of finished starts whose runs are gone and that belong to no batch."""
    stored = select(runs.c.run_id).where(runs.c.run_id.in_([row.run_id for row in rows]))
    keys = [row.idempotency_key for row in rows]
    keyed = select(runs.c.workspace_id, runs.c.idempotency_key)
    keyed = keyed.where(runs.c.idempotency_key.in_(keys))
    batched = select(batch_rows.c.idempotency_key).where(batch_rows.c.idempotency_key.in_(keys))
    known = set(connection.execute(stored).scalars())
    kept = set(connection.execute(batched).scalars())
    having = {(row[0], row[1]) for row in connection.execute(keyed)}
    return [
        (row.workspace_slot, row.idempotency_key)
        for row in rows
        if row.state in ("started", "refused")
        and row.run_id not in known
        and row.idempotency_key not in kept
        and (row.workspace_slot, row.idempotency_key) not in having
    ]


async def old_sweeps(
    db: Database, before: datetime, *, after: PruneKey | None, limit: int
) -> PrunePage:
    """Sweeps that began before that time and that are not referred to any more.

    Of each workspace the last one stays, the last complete one, and those up to which the history
    was read.
    """
    statement = select(sweeps.c.started_at, sweeps.c.id).where(sweeps.c.started_at < before)
    if after is not None:
        statement = statement.where(sweeps.c.id > after.id)
    async with db.read() as connection:
        kept = {one for row in await connection.execute(_needed_sweeps()) for one in row if one}
        statement = statement.where(sweeps.c.id.not_in(kept)).order_by(sweeps.c.id).limit(limit)
        rows = (await connection.execute(statement)).all()
    return PrunePage([PruneKey(row.started_at, row.id) for row in rows], _end(rows, limit))


def delete_by_id(connection: Connection, table: Table, keys: Sequence[PruneKey]) -> Counts:
    """Remove these sweeps, or entries of the audit log."""
    statement = delete(table).where(table.c.id.in_([key.id for key in keys]))
    return Counts({table.name: connection.execute(statement).rowcount})


def old_audit(before: datetime) -> Select[Any]:
    """Entries of the audit log from before that time."""
    return select(audit.c.at, audit.c.id).where(audit.c.at < before)


def old_messages(before: datetime) -> Select[Any]:
    """Messages from before that time that are delivered or given up, or whose endpoint no process
    has had in its settings since."""
    statement = select(messages.c.created_at, messages.c.message_id, _is_over(before).label("over"))
    return statement.where(messages.c.created_at < before)


def count_messages(connection: Connection, keys: Sequence[PruneKey]) -> Counts:
    """What `delete_messages` would remove."""
    attempts = message_attempts.c.message_id.in_([key.id for key in keys])
    return Counts(messages=len(keys), message_attempts=_count(connection, attempts))


def delete_messages(connection: Connection, keys: Sequence[PruneKey], before: datetime) -> Counts:
    """Remove those that are not locked and were not resent meanwhile, with their attempts."""
    wanted = select(messages.c.message_id).where(
        messages.c.message_id.in_([key.id for key in keys]), _is_over(before)
    )
    wanted = wanted.order_by(messages.c.message_id).with_for_update(skip_locked=True)
    ids = connection.execute(wanted).scalars().all()
    removed = Counts()
    for table in (message_attempts, messages):
        statement = delete(table).where(table.c.message_id.in_(ids))
        removed[table.name] = connection.execute(statement).rowcount
    return removed


def _is_over(before: datetime) -> ColumnElement[bool]:
    configured = select(endpoints.c.endpoint_id).where(endpoints.c.configured_at >= before)
    return and_(
        func.coalesce(messages.c.last_attempt_at, messages.c.created_at) < before,
        or_(messages.c.state != word("pending"), messages.c.endpoint_id.not_in(configured)),
    )


def _needed_sweeps() -> Select[Any]:
    complete = and_(sweeps.c.finished_at.is_not(None), sweeps.c.error.is_(None))
    kinds = (
        true(),
        complete,
        and_(complete, sweeps.c.through.is_not(None)),
        and_(complete, sweeps.c.generations_through.is_not(None)),
    )
    last = (func.max(sweeps.c.id).filter(kind) for kind in kinds)
    return select(*last).group_by(sweeps.c.workspace_id)


def _applied_for(run_ids: Sequence[str], before: datetime) -> ColumnElement[bool]:
    return and_(deliveries.c.run_id.in_(run_ids), _last_received("applied", before))


def _last_received(outcome: str, before: datetime) -> ColumnElement[bool]:
    return and_(deliveries.c.outcome == word(outcome), deliveries.c.last_received_at < before)


async def _old_deliveries(
    db: Database,
    doomed: ColumnElement[bool],
    before: datetime,
    after: PruneKey | None,
    limit: int,
    since: datetime | None = None,
) -> PrunePage:
    """The next page of the deliveries by age, and those in it that are doomed."""
    statement = select(
        deliveries.c.received_at, deliveries.c.delivery_id, doomed.label("doomed")
    ).where(deliveries.c.received_at < before)
    if since is not None:
        statement = statement.where(deliveries.c.received_at >= since)
    return await next_page(db, statement, after, limit)


def _delete_deliveries(connection: Connection, doomed: ColumnElement[bool]) -> Counts:
    rows = _lock(connection, doomed)
    ids = [row.delivery_id for row in rows]
    connection.execute(delete(deliveries).where(deliveries.c.delivery_id.in_(ids)))
    return Counts(deliveries=len(ids), bodies=sum(row.body_removed_at is None for row in rows))


def _lock(connection: Connection, wanted: ColumnElement[bool]) -> Sequence[Any]:
    statement = select(deliveries.c.delivery_id, deliveries.c.body_removed_at).where(wanted)
    statement = statement.order_by(deliveries.c.delivery_id)
    return connection.execute(statement.with_for_update(skip_locked=True)).all()


def _among(keys: Sequence[PruneKey]) -> ColumnElement[bool]:
    return deliveries.c.delivery_id.in_([key.id for key in keys])


async def next_page(
    db: Database, statement: Select[Any], after: PruneKey | None, limit: int
) -> PrunePage:
    """The next rows in the order of the statement's first two columns; a third one says whether a
    row is to be removed."""
    rows, end = await _next_rows(db, statement, after, limit)
    return PrunePage([PruneKey(*row[:2]) for row in rows if all(row[2:])], end)


async def _next_rows(
    db: Database, statement: Select[Any], after: PruneKey | None, limit: int
) -> tuple[Sequence[Any], PruneKey | None]:
    """The next rows in the order of the statement's first two columns, and where they end."""
    key = tuple(statement.selected_columns)[:2]
    if after is not None:
        statement = statement.where(_is_after(key, after))
    rows = await db.fetch(statement.order_by(*key).limit(limit))
    return rows, _end(rows, limit)


def _is_after(key: Sequence[Any], values: Sequence[Any]) -> ColumnElement[bool]:
    literals = (literal(value, of.type) for value, of in zip(values, key, strict=True))
    return tuple_(*key) > tuple_(*literals)


def _end(rows: Sequence[Any], limit: int) -> PruneKey | None:
    return PruneKey(*rows[-1][:2]) if len(rows) == limit else None
