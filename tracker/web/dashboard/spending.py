"""`/spending`: how far each budget is used, and what was spent by day, technique and tag."""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.core.budget import Period
from tracker.core.errors import FieldFault
from tracker.core.formatting import percent
from tracker.services import Services
from tracker.store.queries.spending import Spending, Usage, spending, tag_keys
from tracker.web.dashboard.forms import given
from tracker.web.dashboard.health import Need
from tracker.web.dashboard.render import Renderer
from tracker.web.http.errors import invalid

SPANS: Final[Mapping[str, int]] = {"7d": 7, "30d": 30, "90d": 90}
"""Days, today included."""
USUAL: Final = "30d"
ROWS: Final = 12
"""So many techniques, or values of a tag, are shown; the command and the API have all."""
DAY: Final = timedelta(days=1)
NEARLY: Final = 0.8
"""The share of a budget from which its use is pointed out."""


class SpendingPage:
    """The page."""

    def __init__(self, services: Services, render: Renderer) -> None:
        self._services = services
        self._render = render

    def routes(self) -> list[Route]:
        """Its route."""
        return [Route("/spending", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """Budgets, charts and tables."""
        db = self._services.database
        span = given(request, "span") or USUAL
        workspace = given(request, "workspace")
        if span not in SPANS:
            raise invalid(FieldFault("span", f"must be one of {', '.join(SPANS)}"))
        today, _ = Period.DAY.bounds(self._services.clock())
        if today is None:
            raise AssertionError("a day has a beginning")
        since = today - (SPANS[span] - 1) * DAY
        keys = await tag_keys(db, since=since)
        key = given(request, "tag")
        if key not in keys:
            key = keys[0] if keys else None
        by_day, total = await spending(db, "day", since=since, workspace_id=workspace)
        by_technique, _ = await spending(db, "technique", since=since, workspace_id=workspace)
        by_tag: list[Spending] = []
        if key is not None:
            by_tag, _ = await spending(db, f"tag:{key}", since=since, workspace_id=workspace)
        ids = [one.workspace_id for one in self._services.workspaces if one.workspace_id]
        days = _each_day(by_day, since, today)
        return self._render.page(
            request,
            "spending.html",
            usages=await self._services.budgets.usages(),
            total=total,
            days=days,
            chart=json.dumps(_chart(days)),
            by_technique=by_technique[:ROWS],
            by_tag=by_tag[:ROWS],
            more_techniques=len(by_technique) - ROWS,
            more_tags=len(by_tag) - ROWS,
            key=key,
            keys=keys,
            span=span,
            spans=SPANS,
            workspace=workspace,
            workspaces=sorted({*ids, *([workspace] if workspace else [])}),
        )


def nearly_used(usages: list[Usage]) -> list[Need]:
    """The budgets that may soon keep runs from being started."""
    return [
        Need(
            kind="warn",
            what=f"{percent(usage.share)} of the budget {usage.budget.name} are used.",
            advice="Beyond it nothing is started until it begins anew or is raised.",
            href="/spending",
            link="Spending",
        )
        for usage in usages
        if usage.share >= NEARLY
    ]


def _each_day(rows: list[Spending], since: datetime, today: datetime) -> list[Spending]:
    """Those of the days, each of which is there."""
    found = {row.of: row for row in rows}
    count = (today - since).days + 1
    days = [since + number * DAY for number in range(count)]
    return [found.get(day, Spending(of=day)) for day in days]


def _chart(days: list[Spending]) -> dict[str, Any]:
    """The bars, as the page's script takes them: columns of Unix seconds and of USD."""
    return {
        "step": 86400,
        "money": True,
        "series": [{"name": name, "colour": name} for name in ("charged", "quoted")],
        "columns": [
            [int(row.of.timestamp()) for row in days if isinstance(row.of, datetime)],
            [float(row.charged) for row in days],
            [float(row.quoted) for row in days],
        ],
    }
