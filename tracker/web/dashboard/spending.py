"""`/spending`: how far each budget is used, and what was spent by day, technique and tag."""

import json
from datetime import datetime, timedelta
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from tracker.store.queries.spending import Spending, spending, tag_keys
from tracker.web.dashboard.forms import query_choice, query_field
from tracker.web.dashboard.render import PageGroup, page

PERIODS: Final = {"7d": 7, "30d": 30, "90d": 90}
"""Days, today included."""
DEFAULT_PERIOD: Final = "30d"
ROWS: Final = 12
"""Techniques, or values of a tag, in a table; the command and the API have all."""


class SpendingPage(PageGroup):
    """The page."""

    @page("/spending")
    async def show(self, request: Request) -> Response:
        db, workspace = self._database, query_field(request, "workspace")
        period = query_choice(request, "span", PERIODS) or DEFAULT_PERIOD
        today = self._services.clock().replace(hour=0, minute=0, second=0, microsecond=0)
        since = today - timedelta(days=PERIODS[period] - 1)
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
        days = _each_day(by_day, since, PERIODS[period])
        return self._render(
            request,
            "spending.html",
            usages=usages,
            total=total,
            days=days,
            chart=json.dumps(_chart(days)),
            by_technique=_shown(by_technique),
            by_tag=_shown(by_tag),
            more_techniques=len(by_technique) - len(_shown(by_technique)),
            more_tags=len(by_tag) - len(_shown(by_tag)),
            key=key,
            keys={one: one for one in sorted(keys)},
            period=period,
            periods={value: f"Last {count} days" for value, count in PERIODS.items()},
            workspace=workspace,
            workspaces={one: one for one in sorted(one for one in ids if one)},
        )


def _shown(rows: list[Spending]) -> list[Spending]:
    """The highest rows, and what has neither technique nor value."""
    return [row for number, row in enumerate(rows) if number < ROWS or row.of is None]


def _each_day(rows: list[Spending], since: datetime, count: int) -> list[Spending]:
    """A row for every day, with zeros where nothing was spent."""
    found = {row.of: row for row in rows}
    days = [since + timedelta(days=number) for number in range(count)]
    return [found.get(day, Spending(of=day)) for day in days]


def _chart(days: list[Spending]) -> dict[str, Any]:
    """The bars for the page's script: columns of Unix seconds and of USD."""
    return {
        "step": 86400,
        "money": True,
        "series": ["charged", "quoted"],
        "columns": [
            [int(row.of.timestamp()) for row in days if isinstance(row.of, datetime)],
            [float(row.charged) for row in days],
            [float(row.quoted) for row in days],
        ],
    }
