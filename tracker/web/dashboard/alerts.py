"""The state of each workspace, and what on the overview needs attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from tracker.core.formatting import counted, duration, number, percent
from tracker.flora.client import FloraClient
from tracker.flora.contact import OngoingTrouble, Trouble
from tracker.polling.workspaces import Workspace
from tracker.store.queries.attention import SweepHealth
from tracker.store.queries.overview import CallbackHealth
from tracker.store.queries.runs import Counts
from tracker.store.queries.spending import Usage

SWEPT_WITHIN: Final = timedelta(minutes=30)
"""An alert is shown where the last complete sweep of a workspace is older."""
MISS_RATE: Final = 0.1
"""The share of missing callbacks from which an alert is shown."""
MIN_CALLBACKS: Final = 10
"""Expected callbacks below which the share means nothing."""
BUDGET_SHARE: Final = 0.8
"""The used share of a budget from which an alert is shown."""
_TROUBLES: Final = {
    Trouble.UNREACHABLE: "FLORA is unreachable",
    Trouble.NOT_FLORA: "FLORA_BASE_URL does not lead to FLORA",
    Trouble.LISTS_REFUSED: "FLORA refuses to list runs",
    Trouble.OTHER_WORKSPACE: "The API key belongs to another workspace",
}


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that needs attention, what to do about it, and a link to it."""

    kind: Literal["bad", "warn"]
    title: str
    advice: str
    href: str = ""
    link: str = ""


class WorkspaceHealth:
    """The state of one workspace, by the requests of this process and by its sweeps.

    `key` is "none", "refused", "accepted" or "not used yet", `requests` the state of its request
    limit.
    """

    def __init__(self, workspace: Workspace, sweeps: dict[str | None, SweepHealth]) -> None:
        client = workspace.client
        self.name = workspace.name
        self.secret = bool(workspace.secrets)
        self.sweep = sweeps.get(workspace.workspace_id) or sweeps.get(workspace.name)
        self.key, self.requests = "none", "not used"
        self.refused_since: datetime | None = None
        self.refusal: str | None = None
        self.trouble: OngoingTrouble | None = None
        if client is not None:
            swept = self.sweep is not None and self.sweep.complete_at is not None
            self.key = "accepted" if swept or client.clock_offset is not None else "not used yet"
            self.requests = _requests(client)
            self.trouble = client.contact.found
            if client.breaker.open:
                self.key, self.refusal = "refused", client.breaker.reason
                self.refused_since = client.breaker.since

    @property
    def healthy(self) -> bool:
        """Whether nothing of it needs attention."""
        swept = self.sweep is None or self.sweep.last_error is None
        return (
            self.key in ("accepted", "not used yet") and not self.trouble and swept and self.secret
        )


def alerts(
    workspaces: list[WorkspaceHealth],
    counts: Counts,
    callbacks: CallbackHealth,
    *,
    unread: int,
    overdue: bool,
    unpriced: int,
    budgets: Sequence[Usage],
    callback_url: str | None,
    now: datetime,
) -> list[Alert]:
    """What needs attention, the worst first."""
    found: list[Alert] = []

    def warn(title: str, advice: str, href: str = "", link: str = "") -> None:
        found.append(Alert("warn", title, advice, href, link))

    for one in workspaces:
        if (alert := _workspace(one, now, alone=len(workspaces) == 1)) is not None:
            found.append(alert)
    if unread:
        warn(
            f"{counted(unread, 'gap')} in FLORA's history could not be read.",
            "The tracker tries again. Runs that others started in that time may be missing.",
            "/sweeps",
            "Show sweeps",
        )
    if overdue:
        title = f"Runs are overdue, the oldest {_since(counts.oldest_due_at, now)}."
        advice = "Is a worker running, and does FLORA answer it?"
        found.append(Alert("bad", title, advice, "/runs?state=open", "Show open runs"))
    if counts.quarantined:
        warn(
            f"{_are(counts.quarantined, 'callback')} quarantined.",
            "FLORA signed them, but they were not understood. Fix the cause, then replay them.",
            "/deliveries?outcome=quarantined",
            "Show callbacks",
        )
    if counts.unresolved_starts:
        warn(
            f"{_are(counts.unresolved_starts, 'start')} unresolved.",
            "FLORA may or may not have started a run, and nothing is sent again. Check at FLORA, "
            "then use the command tracker starts resolve.",
            "/starts?state=unresolved",
            "Show starts",
        )
    if unpriced:
        warn(
            f"FLORA never billed {counted(unpriced, 'run')}.",
            "Their cost is unknown, so totals of the last 7 days may be too low. Compare with "
            "FLORA's billing page.",
        )
    if counts.lost:
        warn(
            f"{_are(counts.lost, 'run')} lost.",
            "FLORA has answered for over an hour that they do not exist.",
            "/runs?state=lost",
            "Show lost runs",
        )
    rate = callbacks.miss_rate
    if rate is not None and rate >= MISS_RATE and callbacks.expected >= MIN_CALLBACKS:
        check = f"Can FLORA reach {callback_url}? " if callback_url else ""
        title = f"{percent(rate)} of the expected callbacks are missing."
        warn(title, f"{check}No results lost: polling found them.")
    for usage in budgets:
        if usage.share >= BUDGET_SHARE:
            title = f"{percent(usage.share)} of the budget {usage.budget.name} is used."
            advice = "Beyond it no run is started until it renews or is raised."
            warn(title, advice, "/spending", "Show spending")
    return sorted(found, key=lambda alert: alert.kind != "bad")


def _workspace(one: WorkspaceHealth, now: datetime, *, alone: bool) -> Alert | None:
    """The worst about one workspace."""
    of = "" if alone else f" of workspace {one.name}"
    if one.key == "none":
        advice = (
            "Callbacks are received, but results and costs cannot be fetched: set FLORA_API_KEY."
        )
        return Alert("warn", f"The FLORA API key{of} is not set.", advice)
    if one.key == "refused":
        title = f"FLORA refuses the API key{of} {_since(one.refused_since, now)}."
        return Alert("bad", title, "Nothing can be fetched until FLORA_API_KEY is corrected.")
    if one.trouble is not None:
        title = f"{_TROUBLES[one.trouble.trouble]}{of} {_since(one.trouble.since, now)}."
        advice = f"{one.trouble.reason}. No run is lost by this: {one.trouble.advice}."
        return Alert("bad", title, advice)
    if one.sweep is None:
        return None
    if one.sweep.last_error:
        title = f"The last history sweep{of} failed."
        return Alert("bad", title, one.sweep.last_error, "/sweeps", "Show sweeps")
    complete_at = one.sweep.complete_at
    if complete_at is not None and now - complete_at > SWEPT_WITHIN:
        title = f"No complete history sweep{of} for {duration(now - complete_at)}."
        return Alert("warn", title, "Is a worker running?", "/sweeps", "Show sweeps")
    return None


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


def _since(at: datetime | None, now: datetime) -> str:
    return f"for {duration(max(now - at, timedelta(0)))}" if at else "for some time"


def _are(count: int, what: str) -> str:
    return f"{counted(count, what)} {'is' if count == 1 else 'are'}"
