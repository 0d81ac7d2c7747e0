"""`/health`, and what of the tracker's state needs attention.

The page shows FLORA, callbacks, worker and database, what of FLORA's history has been read, and the
sweeps, newest first; the overview shows the alerts.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Final, Literal
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tracker.core.contact import ContactState, Trouble
from tracker.core.formatting import counted, duration, money, number, percent
from tracker.core.starts import Period
from tracker.flora.client import FloraClient
from tracker.services import Services
from tracker.store import migrate
from tracker.store.queries import endpoints, overview, sweeps
from tracker.store.queries.deliveries import list_deliveries
from tracker.store.queries.endpoints import Backlog, EndpointRow
from tracker.store.queries.overview import BILL_DAYS, CallbackHealth
from tracker.store.queries.spending import Usage
from tracker.store.queries.sweeps import Interval, SweepHealth, UnreadSpan
from tracker.web.dashboard import PAGE_SIZE, PageGroup, page, query_position
from tracker.web.dashboard.render import query
from tracker.workspaces import Workspace

BUDGET_SHARE: Final = 0.8
"""The used share of a budget from which an alert is shown."""
_TROUBLES: Final[dict[str, tuple[str, str]]] = {
    Trouble.UNREACHABLE: ("FLORA has not answered", "trackerfloraunreachable"),
    Trouble.NOT_FLORA: ("FLORA_BASE_URL has not led to FLORA", "trackerfloramisconfigured"),
    Trouble.LISTS_REFUSED: ("FLORA has refused to list runs", "trackerfloramisconfigured"),
    Trouble.OTHER_WORKSPACE: (
        "The API key has belonged to another workspace",
        "trackerfloramisconfigured",
    ),
    Trouble.KEY_REFUSED: ("FLORA has refused the API key", "trackerkeyrefused"),
}
"""What each is called, and its section in the runbook."""
_PERIODS: Final = {Period.DAY: "a day", Period.MONTH: "a month", Period.TOTAL: "in total"}
DATABASES: Final = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
MIN_SPAN: Final = timedelta(days=1)
MAX_SPAN: Final = timedelta(days=90)
"""How much time a bar shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageBar:
    """The history of one kind of runs from `since` to `until`: what was read, and what could not
    be."""

    workspace_id: str
    kind: str
    since: datetime
    until: datetime
    intervals: Sequence[Interval]
    unread: Sequence[UnreadSpan]

    def segments(self) -> Iterator[tuple[str, float, float]]:
        """What to draw: "read" or "unread", with place and width in thousandths."""
        for one in self.intervals:
            yield "read", *self._place(one.from_at, one.to_at)
        for gap in self.unread:
            yield "unread", *self._place(gap.from_at or self.since, gap.to_at)

    def _place(self, begin: datetime, end: datetime) -> tuple[float, float]:
        span = self.until - self.since
        first = max((begin - self.since) / span, 0.0)
        last = min(max((end - self.since) / span, first + 0.003), 1.0)  # wide enough to be visible
        return round(1000 * first, 1), round(1000 * max(last - first, 0.0), 1)


class HealthPages(PageGroup):
    """`/health`, and the address that it had."""

    @page("/sweeps")
    async def moved(self, request: Request) -> Response:
        """The address of earlier versions."""
        return RedirectResponse("/health", status_code=301)

    @page("/health")
    async def show(self, request: Request) -> Response:
        """The state of each part, with a page of sweeps, which are numbered."""
        services, db, now = self._services, self._database, self._services.clock()
        before = query_position(request, "before")
        rows = await sweeps.list_sweeps(db, limit=PAGE_SIZE + 1, before=before)
        page = rows[:PAGE_SIZE]
        began = monotonic()
        counts = await overview.counts(db, now=now)
        seconds = monotonic() - began
        workspaces = await workspace_health(services, now=now)
        deliveries, _ = await list_deliveries(db, limit=1)
        ends = await overview.ends_by_hour(db, now=now)
        return self._render(
            request,
            "health.html",
            connections=[(one, connection(one, alone=True)) for one in workspaces],
            counts=counts,
            overdue=bool(await overview.overdue(db, now=now, limit=1)),
            last_delivery=deliveries[0] if deliveries else None,
            callback_url=services.settings.callback_url,
            by_source=sum((Counter(hour.by_source) for hour in ends), Counter()),
            worker_seen_at=max(
                (one.sweep.last_started_at for one in workspaces if one.sweep), default=None
            ),
            database=DATABASES[db.dialect],
            revision=await migrate.revision(db),
            read_seconds=seconds,
            bars=_bars(await sweeps.everything(db), now),
            rows=page,
            has_key=self._has_key,
            older=query("/health", before=str(page[-1].id)) if len(rows) > PAGE_SIZE else None,
            newest="/health" if before else None,
        )


def _bars(coverage: sweeps.Coverage, now: datetime) -> list[CoverageBar]:
    unread = sweeps.unread(coverage)
    return [
        CoverageBar(
            workspace_id=key[0],
            kind=key[1],
            since=min(max(intervals[-1].from_at, now - MAX_SPAN), now - MIN_SPAN),
            until=max(now, intervals[0].to_at),
            intervals=intervals,
            unread=[one for one in unread if (one.workspace_id, one.run_type) == key],
        )
        for key, intervals in coverage.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """What holds (`since` when), what to do about it, a link to it, and the runbook's section."""

    kind: Literal["good", "info", "warn", "bad"] = "warn"
    title: str
    since: datetime | None = None
    advice: str = ""
    href: str = ""
    link: str = ""
    section: str = ""


class WorkspaceHealth:
    """The state of one workspace: its connection as all processes have seen it, its sweeps, and its
    request limit in this process.

    `key` is "not set", "refused", "accepted" or "not used yet".
    """

    def __init__(
        self,
        workspace: Workspace,
        state: ContactState | None,
        swept: dict[str | None, SweepHealth],
        *,
        now: datetime,
    ) -> None:
        self.name = workspace.name
        self.secret = bool(workspace.secrets)
        self.sweep = swept.get(workspace.workspace_id)
        self.state = state
        self.answered_at = state.answered_at if state is not None else None
        self.current = state is not None and state.is_current(now)
        self.trouble = state.trouble if state is not None and self.current else None
        self.key, self.requests = "not set", "not used"
        if workspace.client is not None:
            self.requests = _requests(workspace.client)
            self.key = "not used yet" if self.answered_at is None else "accepted"
            if self.trouble and self.trouble.trouble is Trouble.KEY_REFUSED:
                self.key = "refused"

    @property
    def healthy(self) -> bool:
        """Whether nothing of it needs attention."""
        swept = self.sweep is None or self.sweep.last_error is None
        return self.key != "not set" and self.current and not self.trouble and swept and self.secret


async def workspace_health(services: Services, *, now: datetime) -> list[WorkspaceHealth]:
    """The state of each workspace."""
    await services.contacts.read()
    swept = {one.workspace_id: one for one in await sweeps.sweep_health(services.database)}
    return [
        WorkspaceHealth(one, services.contacts.of(one), swept, now=now)
        for one in services.workspaces
    ]


def connection(one: WorkspaceHealth, *, alone: bool) -> Alert:
    """Whether FLORA answers in a workspace, which is named unless it is `alone`."""
    of = "" if alone else f" (workspace {one.name})"
    if one.key == "not set":
        return Alert(
            title=f"No FLORA API key is set{of}",
            advice="Callbacks are received; results and costs need FLORA_API_KEY.",
        )
    if one.state is None:
        return Alert(
            kind="info", title=f"FLORA has not been asked yet{of}", advice="Is a worker running?"
        )
    if not one.current:
        return Alert(
            kind="info",
            title=f"FLORA has not been asked{of}",
            since=one.state.asked_at,
            advice="Is a worker running? Whether FLORA answers is not known.",
            section="trackerworkerabsent",
        )
    if one.trouble is None and one.answered_at is None:
        return Alert(kind="info", title=f"FLORA has not answered yet{of}")
    if one.trouble is None:
        return Alert(kind="good", title=f"FLORA answers{of}")
    what = one.trouble.trouble
    title, section = _TROUBLES.get(what, (f"FLORA cannot be read ({what})", ""))
    return Alert(
        kind="bad",
        title=f"{title}{of}",
        since=one.trouble.since,
        advice=f"{one.trouble.reason.rstrip('.')}. No run is lost by this: {one.trouble.advice}.",
        section=section,
    )


async def alerts(
    services: Services,
    workspaces: Sequence[WorkspaceHealth],
    callbacks: CallbackHealth,
    *,
    overdue: bool,
    now: datetime,
) -> AsyncIterator[Alert]:
    """What else needs attention. `overdue` is whether a run is."""
    db = services.database
    counts = await overview.counts(db, now=now)
    unread = sum(
        services.workspaces.of(one.workspace_id) is not None
        for one in sweeps.unread(await sweeps.everything(db))
    )
    billed = await overview.costs(db, now=now, days=BILL_DAYS)
    unpriced = sum(one.unpriced for one in billed)
    interval = timedelta(seconds=services.sweep_seconds())
    for one in workspaces:
        of = "" if len(workspaces) == 1 else f" of workspace {one.name}"
        for alert in _sweeps(one, now, of=of, interval=interval):
            yield alert
    if unread:
        yield Alert(
            title=f"{counted(unread, 'gap')} in FLORA's history could not be read",
            advice="The tracker tries again. Runs that others started in that time may be missing.",
            href="/health",
            link="Show coverage",
            section="trackerhistorygap",
        )
    if overdue:
        silent = any(one.trouble and one.trouble.silent for one in workspaces)
        yield Alert(
            kind="bad",
            title="Runs are overdue",
            advice="They wait for FLORA to answer and are retried; none is lost."
            if silent
            else "Is a worker running, and does FLORA answer it?",
            href="/runs?state=open",
            link="Show open runs",
            section="trackerrunsoverdue",
        )
    if overview.is_inbox_behind(counts.oldest_waiting_at, now):
        yield Alert(
            title=f"{_are(counts.waiting, 'callback')} not applied yet",
            advice="They are stored, and none is lost. Is `tracker serve` or a worker of this "
            "version running?",
            href="/deliveries?outcome=waiting",
            link="Show callbacks",
            section="trackerinboxbehind",
        )
    if counts.quarantined:
        yield Alert(
            title=f"{_are(counts.quarantined, 'callback')} quarantined",
            advice="FLORA signed them, but they were not understood. Fix the cause, then replay "
            "them.",
            href="/deliveries?outcome=quarantined",
            link="Show callbacks",
            section="trackerquarantine",
        )
    if counts.unresolved_starts:
        yield Alert(
            title=f"{_are(counts.unresolved_starts, 'start')} unresolved",
            advice="FLORA may or may not have started a run, and nothing is sent again. Check "
            "at FLORA, then use the command tracker starts resolve.",
            href="/starts?state=unresolved",
            link="Show starts",
            section="trackerstartsunresolved",
        )
    if unpriced:
        yield Alert(
            title=f"FLORA never billed {counted(unpriced, 'run')}",
            advice="Their cost is unknown, so totals of the last 7 days may be too low. "
            "Compare with FLORA's billing page.",
            section="trackerrunsunpriced",
        )
    if counts.lost:
        yield Alert(
            title=f"{_are(counts.lost, 'run')} lost",
            advice="FLORA answers that they do not exist, and is asked again once a day. Were they "
            "removed there, or has the key or its workspace changed?",
            href="/runs?state=lost",
            link="Show lost runs",
        )
    if callbacks.miss_rate is not None and callbacks.misses_too_many:
        check = f"Can FLORA reach {url}? " if (url := services.settings.callback_url) else ""
        yield Alert(
            title=f"{percent(callbacks.miss_rate)} of the expected callbacks are missing",
            advice=f"{check}No results lost: polling found them.",
            section="trackercallbacksmissed",
        )
    backlogs = await endpoints.backlogs(db)
    for endpoint in await endpoints.list_endpoints(db):
        for alert in _endpoint(endpoint, backlogs.get(endpoint.endpoint_id, Backlog()), now):
            yield alert
    for usage in await services.budgets.usages():
        if usage.share >= BUDGET_SHARE:
            yield _budget(usage)


def _sweeps(
    one: WorkspaceHealth, now: datetime, *, of: str, interval: timedelta
) -> Iterator[Alert]:
    """What is wrong with the sweeps of a workspace in which FLORA answers."""
    if one.trouble is not None or one.sweep is None:
        return
    complete_at = one.sweep.complete_at
    if one.sweep.last_error:
        yield Alert(
            kind="bad",
            title=f"The last history sweep{of} failed",
            advice=one.sweep.last_error,
            href="/health",
            link="Show sweeps",
            section="trackersweepfailing",
        )
    elif complete_at is not None and sweeps.is_sweep_late(complete_at, now, interval=interval):
        yield Alert(
            title=f"No history sweep{of} has been complete",
            since=complete_at,
            advice="Is a worker running?",
            href="/health",
            link="Show sweeps",
            section="trackersweeplate",
        )


def _endpoint(endpoint: EndpointRow, backlog: Backlog, now: datetime) -> Iterator[Alert]:
    """What is wrong with an endpoint: it is disabled, or its messages wait for long."""
    name, health = endpoint.endpoint_id, endpoint.health(now)
    if health == "disabled":
        yield Alert(
            kind="bad",
            title=f"Nothing is sent to the endpoint {name}",
            since=endpoint.disabled_at,
            advice=f"It is disabled: {endpoint.disabled_reason}. Its messages wait.",
            href="/endpoints",
            link="Show webhooks",
            section="trackerendpointdisabled",
        )
    elif health != "not configured" and backlog.is_late(now):
        error = f" Last error: {endpoint.last_error}." if health == "failing" else ""
        yield Alert(
            title=f"Messages to the endpoint {name} have waited",
            since=backlog.oldest_at,
            advice=f"Each is tried again for three days.{error}",
            href=f"/endpoints/{quote(name, safe='')}",
            link="Show endpoint",
            section="trackermessageslate",
        )


def _requests(client: FloraClient) -> str:
    state = client.request_limit.state()
    parts = [f"{state.in_flight} of {state.concurrency} slots busy"]
    if state.waiting:
        parts.append(f"{number(state.waiting)} queued")
    if state.paused > 0:
        parts.append(f"paused for {duration(state.paused)}")
    if state.rate is not None:
        parts.append(f"{state.rate:.1f} requests a second")
    if state.limited:
        parts.append(f"rate-limited {counted(state.limited, 'time')}")
    return ", ".join(parts)


def _budget(usage: Usage) -> Alert:
    """How much of a budget is used, and which one it is."""
    budget = usage.budget
    words = {"workspace_id": "workspace", "technique_id": "technique", "tag": "tag"}
    covers = ", ".join(f"{words[name]} {value}" for name, value in budget.scope.items())
    limit = f"{money(budget.usd)} {_PERIODS[budget.period]} for {covers or 'all runs'}"
    amount = f"{money(usage.used)} of {limit}"
    if usage.share < 1:
        title = f"{percent(usage.share)} of a budget is used: {amount}"
        effect, section = "Beyond it no run is started", "trackerbudgetnearlyused"
    else:
        title, section = f"A budget is used up: {amount}", "trackerbudgetused"
        effect = "No run that it covers is started"
    return Alert(
        title=title,
        advice=f"{effect} until it renews or is raised.",
        href="/spending",
        link="Show spending",
        section=section,
    )


def _are(count: int, what: str) -> str:
    return f"{counted(count, what)} {'is' if count == 1 else 'are'}"
