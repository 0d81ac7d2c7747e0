"""The numbers of the overview, gathered from the store and put as the page shows them."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from tracker.core.record import Record
from tracker.core.rollup import Lag
from tracker.core.run import RunStatus, Tracking
from tracker.store.engine import Database
from tracker.store.queries import attention, overview
from tracker.store.queries import runs as read
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.attention import BILL_DAYS, SweepHealth
from tracker.store.queries.overview import CallbackHealth, HourOfEnds, StateCount, TechniqueCost
from tracker.store.queries.runs import Counts, DeliveryRow
from tracker.store.queries.sweeps import Unread

SOURCES: Final = ("callback", "poll", "history")
"""How ends become known; the answer to a start (`start`) is shown where it ever was."""
DEAREST: Final = 7
"""So many techniques are named in today's costs."""
OVERDUE: Final = 8
"""So many overdue runs are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """How many runs are in each state that a person asks for."""

    pending: int
    running: int
    details: int
    lost: int
    completed: int
    failed: int
    other: int
    """With a status that FLORA does not document."""

    @classmethod
    def of(cls, counts: list[StateCount]) -> "States":
        """From how many have which status and tracking."""

        def count(tracking: Tracking | None = None, *statuses: RunStatus) -> int:
            return sum(
                each.runs
                for each in counts
                if tracking in (None, each.tracking) and (not statuses or each.status in statuses)
            )

        return cls(
            pending=count(Tracking.ACTIVE, RunStatus.PENDING),
            running=count(Tracking.ACTIVE, RunStatus.RUNNING),
            details=count(Tracking.ACTIVE, RunStatus.COMPLETED, RunStatus.FAILED),
            lost=count(Tracking.LOST),
            completed=count(None, RunStatus.COMPLETED),
            failed=count(None, RunStatus.FAILED),
            other=count() - count(None, *RunStatus),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the runs that ended today cost: in all, the dearest techniques, and the rest of them.

    The bills of `not_final` may still come or change; `quoted` is what those without one were.
    """

    total: Decimal | None
    dearest: list[TechniqueCost]
    others: TechniqueCost | None
    other_techniques: int
    unpriced: int
    not_final: int
    quoted: Decimal

    @classmethod
    def of(cls, rows: list[TechniqueCost]) -> "Costs":
        """From each technique's, the dearest first."""
        rest = rows[DEAREST:]
        return cls(
            total=sum((row.cost for row in rows), Decimal(0)) if rows else None,
            dearest=rows[:DEAREST],
            others=TechniqueCost(
                None,
                runs=sum(row.runs for row in rest),
                not_final=sum(row.not_final for row in rest),
                cost=sum((row.cost for row in rest), Decimal(0)),
                quoted=sum((row.quoted for row in rest), Decimal(0)),
            )
            if rest
            else None,
            other_techniques=len(rest),
            unpriced=sum(row.unpriced for row in rows),
            not_final=sum(row.not_final for row in rows),
            quoted=sum((row.quoted for row in rows), Decimal(0)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All of them."""

    states: States
    hours: list[HourOfEnds]
    callbacks: CallbackHealth
    lag: Lag
    costs: Costs
    unpriced: int
    counts: Counts
    overdue: list[Record]
    sweeps: dict[str | None, SweepHealth]
    unread: list[Unread]
    last_delivery: DeliveryRow | None

    @property
    def empty(self) -> bool:
        """Whether nothing has ever been seen."""
        states = self.states
        return not (
            states.pending + states.running + states.details + states.lost
            or states.completed + states.failed + states.other
        )

    @property
    def by_source(self) -> list[tuple[str, int]]:
        """The ends of all shown hours, by how they became known."""
        counted = dict.fromkeys(SOURCES, 0)
        for hour in self.hours:
            for name, count in hour.by_source.items():
                counted[name] = counted.get(name, 0) + count
        return list(counted.items())

    @property
    def adopted(self) -> int:
        """Runs that had ended before the tracker heard of them."""
        return sum(hour.adopted for hour in self.hours)

    def chart(self) -> dict[str, Any]:
        """The bars, as the page's script takes them: columns of Unix seconds and of counts."""
        names = [name for name, _ in self.by_source]
        return {
            "step": 3600,
            "series": [{"name": name, "colour": name} for name in names],
            "columns": [
                [int(hour.hour.timestamp()) for hour in self.hours],
                *([hour.by_source.get(name, 0) for hour in self.hours] for name in names),
            ],
        }


async def gather(db: Database, *, now: datetime, hours: int) -> Figures:
    """Read them all; `hours` is how far back the chart and the rates go."""
    deliveries, _ = await read.list_deliveries(db, limit=1)
    return Figures(
        states=States.of(await overview.states(db)),
        hours=await overview.ends_by_hour(db, now=now, hours=hours),
        callbacks=await overview.callback_health(db, now=now, hours=hours),
        lag=(await overview.lags(db, now=now, hours=hours)).seen,
        costs=Costs.of(await overview.costs(db, now=now)),
        unpriced=sum(one.unpriced for one in await overview.costs(db, now=now, days=BILL_DAYS)),
        counts=await read.counts(db, now=now),
        overdue=await attention.overdue(db, now=now, limit=OVERDUE),
        sweeps={each.workspace_id: each for each in await attention.sweep_health(db)},
        unread=coverage.unread(await coverage.everything(db)),
        last_delivery=deliveries[0] if deliveries else None,
    )
