"""Runs: their rows as records and back, and queries of runs and their timelines.

What `merge` decides can be read back from a row alone: a test compares each row with the merge of
its events.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import datetime
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Connection,
    Row,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    extract,
    func,
    select,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB

from tracker.core.errors import FieldFault, InvalidRequest
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import (
    Details,
    Output,
    Precedence,
    Precedences,
    RetryAdvice,
    RunError,
    RunState,
    RunStatus,
    RunType,
    Status,
    Tracking,
    known,
)
from tracker.core.schedule import Durations, NextPoll, PollReason
from tracker.store.engine import Database, Values
from tracker.store.queries.paging import newest_first, unindexed
from tracker.store.schema import (
    CleanText,
    each_of,
    is_any_of,
    is_rare,
    run_duration,
    run_events,
    run_outputs,
    runs,
    word,
)

_Event = TypeVar("_Event", "TimelineEvent", "EventLine")

# A run's record as a row of `runs`, and back.

_DERIVED: Final = (
    *("retry_advice", "output_count", "status", "created_at_known", "precedence", "details"),
    *("precedences", "source", "ended_via", "tracking", "next_check_at", "next_check_reason"),
    *("created_at", "error_code", "error_message", "tags"),
)
"""The columns whose value is not simply the attribute of that name; the first two are not read."""
_PLAIN: Final = {*runs.c.keys()} - {*_DERIVED}
_RUN: Final = [each.name for each in fields(RunState) if each.name in _PLAIN]
_RECORD: Final = [each.name for each in fields(Record) if each.name in _PLAIN]
RUN_COLUMNS: Final = tuple(runs.c[name] for name in (*_RUN, *_RECORD, *_DERIVED))
"""The columns of `runs`, in the order of `run_row`."""
_of_run: Final = attrgetter(*_RUN)
_of_record: Final = attrgetter(*_RECORD)
_END: Final = len(_RUN) + len(_RECORD) + 2
_precedence: Final = lru_cache(64)(Precedence)  # a third of the time of a call
_details: Final = lru_cache(64)(Details)
_STATUSES: Final = frozenset(map(str, RunStatus))
_REASONS: Final = {str(reason): reason for reason in PollReason}


# Of all runs together there are few different values.
@lru_cache(1024)
def _packed(precedences: Precedences) -> int:
    """The precedences in one number for one column: three bits for each field, in order."""
    return sum(each << 3 * position for position, each in enumerate(precedences))


@lru_cache(1024)
def _unpacked(packed: int) -> Precedences:
    return Precedences(
        *(packed >> 3 * position & 7 for position in range(len(Precedences._fields)))
    )


def run_row(record: Record) -> tuple[Any, ...]:
    """The record's row, without its outputs, in the order of `RUN_COLUMNS`."""
    run, error = record.run, record.run.error
    ended_via = record.ended_via
    return (
        *_of_run(run),
        *_of_record(record),
        run.retry_advice,
        0 if run.outputs is None else len(run.outputs),
        str(run.status),
        run.created_at is not None,
        int(run.precedence),
        int(run.details),
        _packed(run.precedences),
        str(record.source),
        None if ended_via is None else str(ended_via),
        record.tracking.value,
        *(record.next_poll or (None, None)),
        record.created_at,
        (error.code if error else "") or None,
        (error.message if error else "") or None,
        record.tags or None,
    )


def record_of(row: tuple[Any, ...], outputs: tuple[Output, ...] | None) -> Record:
    """The record of a row with all of `RUN_COLUMNS`, and its outputs (`None` for none)."""
    run: dict[str, Any] = dict(zip(_RUN, row, strict=False))
    record: dict[str, Any] = dict(zip(_RECORD, row[len(_RUN) :], strict=False))
    status, is_dated, precedence, details, packed, source, via = row[_END : _END + 7]
    tracking, due, why, created_at, code, message, tags = row[_END + 7 :]
    run["precedence"], run["details"] = _precedence(precedence), _details(details)
    run["unknown_status"] = None if status in _STATUSES else status
    run["created_at"] = created_at if is_dated else None
    run["error"] = RunError(code or "", message or "") if code or message else None
    run["outputs"], run["precedences"] = outputs, _unpacked(packed)
    if run["charged_cost"] is not None and run["precedences"].charged_cost < Precedence.FAILED:
        # A version before 0010 wrote it: what was shown before the end is a quote.
        run["quoted_cost"], run["charged_cost"] = run["charged_cost"], None
    record["run"], record["source"], record["tags"] = RunState(**run), known(Source, source), tags
    record["ended_via"] = None if via is None else known(Source, via)
    record["next_poll"] = None if due is None else NextPoll(due, _REASONS.get(why))
    record["lost"] = tracking == "lost"
    return Record(**record)


_OUTPUTS: Final = (
    select(*(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url")))
    .where(is_any_of(run_outputs.c.run_id, "run_ids"))
    .order_by(run_outputs.c.run_id, run_outputs.c.position)
)


def records(connection: Connection, rows: Sequence[Row[Any]]) -> list[Record]:
    """The records of these rows, in order; one more query if any of them has outputs.

    In one with a lock of the runs, outputs would be those at the time when it began to wait.
    """
    outputs: dict[str, list[Output]] = {}
    if having := [row.run_id for row in rows if row.output_count]:
        for run_id, *output in connection.execute(_OUTPUTS, {"run_ids": having}):
            outputs.setdefault(run_id, []).append(Output(*output))
    return [
        record_of(tuple(row), tuple(outputs[row.run_id]) if row.run_id in outputs else None)
        for row in rows
    ]


async def fetch_records(db: Database, query: Select[Any], values: Values = None) -> list[Record]:
    """The records of a query of `RUN_COLUMNS`, with their outputs in the same snapshot; `values`
    are of its parameters."""
    async with db.read() as connection:
        rows = (await connection.execute(query, values)).all()
        return await connection.run_sync(records, rows)


# Conditions on runs, and queries of them.

WorkspaceScope = Sequence[str | None] | None
"""The workspaces whose runs are meant: `None` for all, a `None` inside for unknown ones."""


def within(
    workspaces: WorkspaceScope, column: ColumnElement[Any] = runs.c.workspace_id
) -> ColumnElement[bool]:
    """The condition that `column` is one of these workspaces."""
    # An expression, so that the planner uses no index by workspace: there are few workspaces, many
    # runs, and few due ones.
    if workspaces is None:
        return true()
    return func.coalesce(column, "").in_([each or "" for each in workspaces])


# Most runs are completed and settled; the indexes by status and by tracking leave these out.


def has_status(status: Status) -> ColumnElement[bool]:
    """The run has this status, documented or not."""
    named = known(RunStatus, status)
    if isinstance(named, RunStatus):
        return is_rare(runs.c.status, named, RunStatus.COMPLETED)
    return and_(runs.c.status == named, runs.c.status != word(RunStatus.COMPLETED))


def is_tracked_as(tracking: Tracking) -> ColumnElement[bool]:
    """The run has this tracking state."""
    return is_rare(runs.c.tracking, tracking, Tracking.SETTLED)


NEWEST_FIRST: Final = (runs.c.created_at, runs.c.run_id)
"""The key of lists of runs."""

SECONDS_OF_A_DAY: Final = 86_400
DURATIONS_OVER: Final = 200
"""Last completed runs of a technique that its durations are taken from."""


class TimelineEvent(NamedTuple):
    """An event of a run's timeline. `detail` is the whole observation."""

    id: int
    run_id: str
    at: datetime
    source: Source | str
    status: Status
    progress: float | None
    detail: dict[str, Any]


_ONE_RUN: Final = select(*RUN_COLUMNS).where(runs.c.run_id == bindparam("id"))
_SOME_RUNS: Final = select(*RUN_COLUMNS).where(is_any_of(runs.c.run_id, "ids"))


async def get_run(db: Database, run_id: str) -> Record | None:
    """The run with its outputs, if known."""
    found = await fetch_records(db, _ONE_RUN, {"id": run_id})
    return found[0] if found else None


async def get_runs(db: Database, run_ids: Iterable[str]) -> dict[str, Record]:
    """The known runs with their outputs, by id."""
    found = await fetch_records(db, _SOME_RUNS, {"ids": [*run_ids]})
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
    by_tag = tag is not None and db.dialect == "sqlite"  # which is usually rarer than these
    for name, value in of.items():
        if value is not None:
            wanted.append((unindexed(runs.c[name]) if by_tag else runs.c[name]) == value)
    if tag is not None:
        wanted.append(is_tagged(db, tag))
    async with db.read() as connection:
        if status is not None and not isinstance(known(RunStatus, status), RunStatus):
            some = select(runs.c.run_id).where(has_status(status)).limit(1)
            if (await connection.execute(some)).first() is None:
                must = f"must be one of {', '.join(RunStatus)}, or another that a run has"
                message = f"no run has this status: it {must}"
                raise InvalidRequest(message, [FieldFault("status", must)])
        statement = select(*RUN_COLUMNS).where(*wanted)
        rows, following = await newest_first(
            connection, statement, NEWEST_FIRST, cursor=cursor, limit=limit
        )
        return await connection.run_sync(records, rows), following


def is_tagged(db: Database, tag: str) -> ColumnElement[bool]:
    """The run has this tag, `key=value`."""
    key, _, value = tag.partition("=")
    if db.dialect == "postgresql":
        return and_(runs.c.tags.is_not(None), cast(runs.c.tags, JSONB).contains({key: value}))
    return and_(runs.c.tags.is_not(None), runs.c.tags[key].as_string() == value)


async def events(db: Database, run_id: str) -> list[TimelineEvent]:
    """The run's timeline, oldest first."""
    statement = select(*(run_events.c[name] for name in TimelineEvent._fields))
    statement = statement.where(run_events.c.run_id == run_id).order_by(run_events.c.id)
    return [_known(TimelineEvent(*row)) for row in await db.fetch(statement)]


def _known(event: _Event) -> _Event:
    """The event with the words of this version, where it knows them."""
    return event._replace(source=known(Source, event.source), status=known(RunStatus, event.status))


async def durations_of(db: Database, technique_ids: Iterable[str]) -> dict[str, Durations]:
    """Seconds from creation to end of each technique's last completed runs that have both, with one
    statement."""
    ids = list(dict.fromkeys(technique_ids))
    if not ids:
        return {}
    found = await db.fetch(_durations(db.dialect), {"ids": ids})
    return {row[0]: Durations.of(map(float, row[1] or ())) for row in found}


@cache
def _durations(dialect: str) -> Select[Any]:
    """The query of `durations_of`, with the ids as a parameter."""
    wanted = each_of("ids", dialect)
    technique_id = type_coerce(wanted.c.value, CleanText)
    last = (
        select(run_duration(dialect).label("took"))
        .where(
            runs.c.technique_id == technique_id,
            runs.c.status == word("completed"),
            runs.c.created_at_known,
            runs.c.completed_at.is_not(None),
        )
        .order_by(runs.c.completed_at.desc())
        .limit(DURATIONS_OVER)
        .correlate(wanted)
        .subquery()
    )
    if dialect == "postgresql":
        took: Any = func.array_agg(extract("epoch", last.c.took))
    else:  # a day as a double has more digits than are right
        seconds = func.round(last.c.took * SECONDS_OF_A_DAY, 3)
        took = type_coerce(func.json_group_array(seconds), JSON)
    return select(technique_id, select(took).correlate(wanted).scalar_subquery())


# The timeline of all runs as numbered events, to follow changes.
#
# On PostgreSQL numbers are assigned before the commit, so a smaller one may appear after a greater
# one. Each page therefore carries the transaction snapshot that it was read in, from which
# `GapTracker` (tracker.polling.changes) derives which missing numbers may still appear.


class EventLine(NamedTuple):
    """One event: what one source showed of one run at one time, without the details."""

    id: int
    run_id: str
    at: datetime
    source: Source | str
    status: Status
    progress: float | None


class Snapshot(NamedTuple):
    """A PostgreSQL snapshot: transactions before `ended` have ended, those from `begun` on have not
    begun."""

    ended: int
    begun: int


class EventPage(NamedTuple):
    """Events by number. `snapshot` is `None` if numbers are committed in order (SQLite)."""

    lines: list[EventLine]
    snapshot: Snapshot | None


_COLUMNS: Final = tuple(run_events.c[name] for name in EventLine._fields)


async def events_after(
    db: Database, number: int, *, limit: int, upto: int | None = None
) -> EventPage:
    """The next events after `number`, at most `limit`, up to `upto` if given."""
    statement = (
        select(*_COLUMNS).where(run_events.c.id > number).order_by(run_events.c.id).limit(limit)
    )
    if upto is not None:
        statement = statement.where(run_events.c.id <= upto)
    ordered = db.dialect == "sqlite"
    if not ordered:
        statement = _with_snapshot(statement)
    rows = await db.fetch(statement)
    lines = [_known(EventLine(*row[: len(_COLUMNS)])) for row in rows]
    if ordered:
        return EventPage(lines, None)
    return EventPage(lines, Snapshot(*rows[0][-2:]) if rows else Snapshot(0, 0))


async def newest_event(db: Database) -> int:
    """The greatest number so far, else 0."""
    return await db.fetchval(select(func.max(run_events.c.id))) or 0


def _with_snapshot(statement: Select[Any]) -> Select[Any]:
    """The rows, with the snapshot that they are read in."""
    snapshot = func.pg_current_snapshot()
    for bound in (func.pg_snapshot_xmin(snapshot), func.pg_snapshot_xmax(snapshot)):
        # A scalar subquery is evaluated once; the cast is for drivers, which lack the type.
        number = select(cast(cast(bound, Text), BigInteger)).scalar_subquery()
        statement = statement.add_columns(number)
    return statement


async def last_sources(db: Database, run_ids: Iterable[str]) -> dict[str, Source | str]:
    """The source of the latest event of each run."""
    last = select(func.max(run_events.c.id)).where(is_any_of(run_events.c.run_id, [*run_ids]))
    statement = select(run_events.c.run_id, run_events.c.source).where(
        run_events.c.id.in_(last.group_by(run_events.c.run_id))
    )
    return {run_id: known(Source, source) for run_id, source in await db.fetch(statement)}
