"""How the parts stand, and which of it needs somebody: judged from the figures, told in words."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from tracker.core.formatting import duration, number, percent
from tracker.flora.client import FloraClient
from tracker.flora.contact import Found, Trouble
from tracker.polling.workspaces import Workspace
from tracker.store.queries.attention import SweepHealth
from tracker.web.dashboard.figures import Figures

OVERDUE: Final = timedelta(seconds=60)
"""A run that is due for longer is nobody's: workers look at once."""
SWEPT_WITHIN: Final = timedelta(minutes=30)
"""A workspace whose last complete sweep is older is told of."""
MISSED: Final = 0.1
"""A callback miss rate from which somebody should look at the receiver's address."""
ENOUGH: Final = 10
"""So many callbacks have to be expected before their rate says anything."""


_PLAIN: Final = {
    Trouble.UNREACHABLE: "FLORA is unreachable",
    Trouble.NOT_FLORA: "What answers at FLORA_BASE_URL is not FLORA",
    Trouble.LISTS_REFUSED: "FLORA refuses its lists",
    Trouble.OTHER_WORKSPACE: "The key reads another workspace instead",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that needs somebody: what it is, what to do, and where to look."""

    kind: Literal["bad", "warn"]
    what: str
    advice: str
    href: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceHealth:
    """One workspace. `key` is "none", "refused", "accepted" or "not tried yet"."""

    name: str
    key: str
    refused_since: datetime | None
    breaker: str | None
    trouble: Found | None
    budget: str
    secret: bool
    sweep: SweepHealth | None

    @property
    def well(self) -> bool:
        """Whether nothing of it needs somebody."""
        swept = self.sweep is None or self.sweep.last_error is None
        key = self.key in ("accepted", "not tried yet") and self.trouble is None
        return key and swept and self.secret


def workspace_health(workspace: Workspace, figures: Figures) -> WorkspaceHealth:
    """How a workspace stands, by what this process has seen of it and by its sweeps."""
    client = workspace.client
    sweep = figures.sweeps.get(workspace.workspace_id) or figures.sweeps.get(workspace.name)
    return WorkspaceHealth(
        name=workspace.name,
        key=_key(client, sweep),
        refused_since=client.breaker.since if client else None,
        breaker=client.breaker.reason if client and client.breaker.open else None,
        trouble=client.contact.found if client else None,
        budget=_budget(client),
        secret=bool(workspace.secrets),
        sweep=sweep,
    )


def needs(
    figures: Figures, workspaces: list[WorkspaceHealth], *, now: datetime, callback_url: str | None
) -> list[Need]:
    """What needs somebody, the worst first."""
    found: list[Need] = []
    for one in workspaces:
        found += _of_workspace(one, now, alone=len(workspaces) == 1)
    if figures.unread:
        found.append(
            Need(
                kind="warn",
                what=f"{_of(len(figures.unread), 'gap')} left in FLORA's history.",
                advice="It could not be read, and is tried again. Runs that others started there "
                "may be missing.",
                href="/sweeps",
                link="Sweeps",
            )
        )
    counts = figures.counts
    if figures.overdue:
        found.append(
            Need(
                kind="bad",
                what=f"Runs are overdue, the oldest for {_since(counts.oldest_due_at, now)}.",
                advice="Is a worker running, and does FLORA answer it?",
                href="/runs?state=open",
                link="Open runs",
            )
        )
    if counts.quarantined:
        found.append(
            Need(
                kind="warn",
                what=f"{_of(counts.quarantined, 'callback')} in quarantine.",
                advice="Authentic, but not understood: read why, and replay what can be.",
                href="/deliveries?outcome=quarantined",
                link="Look at them",
            )
        )
    if counts.unresolved_starts:
        found.append(
            Need(
                kind="warn",
                what=f"{_of(counts.unresolved_starts, 'start')} unresolved.",
                advice="It is not known whether FLORA started a run; nothing is sent again. "
                "`tracker starts resolve` settles it.",
                href="/starts?state=unresolved",
                link="Show them",
            )
        )
    if unpriced := figures.unpriced:
        found.append(
            Need(
                kind="warn",
                what=f"FLORA never billed {number(unpriced)} {'run' if unpriced == 1 else 'runs'}.",
                advice="Their cost is not known, so totals of the last 7 days are at least what "
                "they say. Compare with FLORA's billing page.",
            )
        )
    if counts.lost:
        found.append(
            Need(
                kind="warn",
                what=f"{_of(counts.lost, 'run')} lost.",
                advice="FLORA has long answered that there is no such run.",
                href="/runs?state=lost",
                link="Look at them",
            )
        )
    rate = figures.callbacks.miss_rate
    if rate is not None and rate >= MISSED and figures.callbacks.expected >= ENOUGH:
        found.append(
            Need(
                kind="warn",
                what=f"{percent(rate)} of the expected callbacks are missing.",
                advice=f"Does FLORA reach {callback_url}? The ends were found all the same."
                if callback_url
                else "The ends were found all the same.",
            )
        )
    return sorted(found, key=lambda need: need.kind != "bad")


def verified_through(workspaces: list[WorkspaceHealth]) -> datetime | None:
    """Through which moment the history of every workspace is known to be here; `None` where that
    is not known of one."""
    through = [one.sweep.through if one.sweep else None for one in workspaces]
    known = [each for each in through if each is not None]
    return min(known) if known and len(known) == len(through) else None


def _of_workspace(one: WorkspaceHealth, now: datetime, *, alone: bool) -> list[Need]:
    whose = "" if alone else f" of workspace {one.name}"
    if one.key == "none":
        return [
            Need(
                kind="warn",
                what=f"No FLORA key{whose} is set.",
                advice="Callbacks are received, but outputs and cost cannot be read: set "
                "FLORA_API_KEY.",
            )
        ]
    if one.key == "refused":
        return [
            Need(
                kind="bad",
                what=f"FLORA refuses the key{whose}, since {_since(one.refused_since, now)}.",
                advice="Nothing can be read until FLORA_API_KEY is right again.",
            )
        ]
    if one.trouble is not None:
        return [
            Need(
                kind="bad",
                what=f"{_PLAIN[one.trouble.trouble]}{whose}, since "
                f"{_since(one.trouble.since, now)}.",
                advice=f"{one.trouble.reason}. No run is given up for that: {one.trouble.advice}.",
            )
        ]
    if one.sweep and one.sweep.last_error:
        return [
            Need(
                kind="bad",
                what=f"The last sweep{whose} failed.",
                advice=one.sweep.last_error,
                href="/sweeps",
                link="Sweeps",
            )
        ]
    swept = one.sweep.complete_at if one.sweep else None
    if swept is not None and now - swept > SWEPT_WITHIN:
        return [
            Need(
                kind="warn",
                what=f"No complete sweep{whose} for {duration(now - swept)}.",
                advice="Is a worker running?",
                href="/sweeps",
                link="Sweeps",
            )
        ]
    return []


def _key(client: FloraClient | None, sweep: SweepHealth | None) -> str:
    if client is None:
        return "none"
    if client.breaker.open:
        return "refused"
    taken = client.clock_offset is not None or (sweep is not None and sweep.complete_at is not None)
    return "accepted" if taken else "not tried yet"


def _budget(client: FloraClient | None) -> str:
    """What the request budget does at this moment."""
    if client is None:
        return "not used"
    state = client.budget.state()
    words = [f"{state.in_flight} of {state.concurrency} under way"]
    if state.waiting:
        words.append(f"{number(state.waiting)} waiting")
    if state.paused > 0:
        words.append(f"paused for {duration(state.paused)}")
    words.append("no limit met" if state.rate is None else f"{state.rate:.1f} requests a second")
    if state.limited:
        words.append(f"refused {_times(state.limited)}")
    return ", ".join(words)


def _since(at: datetime | None, now: datetime) -> str:
    return "some time" if at is None else duration(max(now - at, timedelta(0)))


def _of(count: int, what: str) -> str:
    return f"{number(count)} {what} is" if count == 1 else f"{number(count)} {what}s are"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{number(count)} times"
