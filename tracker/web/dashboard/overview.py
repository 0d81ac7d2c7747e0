"""The pages with figures: the overview at `/`, and `/spending`.

The overview shows whether FLORA answers, what needs attention, what runs now, and the figures of a
day; `/spending` how far each budget is used, and what was spent by day, technique and tag.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from tracker.core.record import Record
from tracker.core.rollup import EDGES
from tracker.core.run import RunStatus, Tracking
from tracker.store.queries import batches, overview
from tracker.store.queries import runs as read
from tracker.store.queries.overview import HourOfEnds, StateCount, TechniqueCost
from tracker.store.queries.spending import Spending, spending, tag_keys
from tracker.store.queries.techniques import technique_names
from tracker.views import OutputView
from tracker.web.dashboard import PageGroup, page, query_field
from tracker.web.dashboard.batch import split_of
from tracker.web.dashboard.health import (
    Alert,
    WorkspaceHealth,
    alerts,
    connection,
    workspace_health,
)

SPANS: Final = {"24h": ("24 hours", 24), "7d": ("7 days", 7 * 24)}
"""How far back chart and counters go, in hours."""
OUTCOMES: Final = (RunStatus.COMPLETED, RunStatus.FAILED)
"""The series of the chart. An end that only a newer FLORA knows is shown where there is one."""
TECHNIQUES: Final = 7
"""Techniques that are named in today's costs."""
OVERDUE: Final = 100
"""Overdue runs that are read, longest due first."""
REASONS: Final = 5
"""Reasons that are shown for them."""
_REQUEST_ID: Final = re.compile(r" \(req_[^)]*\)")
BATCHES: Final = 3
"""Unfinished batches that are shown, the newest ones."""
BATCHES_SINCE: Final = timedelta(days=7)
"""How old an unfinished batch may be; an older one was given up."""
RESULTS: Final = 8
RESULTS_OF_A_RUN: Final = 2
"""Newest outputs that are shown, in all and of one run."""
SPENDING_DAYS: Final = {"7d": 7, "30d": 30, "90d": 90}
"""How far back `/spending` goes, in days, today included."""
DEFAULT_DAYS: Final = "30d"
SPENDING_ROWS: Final = 12
"""Techniques, or values of a tag, in a table; the command and the API have all."""


class OverviewPages(PageGroup):
    """The overview, and the page of the spending."""

    @page("/")
    async def show(self, request: Request) -> Response:
        services, db, now = self._services, self._database, self._services.clock()
        period = query_field(request, "span")
        period = period if period in SPANS else "24h"
        period_name, hours = SPANS[period]
        workspaces = await workspace_health(services, now=now)
        callbacks = await overview.callback_health(db, now=now, hours=hours)
        costs = await overview.costs(db, now=now)
        overdue = await overview.overdue(db, now=now, limit=OVERDUE)
        ends = await overview.ends_by_hour(db, now=now, hours=hours)
        outcomes = _outcomes(ends)
        state_counts = await overview.states(db)
        open_batches = await batches.unfinished(db, since=now - BATCHES_SINCE, limit=BATCHES)
        counted_rows = await batches.batch_counts(db, [one.batch_id for one in open_batches])
        newest, _ = await read.list_runs(db, status=RunStatus.COMPLETED, limit=RESULTS)
        techniques = {one.technique_id for one in open_batches}
        techniques |= {one.run.technique_id for one in newest if one.run.technique_id}
        needed = [
            one
            async for one in alerts(services, workspaces, callbacks, overdue=bool(overdue), now=now)
        ]
        return self._render(
            request,
            "overview.html",
            connections=_connections(workspaces),
            alerts=sorted(needed, key=lambda one: one.kind != "bad"),  # what is bad first
            answered_at=min(
                (one.answered_at for one in workspaces if one.answered_at), default=None
            ),
            checked_through=_checked_through(workspaces),
            empty=not state_counts,
            states=_states(state_counts),
            batches=open_batches,
            batch_counts=counted_rows,
            splits={batch_id: split_of(found) for batch_id, found in counted_rows.items()},
            results=list(islice(self._results(newest), RESULTS)),
            names=await technique_names(db, sorted(techniques)),
            ends=ends,
            outcomes=outcomes,
            adopted=sum(hour.adopted for hour in ends),
            chart=_chart(
                3600,
                [hour.hour for hour in ends],
                {name: [hour.by_status.get(name, 0) for hour in ends] for name in outcomes},
            ),
            callbacks=callbacks,
            lag=await overview.lags(db, now=now, hours=hours),
            shortest_delay=EDGES[0] / 1000,
            cost=_sum(costs),
            costs=costs[:TECHNIQUES],
            other_costs=_sum(costs[TECHNIQUES:]),
            other_techniques=len(costs[TECHNIQUES:]),
            overdue=_by_reason(overdue)[:REASONS],
            has_key=self._has_key,
            period=period,
            period_name=period_name,
            periods=SPANS,
        )

    @page("/spending")
    async def show_spending(self, request: Request) -> Response:
        db, workspace = self._database, query_field(request, "workspace")
        period = query_field(request, "span", SPENDING_DAYS) or DEFAULT_DAYS
        today = self._services.clock().replace(hour=0, minute=0, second=0, microsecond=0)
        since = today - timedelta(days=SPENDING_DAYS[period] - 1)
        keys = await tag_keys(db, since=since)
        usages = await self._services.budgets.usages()
        key = query_field(request, "tag")
        if key not in keys:
            tags = {one.budget.tag[0] for one in usages if one.budget.tag}
            key = next((one for one in keys if one in tags), keys[0] if keys else None)
        by_day, total = await spending(db, "day", since=since, workspace_id=workspace)
        by_technique, _ = await spending(db, "technique", since=since, workspace_id=workspace)
        by_tag: list[Spending] = []
        if key is not None:
            by_tag, _ = await spending(db, f"tag:{key}", since=since, workspace_id=workspace)
        ids = {*self._workspace_ids, workspace}
        days = _each_day(by_day, since, SPENDING_DAYS[period])
        return self._render(
            request,
            "spending.html",
            usages=usages,
            total=total,
            days=days,
            chart=_chart(
                86400,
                [one for row in days if isinstance(one := row.of, datetime)],
                {
                    "charged": [float(row.charged) for row in days],
                    "quoted": [float(row.quoted) for row in days],
                },
                money=True,
            ),
            by_technique=_shown(by_technique),
            by_tag=_shown(by_tag),
            more_techniques=len(by_technique) - len(_shown(by_technique)),
            more_tags=len(by_tag) - len(_shown(by_tag)),
            key=key,
            keys={one: one for one in sorted(keys)},
            period=period,
            periods={value: f"Last {count} days" for value, count in SPENDING_DAYS.items()},
            workspace=workspace,
            workspaces={one: one for one in sorted(one for one in ids if one)},
        )

    def _results(self, records: list[Record]) -> Iterator[tuple[Record, OutputView]]:
        """The first outputs of each run, by the time that is shown with them."""
        records = sorted(records, key=lambda one: one.run.completed_at or one.created_at)
        for record in reversed(records):
            views = self._views(record.run.outputs)
            for view in views[:RESULTS_OF_A_RUN]:
                yield record, view


def _by_reason(records: list[Record]) -> list[tuple[str | None, list[Record]]]:
    """Runs that are not read for the same reason, without the ids of single requests in it."""
    found: dict[str | None, list[Record]] = {}
    for record in records:
        reason = record.last_error and _REQUEST_ID.sub("", record.last_error)
        found.setdefault(reason, []).append(record)
    return sorted(found.items(), key=lambda one: -len(one[1]))


def _connections(workspaces: list[WorkspaceHealth]) -> list[Alert]:
    """Whether FLORA answers: one line where it does in all workspaces, else one for each other."""
    found = [connection(one, alone=len(workspaces) == 1) for one in workspaces]
    return [one for one in found if one.kind != "good"] or [
        Alert(kind="good", title="FLORA answers")
    ]


def _states(counts: list[StateCount]) -> Counter[str]:
    """Runs that are not finished and read; "other" is a status that FLORA does not document."""
    found = Counter[str]()
    for each in counts:
        if each.status not in tuple(RunStatus):
            found["other"] += each.runs
        elif each.tracking == Tracking.ACTIVE:
            is_open = each.status in (RunStatus.PENDING, RunStatus.RUNNING)
            found[str(each.status) if is_open else "details"] += each.runs
    return found


def _outcomes(hours: list[HourOfEnds]) -> dict[str, int]:
    ends = sum((Counter(hour.by_status) for hour in hours), Counter[str]())
    return {status.value: 0 for status in OUTCOMES} | ends


def _sum(rows: list[TechniqueCost]) -> TechniqueCost | None:
    if not rows:
        return None
    summed = ("runs", "unpriced", "not_final", "cost", "quoted")
    return TechniqueCost(None, **{name: sum(getattr(row, name) for row in rows) for name in summed})


def _checked_through(workspaces: list[WorkspaceHealth]) -> datetime | None:
    """Up to when the history of every workspace was read; `None` where that is unknown of one."""
    through = [one.sweep.through if one.sweep else None for one in workspaces]
    known = [each for each in through if each is not None]
    return min(known) if known and len(known) == len(through) else None


def _shown(rows: list[Spending]) -> list[Spending]:
    """The highest rows, and what has neither technique nor value."""
    return [row for number, row in enumerate(rows) if number < SPENDING_ROWS or row.of is None]


def _each_day(rows: list[Spending], since: datetime, count: int) -> list[Spending]:
    """A row for every day, with zeros where nothing was spent."""
    found = {row.of: row for row in rows}
    days = [since + timedelta(days=number) for number in range(count)]
    return [found.get(day, Spending(of=day)) for day in days]


def _chart(
    step: int, times: Sequence[datetime], series: Mapping[str, Sequence[float]], **options: bool
) -> str:
    """The bars for the page's script, `step` seconds apart: columns of Unix seconds, and of the
    values of each series."""
    columns = [[int(at.timestamp()) for at in times], *series.values()]
    return json.dumps({"step": step, "series": [*series], "columns": columns, **options})
