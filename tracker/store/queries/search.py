"""Search runs by several filters, with bounded work.

The most selective filter with an index yields runs newest first. All others, and text, are applied
to a window of those runs; if the window ends before the page is full, the result says how far back
it searched, and the next page continues there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, or_, select
from sqlalchemy.sql.util import ClauseAdapter

from tracker.core.record import Record
from tracker.core.retry import RetryAdvice
from tracker.core.run import Precedence, RunStatus, Tracking
from tracker.store.engine import Database
from tracker.store.queries import paging
from tracker.store.queries import runs as read
from tracker.store.queries.runs import has_status, is_tracked_as
from tracker.store.rows import RUN_COLUMNS, read_records
from tracker.store.schema import runs, word

WINDOW: Final = 10_000
"""Runs that are searched for one page."""

STATES: Final[Mapping[str, ColumnElement[bool]]] = {
    "open": is_tracked_as(Tracking.ACTIVE),
    "pending": has_status(RunStatus.PENDING),
    "running": has_status(RunStatus.RUNNING),
    "details": and_(is_tracked_as(Tracking.ACTIVE), runs.c.standing >= Precedence.CALLBACK_FAILED),
    "completed": has_status(RunStatus.COMPLETED),
    "failed": has_status(RunStatus.FAILED),
    "other": runs.c.status.not_in([*RunStatus]),
    "lost": is_tracked_as(Tracking.LOST),
    "conflict": runs.c.conflict,
}
"""Filters by state: `details` are ended runs whose details are not read yet, `other` those with an
undocumented status."""

_FEW: Final[Mapping[str, ColumnElement[bool]]] = {
    "open": STATES["open"],
    "pending": STATES["pending"],
    "running": STATES["running"],
    "details": STATES["open"],
    "lost": STATES["lost"],
}
"""Rare states and the condition of their index: the best leading filter."""

_TEXTS: Final = (
    "run_id",
    "technique_name",
    "technique_id",
    "project_id",
    "error_code",
    "error_message",
    "last_error",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Filters; `None` matches all. `state` is one of `STATES`, `advice` a `RetryAdvice`.

    `since` and `until` bound the creation time; `text` matches ids, the technique's name and
    errors, ignoring case.
    """

    state: str | None = None
    advice: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    tag: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A page of runs, newest first. `searched_to` is how far back the search went, if the window
    ended before the page was full. The next page, if any, starts after `next_cursor`."""

    records: list[Record]
    next_cursor: str | None = None
    searched_to: datetime | None = None


async def search_runs(
    db: Database,
    wanted: Wanted,
    *,
    cursor: str | None = None,
    limit: int = 50,
    window: int = WINDOW,
) -> Found:
    """A page of matching runs, from at most `window` candidates. A text that is a run's id finds
    that run alone.

    Raises `InvalidRequest` for an invalid cursor.
    """
    if wanted.text and cursor is None:
        exact = await read.get_run(db, wanted.text)
        if exact is not None:
            return Found(records=[exact])
    leading, others = _conditions(wanted)
    if wanted.tag is not None:
        (others if leading else leading).append(read.is_tagged(db, wanted.tag))
    through = _within_time(
        select(*RUN_COLUMNS)
        .where(*paging.after(read.NEWEST_FIRST, cursor), *leading)
        .order_by(*(each.desc() for each in read.NEWEST_FIRST)),
        wanted,
    )
    statement = through
    if others:
        searched = through.limit(window).subquery("searched")
        adapt = ClauseAdapter(searched).traverse
        matching = select(searched).where(*(adapt(each) for each in others))
        statement = matching.order_by(searched.c.created_at.desc(), searched.c.run_id.desc())
    async with db.read() as connection:
        rows = (await connection.execute(statement.limit(limit + 1))).all()
        page = await read_records(connection, rows[:limit])
        last: Any = None
        if others and len(rows) <= limit:
            keys = through.with_only_columns(runs.c.created_at, runs.c.run_id)
            last = (await connection.execute(keys.offset(window - 1).limit(1))).first()
    if len(rows) > limit:
        return Found(records=page, next_cursor=paging.at(page[-1].created_at, page[-1].run.run_id))
    if last is None:
        return Found(records=page)
    return Found(
        records=page,
        next_cursor=paging.at(last.created_at, last.run_id),
        searched_to=last.created_at,
    )


def _conditions(
    wanted: Wanted,
) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
    """The leading condition, by index, if any; and the conditions for the window."""
    leading: list[ColumnElement[bool]] = []
    others: list[ColumnElement[bool]] = []

    def add(condition: ColumnElement[bool]) -> None:
        (others if leading else leading).append(condition)

    state = wanted.state or ""
    if state in _FEW:
        add(_FEW[state])
    if wanted.advice is not None:
        add(runs.c.retry_advice == word(RetryAdvice(wanted.advice).value))
    if wanted.technique_id is not None:
        add(runs.c.technique_id == wanted.technique_id)
    if state == "failed":
        add(STATES[state])
    if wanted.project_id is not None:
        add(runs.c.project_id == wanted.project_id)
    if wanted.workspace_id is not None:
        add(runs.c.workspace_id == wanted.workspace_id)
    if state == "completed":  # the least selective
        add(STATES[state])
    if state in ("details", "other", "conflict"):
        others.append(STATES[state])
    if wanted.text:
        others.append(
            or_(*(runs.c[name].icontains(wanted.text, autoescape=True) for name in _TEXTS))
        )
    return leading, others


def _within_time(statement: Select[Any], wanted: Wanted) -> Select[Any]:
    if wanted.since is not None:
        statement = statement.where(runs.c.created_at >= wanted.since)
    if wanted.until is not None:
        statement = statement.where(runs.c.created_at <= wanted.until)
    return statement
