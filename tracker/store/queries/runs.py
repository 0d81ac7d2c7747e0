"""Queries of runs, their timeline, deliveries and why they are quarantined, and counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Row, ScalarSelect, Table, and_, cast, func, select
from sqlalchemy.dialects.postgresql import JSONB

from tracker.core.errors import FieldFault, InvalidRequest
from tracker.core.observation import Source
from tracker.core.record import DeliveryOutcome, Record
from tracker.core.run import RetryAdvice, RunStatus, RunType, Status, Tracking, status_of
from tracker.core.schedule import Durations
from tracker.store.claims import WorkspaceScope, within
from tracker.store.engine import Database
from tracker.store.queries.paging import between, chunks, matching, newest_first
from tracker.store.queries.starts import StartState, is_in
from tracker.store.rows import RUN_COLUMNS, fetch_records, read_records
from tracker.store.schema import deliveries, is_rare, run_events, runs, starts, word

# Most runs are completed and settled; the indexes by status and by tracking leave these out.


def has_status(status: Status) -> ColumnElement[bool]:
    """The run has this status, documented or not."""
    known = status_of(status)
    if isinstance(known, RunStatus):
        return is_rare(runs.c.status, known, RunStatus.COMPLETED)
    return and_(runs.c.status == known, runs.c.status != word(RunStatus.COMPLETED))


def is_tracked_as(tracking: Tracking) -> ColumnElement[bool]:
    """The run has this tracking state."""
    return is_rare(runs.c.tracking, tracking, Tracking.SETTLED)


NEWEST_FIRST: Final = (runs.c.created_at, runs.c.run_id)
"""The key of lists of runs."""

DURATIONS_OVER: Final = 200
"""Last completed runs of a technique that its durations are taken from."""


class Event(NamedTuple):
    """An event of a run's timeline. `detail` is the whole observation."""

    id: int
    run_id: str
    at: datetime
    source: Source
    status: Status
    progress: float | None
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRow:
    """A stored callback. `body` is read only for a single delivery; retention may have removed
    it."""

    delivery_id: str
    run_id: str | None
    event_type: str | None
    api_version: str | None
    workspace_id: str | None
    created_at: datetime | None
    received_at: datetime
    last_received_at: datetime
    receipts: int
    outcome: DeliveryOutcome
    reason: str | None
    applied_at: datetime | None = None
    body_removed_at: datetime | None = None
    acknowledged_at: datetime | None = None
    body: bytes | None = None


class Counts(NamedTuple):
    """What waits or needs a person. `oldest_due_at` shows the lag of polling, `oldest_waiting_at`
    that of applying callbacks (`waiting` are not applied). `quarantined` are not acknowledged."""

    active: int
    due: int
    lost: int
    quarantined: int
    open_starts: int
    unresolved_starts: int
    waiting: int
    oldest_due_at: datetime | None
    oldest_waiting_at: datetime | None


async def get_run(db: Database, run_id: str) -> Record | None:
    """The run with its outputs, if known."""
    found = await fetch_records(db, select(*RUN_COLUMNS).where(runs.c.run_id == run_id))
    return found[0] if found else None


async def get_runs(db: Database, run_ids: Iterable[str]) -> dict[str, Record]:
    """The known runs with their outputs, by id."""
    found: list[Record] = []
    for some in chunks(run_ids):
        found += await fetch_records(db, select(*RUN_COLUMNS).where(runs.c.run_id.in_(some)))
    return {record.run.run_id: record for record in found}


async def has_generations(db: Database, workspaces: WorkspaceScope) -> bool:
    """Whether these workspaces have generation runs."""
    statement = (
        select(runs.c.run_id)
        .where(runs.c.run_type == word("generation"), within(workspaces))
        .limit(1)
    )
    return await db.fetchrow(statement) is not None


async def created_within(
    db: Database, workspaces: WorkspaceScope, kind: RunType, span: tuple[datetime, datetime]
) -> list[tuple[str, datetime, str]]:
    """`run_id`, `created_at` and `status` of the runs of one kind that FLORA created within `span`
    (start excluded, end included), without lost ones."""
    statement = select(runs.c.run_id, runs.c.created_at, runs.c.status).where(
        runs.c.created_at > span[0],
        runs.c.created_at <= span[1],
        runs.c.created_at_known,
        runs.c.run_type == kind,
        runs.c.tracking != word(Tracking.LOST.value),
        within(workspaces),
    )
    found = await db.fetch(statement.order_by(runs.c.created_at.desc()))
    return [(row.run_id, row.created_at, row.status) for row in found]


async def list_runs(
    db: Database,
    *,
    status: str | None = None,
    technique_id: str | None = None,
    workspace_id: str | None = None,
    project_id: str | None = None,
    tag: str | None = None,
    tracking: str | None = None,
    retry_advice: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[Record], str | None]:
    """A page of runs with their outputs, newest first, and the cursor of the next page, if any.

    Raises `InvalidRequest` for an invalid cursor, and for an undocumented status that no run has.
    """
    wanted: list[ColumnElement[bool]] = []
    if status is not None:
        wanted.append(has_status(status))
    if tracking is not None:
        wanted.append(is_tracked_as(Tracking(tracking)))
    if retry_advice is not None:
        wanted.append(runs.c.retry_advice == word(RetryAdvice(retry_advice).value))
    of = {"technique_id": technique_id, "workspace_id": workspace_id, "project_id": project_id}
    # Keep SQLite from using the index of these: a tag is usually rarer.
    by_tag = tag is not None and db.dialect == "sqlite"
    for name, value in of.items():
        if value is not None:
            wanted.append((runs.c[name] + "" if by_tag else runs.c[name]) == value)
    if tag is not None:
        wanted.append(is_tagged(db, tag))
    async with db.read() as connection:
        if status is not None and not isinstance(status_of(status), RunStatus):
            some = select(runs.c.run_id).where(has_status(status)).limit(1)
            if (await connection.execute(some)).first() is None:
                known = f"must be one of {', '.join(RunStatus)}, or another that a run has"
                message = f"no run has this status: it {known}"
                raise InvalidRequest(message, [FieldFault("status", known)])
        statement = select(*RUN_COLUMNS).where(*wanted)
        rows, following = await newest_first(
            connection, statement, NEWEST_FIRST, cursor=cursor, limit=limit
        )
        return await read_records(connection, rows), following


def is_tagged(db: Database, tag: str) -> ColumnElement[bool]:
    """The run has this tag, `key=value`."""
    key, _, value = tag.partition("=")
    if db.dialect == "postgresql":
        return and_(runs.c.tags.is_not(None), cast(runs.c.tags, JSONB).contains({key: value}))
    return and_(runs.c.tags.is_not(None), runs.c.tags[key].as_string() == value)


async def events(db: Database, run_id: str) -> list[Event]:
    """The run's timeline, oldest first."""
    statement = select(*(run_events.c[name] for name in Event._fields))
    statement = statement.where(run_events.c.run_id == run_id).order_by(run_events.c.id)
    rows = await db.fetch(statement)
    return [
        Event(**row._asdict())._replace(source=Source(row.source), status=status_of(row.status))
        for row in rows
    ]


async def durations(db: Database, technique_id: str) -> Durations:
    """Seconds from creation to end of the technique's last completed runs that have both."""
    last = (
        select(runs.c.created_at, runs.c.completed_at)
        .where(
            runs.c.technique_id == technique_id,
            runs.c.status == word("completed"),
            runs.c.created_at_known,
            runs.c.completed_at.is_not(None),
        )
        .order_by(runs.c.completed_at.desc())
        .limit(DURATIONS_OVER)
    )
    return Durations.between((row[0], row[1]) for row in await db.fetch(last))


async def list_deliveries(
    db: Database,
    *,
    outcome: str | None = None,
    run_id: str | None = None,
    workspace_id: str | None = None,
    since: datetime | None = None,
    acknowledged: bool | None = None,
    cause: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> tuple[list[DeliveryRow], str | None]:
    """A page of callbacks without their bodies, newest first, and the cursor of the next page.

    `since` is when they were first received, `cause` that of `causes`.

    Raises `InvalidRequest` for an invalid cursor.
    """
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    columns = (column for column in deliveries.c if column.name != "body")
    of = matching(deliveries, run_id=run_id, workspace_id=workspace_id)
    statement = select(*columns).where(*of, *between(deliveries.c.received_at, since))
    if outcome is not None:  # `word`: matches the partial index
        statement = statement.where(deliveries.c.outcome == word(DeliveryOutcome(outcome).value))
    if acknowledged is not None:
        statement = statement.where(deliveries.c.acknowledged_at.is_not(None) == acknowledged)
    if cause is not None:
        statement = statement.where(has_cause(cause))
    async with db.read() as connection:
        rows, following = await newest_first(connection, statement, key, cursor=cursor, limit=limit)
    return [_delivery(row) for row in rows], following


async def get_delivery(db: Database, delivery_id: str) -> DeliveryRow | None:
    """The delivery with its body, if known."""
    statement = select(*deliveries.c).where(deliveries.c.delivery_id == delivery_id)
    found = await db.fetchrow(statement)
    return None if found is None else _delivery(found)


async def counts(db: Database, *, now: datetime) -> Counts:
    """Count what waits, by short indexes."""
    is_waiting = deliveries.c.outcome == word("waiting")
    statement = select(
        _count(runs, is_tracked_as(Tracking.ACTIVE)),
        _count(runs, runs.c.next_check_at <= now),
        _count(runs, is_tracked_as(Tracking.LOST)),
        _count(deliveries, IS_UNSEEN),
        _count(starts, is_in(StartState.SENT)) + _count(starts, is_in(StartState.IN_DOUBT)),
        _count(starts, starts.c.state == word("unresolved")),
        _count(deliveries, is_waiting),
        select(func.min(runs.c.next_check_at)).where(runs.c.next_check_at <= now).scalar_subquery(),
        select(func.min(deliveries.c.received_at)).where(is_waiting).scalar_subquery(),
    )
    (found,) = await db.fetch(statement)
    return Counts(*found)


def _count(table: Table, condition: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).select_from(table).where(condition).scalar_subquery()


def _delivery(row: Row[Any]) -> DeliveryRow:
    values = row._asdict()
    del values["callback_token"]  # a secret: it authenticates callbacks of the start
    if row.body_removed_at is not None:
        values["body"] = None  # emptied by retention
    return DeliveryRow(**values | {"outcome": DeliveryOutcome(values["outcome"])})


# Queries of quarantined deliveries: the causes, and which deliveries have one of them.

IS_UNSEEN: Final = and_(
    deliveries.c.outcome == word("quarantined"), deliveries.c.acknowledged_at.is_(None)
)
"""The delivery is quarantined, and nobody has acknowledged it."""
AMONG: Final = 10_000
"""The newest unseen deliveries, which are grouped."""
CAUSE_LENGTH: Final = 200
"""Characters of a reason by which deliveries are grouped."""
_CAUSE: Final = func.trim(func.substr(func.coalesce(deliveries.c.reason, ""), 1, CAUSE_LENGTH))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """FailedRead deliveries with one reason: how many, and when the first and the last came."""

    text: str
    count: int
    first_at: datetime
    last_at: datetime


def has_cause(text: str) -> ColumnElement[bool]:
    """The reason of the delivery begins with this text of a `Cause`."""
    return _CAUSE.is_not_distinct_from(text)


async def causes(db: Database, *, limit: int) -> list[Cause]:
    """The causes of the newest `AMONG` unseen deliveries, the most frequent first."""
    newest = (
        select(_CAUSE.label("text"), deliveries.c.received_at)
        .where(IS_UNSEEN)
        .order_by(deliveries.c.received_at.desc())
        .limit(AMONG)
        .subquery()
    )
    count, at = func.count().label("count"), newest.c.received_at
    statement = (
        select(newest.c.text, count, func.min(at).label("first_at"), func.max(at).label("last_at"))
        .group_by(newest.c.text)
        .order_by(count.desc(), newest.c.text)
        .limit(limit)
    )
    return [Cause(**row._asdict()) for row in await db.fetch(statement)]


async def unseen_deliveries(db: Database, *, cause: str, until: datetime, limit: int) -> list[str]:
    """The ids of unseen deliveries with this cause that were received until then, oldest first."""
    key = (deliveries.c.received_at, deliveries.c.delivery_id)
    statement = (
        select(deliveries.c.delivery_id)
        .where(IS_UNSEEN, has_cause(cause), deliveries.c.received_at <= until)
        .order_by(*key)
        .limit(limit)
    )
    return await db.fetchcol(statement)
