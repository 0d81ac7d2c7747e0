"""Finding runs by several things at once, with work that is bounded however many runs there are.

One filter has an index that gives its runs newest first. Any further one, and any text, is looked
for among so many of those runs (the window); where that was not enough, the answer says how far
back it has looked, and the next page goes on from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, or_, select
from sqlalchemy.sql.util import ClauseAdapter

from tracker.core.record import Record
from tracker.core.retry import RetryAdvice
from tracker.core.run import RunStatus, Standing, Tracking
from tracker.store.engine import Database
from tracker.store.queries import cursors
from tracker.store.queries import runs as read
from tracker.store.queries.runs import has_status, is_tracked_as
from tracker.store.rows import read_records
from tracker.store.schema import runs, word

WINDOW: Final = 10_000
"""So many runs are looked through for one page."""

STATES: Final[Mapping[str, ColumnElement[bool]]] = {
    "open": is_tracked_as(Tracking.ACTIVE),
    "pending": has_status(RunStatus.PENDING),
    "running": has_status(RunStatus.RUNNING),
    "details": and_(is_tracked_as(Tracking.ACTIVE), runs.c.standing >= Standing.CALLBACK_FAILED),
    "completed": has_status(RunStatus.COMPLETED),
    "failed": has_status(RunStatus.FAILED),
    "other": runs.c.status.not_in([*RunStatus]),
    "lost": is_tracked_as(Tracking.LOST),
    "conflict": runs.c.conflict,
}
"""The states that a person asks for: open ones, ended ones whose details are not read yet, those
with a status that FLORA does not document, …"""

_FEW: Final[Mapping[str, ColumnElement[bool]]] = {
    "open": STATES["open"],
    "pending": STATES["pending"],
    "running": STATES["running"],
    "details": STATES["open"],
    "lost": STATES["lost"],
}
"""States of few runs, by what their index is entered with: the best one to begin with."""

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
    """What is looked for; what is `None` does not matter. `state` is one of `STATES`, `advice` a
    `RetryAdvice`.

    `since` and `until` are about the time of creation; `text` is looked for in ids, the technique's
    name and errors, whatever its case.
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
    """A page of runs, newest first. `searched_to` is set where the window ended before the page was
    full: how far back was looked. The next page, if there is one, goes on after `next_cursor`."""

    records: list[Record]
    next_cursor: str | None = None
    searched_to: datetime | None = None


async def search_runs(
    db: Database, wanted: Wanted, *, cursor: str | None = None, limit: int = 50
) -> Found:
    """A page of the runs that are wanted. A text that is a run's id finds that run, at once.

    Raises `InvalidRequest`, naming the field, for a cursor that was not given out here.
    """
    if wanted.text and cursor is None:
        exact = await read.get_run(db, wanted.text)
        if exact is not None:
            return Found(records=[exact])
    leading, others = _conditions(wanted)
    if wanted.tag is not None:
        (others if leading else leading).append(read.is_tagged(db, wanted.tag))
    through = _within_time(read.runs_newest_first(cursor).where(*leading), wanted)
    statement = through
    if others:
        window = through.limit(WINDOW).subquery("looked_through")
        adapt = ClauseAdapter(window).traverse
        matching = select(window).where(*(adapt(each) for each in others))
        statement = matching.order_by(window.c.created_at.desc(), window.c.run_id.desc())
    async with db.read() as connection:
        rows = (await connection.execute(statement.limit(limit + 1))).all()
        page = await read_records(connection, rows[:limit])
        last: Any = None
        if others and len(rows) <= limit:
            keys = through.with_only_columns(runs.c.created_at, runs.c.run_id)
            last = (await connection.execute(keys.offset(WINDOW - 1).limit(1))).first()
    if len(rows) > limit:
        return Found(records=page, next_cursor=_cursor(page[-1].created_at, page[-1].run.run_id))
    if last is None:
        return Found(records=page)
    return Found(
        records=page, next_cursor=_cursor(last.created_at, last.run_id), searched_to=last.created_at
    )


def _conditions(
    wanted: Wanted,
) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
    """The condition whose index is read, if any, and those that are looked for on the way."""
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
    if state == "completed":  # most are: the last one to begin with
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


def _cursor(at: datetime, last: str) -> str:
    return cursors.encode(at.isoformat(), last)
