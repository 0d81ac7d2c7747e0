"""Moves what waits when the clock is set.

A clock that was set back would delay everything, so all times are moved back by as much. One that
was set forward makes some reads come early, which is harmless. A machine that was paused looks the
same, and must delay nothing on others. So only what protects from acting too early is moved
forward: leases, by at most their length, and since when something fails, at most to now.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    DateTime,
    Interval,
    Update,
    and_,
    case,
    func,
    literal,
    or_,
    select,
    tuple_,
    type_coerce,
    update,
)

from tracker.store.queries.starts import LISTED, UNKNOWN, is_in
from tracker.store.schema import (
    LONGEST_LEASE,
    batches,
    endpoints,
    history_coverage,
    leases,
    messages,
    runs,
    starts,
    word,
)

CLOCKS: Final = "clock"
"""The beginning of the names of leases that say how clocks were set, and do not move."""
JUMP: Final = timedelta(seconds=2)
"""A clock that differs by more from one that only runs forward was set; below, they drift."""
HELD: Final = timedelta(seconds=30)
"""The longest lease of a run, a start or a batch."""
NAMED: Final = timedelta(minutes=1)
"""The longest lease with a name; one of ten minutes is renewed with every page."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Rows, and their times: when something is `due`, until when a `lease` lasts, and for how long
    at most, and `since` when something fails, which is given up after a while."""

    which: ColumnElement[bool]
    due: Sequence[Column[Any]] = ()
    lease: Mapping[Column[Any], timedelta] = field(default_factory=dict)
    since: Sequence[Column[Any]] = ()

    @property
    def columns(self) -> Sequence[Column[Any]]:
        return *self.due, *self.lease, *self.since


_TIMERS: Final = or_(
    *map(leases.c.name.startswith, ("wait:", "contact:", "recheck:", "generations:", "catalogue:"))
)
"""Rows of `leases` that say when something is due, or was last done."""

WAITS: Final = (
    Waits(
        runs.c.next_check_at.is_not(None),
        due=[runs.c.next_check_at],
        lease={runs.c.lease_until: HELD},
        since=[runs.c.missing_since],
    ),
    Waits(
        runs.c.recheck_at.is_not(None), due=[runs.c.recheck_at], lease={runs.c.lease_until: HELD}
    ),
    *(Waits(is_in(state), lease={starts.c.lease_until: HELD}) for state in LISTED),
    Waits(
        and_(batches.c.launch.is_not(None), batches.c.finished_at.is_(None)),
        due=[batches.c.launch_at],
        lease={batches.c.lease_until: HELD},
    ),
    Waits(
        messages.c.state == word("pending"),
        due=[messages.c.next_attempt_at],
        lease={messages.c.lease_until: LONGEST_LEASE - 2 * JUMP},
        since=[messages.c.tried_since],
    ),
    Waits(endpoints.c.failing_since.is_not(None), since=[endpoints.c.failing_since]),
    Waits(history_coverage.c.retry_at.is_not(None), due=[history_coverage.c.retry_at]),
    Waits(_TIMERS, due=[leases.c.until]),
    Waits(~or_(leases.c.name.startswith(CLOCKS), _TIMERS), lease={leases.c.until: NAMED}),
)
"""What waits until a time, or for as long since one."""


def moves(dialect: str, jump: timedelta, now: datetime) -> Iterator[Update]:
    """The statements that move what waits where the clock was set by `jump`, and is `now`."""
    for waits in WAITS:
        since = [one.is_not(None) for one in waits.since]
        if jump < timedelta(0):
            values = {one: _moved(dialect, one, jump) for one in waits.columns}
            ahead = [one > now for one in (*waits.due, *waits.lease)]
        else:
            latest = {one: now + longest for one, longest in waits.lease.items()}
            latest |= dict.fromkeys(waits.since, now)
            values = {one: _forward(dialect, one, jump, most) for one, most in latest.items()}
            ahead = [one > now - jump for one in waits.lease]
        if values:
            yield _move(dialect, and_(waits.which, or_(*since, *ahead)), values)
    if jump < timedelta(0):
        back = func.coalesce(starts.c.set_back, 0.0) - jump.total_seconds()
        for state in UNKNOWN:
            yield update(starts).where(is_in(state)).values(set_back=back)


def _move(
    dialect: str, which: ColumnElement[bool], values: dict[Column[Any], ColumnElement[Any]]
) -> Update:
    table = next(iter(values)).table
    if dialect == "postgresql":  # in one order, as other transactions lock them
        keys = tuple_(*table.primary_key.columns)
        rows = select(*table.primary_key.columns).where(which)
        which = keys.in_(rows.order_by(*table.primary_key.columns).with_for_update())
    return update(table).where(which).values(values)


def _forward(
    dialect: str, column: Column[Any], jump: timedelta, latest: datetime
) -> ColumnElement[Any]:
    """Moved by `jump`, at most to `latest`; one that is later stays."""
    moved, most = _moved(dialect, column, jump), literal(latest, column.type)
    return case((column >= most, column), (moved > most, most), else_=moved)


def _moved(dialect: str, column: Column[Any], jump: timedelta) -> ColumnElement[Any]:
    if dialect == "postgresql":
        return type_coerce(column, DateTime(timezone=True)) + literal(jump, Interval)
    by = f"{jump.total_seconds():+.3f} seconds"
    return func.strftime("%Y-%m-%d %H:%M:%f", column, by).concat("000")
