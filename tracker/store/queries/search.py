"""Search runs by several filters and sort them, with bounded work.

The most selective filter with an index yields runs newest first. All others, and text, are applied
to a window of those runs; if the window ends before the page is full, the result says so, and the
next page continues there. Other orders sort the window; without filters they have an index.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Select, Subquery, and_, func, or_, select, true
from sqlalchemy.sql.util import ClauseAdapter

from tracker.core.record import Record
from tracker.core.run import Precedence, RetryAdvice, RunStatus, Tracking
from tracker.store.engine import Database
from tracker.store.queries import paging
from tracker.store.queries import runs as read
from tracker.store.queries.runs import RUN_COLUMNS, has_status, is_tracked_as, records
from tracker.store.queries.sheet_rows import has_value, run_ids_of
from tracker.store.schema import run_duration, runs, word

WINDOW: Final = 10_000
"""Runs that are searched for one page, and up to which results are counted."""

STATES: Final[Mapping[str, ColumnElement[bool]]] = {
    "open": is_tracked_as(Tracking.ACTIVE),
    "pending": has_status(RunStatus.PENDING),
    "running": has_status(RunStatus.RUNNING),
    "details": and_(
        is_tracked_as(Tracking.ACTIVE), runs.c.precedence >= Precedence.CALLBACK_FAILED
    ),
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

_ALL: Final = 10**9

_TEXTS: Final = (
    "run_id",
    "technique_name",
    "technique_id",
    "project_id",
    "error_code",
    "error_message",
    "last_error",
)


class Sort(StrEnum):
    """The order of results, always descending. By cost or duration only runs that have one are
    found."""

    NEWEST = "newest"
    COST = "cost"
    DURATION = "duration"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchFilters:
    """Filters; `None` matches all. `state` is one of `STATES`, `advice` a `RetryAdvice`.

    `since` and `until` bound the creation time. `text` matches ids, the technique's name, errors
    and the values of inputs, ignoring case, and runs by id that `among` names.
    """

    state: str | None = None
    advice: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    project_id: str | None = None
    batch_id: str | None = None
    tag: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    text: str | None = None
    among: tuple[str, ...] = ()
    sort: Sort = Sort.NEWEST


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRuns:
    """A page of runs. `searched_to` is how far back the search went, if the window ended before the
    page was full. The next page, if any, starts after `next_cursor`."""

    records: list[Record]
    next_cursor: str | None = None
    searched_to: datetime | None = None


class RunTotal(NamedTuple):
    """How many runs match; `more` if only the newest ones were counted, and sorted."""

    runs: int
    more: bool


async def search_runs(
    db: Database,
    wanted: SearchFilters,
    *,
    cursor: str | None = None,
    limit: int = 50,
    window: int = WINDOW,
) -> FoundRuns:
    """A page of matching runs, from at most `window` candidates. A text that is a run's id finds
    that run alone.

    Raises `InvalidRequest` for an invalid cursor.
    """
    if wanted.text and cursor is None:
        exact = await read.get_run(db, wanted.text)
        if exact is not None:
            return FoundRuns(records=[exact])
    search = _Search(db, wanted)
    inside, outside = search.conditions(cursor)
    async with db.read() as connection:
        rows = (await connection.execute(search.page(inside, outside, limit + 1, window))).all()
        page = await connection.run_sync(records, rows[:limit])
        last: Any = None
        keys = select(*search.key)
        if len(rows) > limit:
            last = await connection.execute(keys.where(runs.c.run_id == rows[limit - 1].run_id))
        elif outside and not search.is_sorted:
            window_end = keys.where(*inside).order_by(*search.descending)
            last = await connection.execute(window_end.offset(window - 1).limit(1))
        key = None if last is None else last.first()
    if key is None:
        return FoundRuns(records=page)
    return FoundRuns(
        records=page,
        next_cursor=paging.cursor_at(*key),
        searched_to=None if len(rows) > limit else key[0],
    )


async def count_runs(db: Database, wanted: SearchFilters, *, window: int = WINDOW) -> RunTotal:
    """How many runs match, among at most `window` candidates."""
    (found,) = await db.fetch(_Search(db, wanted).count(window + 1))
    if wanted.batch_id is not None:
        return RunTotal(found.matching, more=False)
    return RunTotal(min(found.matching, window), found.candidates > window)


class _Search:
    """The statements of a search.

    The leading filter yields the window of candidates, newest first. By cost or duration they are
    then sorted; without any filter, the index of that value yields the runs.
    """

    def __init__(self, db: Database, wanted: SearchFilters) -> None:
        self._wanted = wanted
        tagged = None if wanted.tag is None else read.is_tagged(db, wanted.tag)
        self._leading, self._others = _conditions(db, wanted, tagged)
        self._times = paging.between(runs.c.created_at, wanted.since)
        if wanted.until is not None:
            self._times.append(runs.c.created_at <= wanted.until)
        leads = db.dialect == "sqlite" and any(each is tagged for each in self._leading)
        self._scanned = tagged if leads else None
        """A leading tag that SQLite scans for: as far as a page needs, but not to count."""
        filtered = bool(self._leading or self._others or self._times)
        self.is_sorted = wanted.batch_id is not None or (
            filtered and wanted.sort is not Sort.NEWEST
        )
        """Whether candidates are sorted, so that a page needs all of them."""
        self._valued: list[ColumnElement[bool]] = []
        first: ColumnElement[Any] = runs.c.created_at
        if wanted.sort is Sort.COST:
            first, self._valued = runs.c.charged_cost, [runs.c.charged_cost.is_not(None)]
        elif wanted.sort is Sort.DURATION:
            first, self._valued = run_duration(db.dialect), [runs.c.completed_at.is_not(None)]
        self.key = (first, runs.c.run_id)
        self.descending = [each.desc() for each in self.key]

    def conditions(
        self, cursor: str | None
    ) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
        """The conditions on candidates, and those on the window of them."""
        after = [*self._valued, *paging.after(self.key, cursor)]
        if self.is_sorted:
            return [*self._leading, *self._times], [*self._others, *after]
        return [*self._leading, *self._times, *after], self._others

    def page(
        self,
        inside: list[ColumnElement[bool]],
        outside: list[ColumnElement[bool]],
        limit: int,
        window: int,
    ) -> Select[Any]:
        if not outside and not self.is_sorted:
            return select(*RUN_COLUMNS).where(*inside).order_by(*self.descending).limit(limit)
        searched = self._window(RUN_COLUMNS, inside, window)
        adapt = ClauseAdapter(searched).traverse
        matching = select(searched).where(*(adapt(each) for each in outside))
        return matching.order_by(*(adapt(each) for each in self.descending)).limit(limit)

    def count(self, limit: int) -> Select[int, int]:
        """How many of at most `limit` candidates match: `matching` and `candidates`."""
        inside, outside = self.conditions(None)
        if self._scanned is not None:
            inside = [each for each in inside if each is not self._scanned]
            outside = [*outside, self._scanned]
        searched = self._window(RUN_COLUMNS if outside else (runs.c.run_id,), inside, limit)
        adapt = ClauseAdapter(searched).traverse
        matching = func.count().filter(and_(true(), *(adapt(each) for each in outside)))
        counts = (matching.label("matching"), func.count().label("candidates"))
        return select(*counts).select_from(searched)

    def _window(
        self, columns: Sequence[Any], inside: list[ColumnElement[bool]], limit: int
    ) -> Subquery:
        """At most `limit` candidates; all of a batch, which its rows lead to, and not the time."""
        candidates = select(*columns).where(*inside)
        if self._wanted.batch_id is not None:
            # The limit keeps SQLite from applying other filters first, by a worse index.
            return candidates.limit(_ALL).subquery("searched")
        newest = [each.desc() for each in read.NEWEST_FIRST]
        order = newest if self.is_sorted else self.descending
        return candidates.order_by(*order).limit(limit).subquery("searched")


def _conditions(
    db: Database, wanted: SearchFilters, tagged: ColumnElement[bool] | None
) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]]]:
    """The leading condition, by index, if any; and the conditions for the window."""
    ranked: list[ColumnElement[bool]] = []  # the most selective first
    state = wanted.state or ""
    if wanted.batch_id is not None:
        ranked.append(runs.c.run_id.in_(run_ids_of([wanted.batch_id])))
    if state in _FEW:
        ranked.append(_FEW[state])
    if wanted.advice is not None:
        ranked.append(runs.c.retry_advice == word(RetryAdvice(wanted.advice).value))
    ranked += paging.matching(runs, technique_id=wanted.technique_id)
    if state == "failed":
        ranked.append(STATES[state])
    ranked += paging.matching(runs, project_id=wanted.project_id, workspace_id=wanted.workspace_id)
    if state == "completed":
        ranked.append(STATES[state])
    if tagged is not None:
        ranked.append(tagged)
    leading, others = ranked[:1], ranked[1:]
    if state in ("details", "other", "conflict"):  # which no index finds
        others.append(STATES[state])
    if wanted.text:
        others.append(_has_text(db, wanted.text, wanted.among))
    return leading, others


def _has_text(db: Database, text: str, among: Collection[str]) -> ColumnElement[bool]:
    """The text is in one of the run's own values or inputs, or the run is `among` others."""
    found = [runs.c[name].icontains(text, autoescape=True) for name in _TEXTS]
    found.append(has_value(db, runs.c.inputs, "$[*].value", text))
    if among:
        found.append(runs.c.run_id.in_(among))
    return or_(*found)
