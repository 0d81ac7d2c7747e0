"""The clock that all processes on one database share: PostgreSQL's, on SQLite the machine's.

Leases, and the times at which runs are due, are written by one process and compared by another. If
each used the clock of its machine, two clocks that differ by more than a lease lasts would let both
processes take it. So PostgreSQL is asked for its time, and a clock that only runs forward carries
the answer on until it is asked again.

Either clock may be set. A clock that only runs forward shows by how much, and the database keeps
where both were, for each boot of a machine: so a process also notices what happened before it
started. The first that does moves what waits, in one transaction.

What is moved: a clock that was set back would delay everything, so all times are moved back by as
much. One that was set forward makes some reads come early, which is harmless. A machine that was
paused looks the same, and must delay nothing on others. So only what protects from acting too early
is moved forward: leases, by at most their length, and since when something fails, at most to now.
"""

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
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

from tracker.core.clock import Clock, boot_id, boot_seconds, utc_now
from tracker.core.errors import StoreUnavailable
from tracker.core.log import get_logger
from tracker.core.waiting import cancel, repeat, wait_for
from tracker.store.engine import Database
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

ASK_EVERY: Final = 10.0
"""Seconds between two comparisons of PostgreSQL's clock with one that only runs forward."""
SLOW: Final = 1.0
"""Seconds after which an answer is too imprecise."""
JUMP: Final = timedelta(seconds=2)
"""A clock that differs by more from one that only runs forward was set; below, they drift."""
DRIFT: Final = timedelta(seconds=0.5)
"""From how much on it is stored that they have drifted apart."""
LOGGED_FROM: Final = timedelta(seconds=5)
"""A machine's clock that is off by more is logged."""
MOVE_SECONDS: Final = 60.0
"""How long moving what waits may take: a large backlog is many rows."""
MOVE_AGAIN_AFTER: Final = (1.0, 30.0)
"""The first and the longest pause, in seconds, before a move that failed is tried again."""

_ASK: Final = select(func.clock_timestamp())
_JUMPS: Final = "clock"
"""The lease whose `holder` is by how many seconds the clock was set in all, `until` when last."""
_BOOT: Final = "clock:"
"""The beginning of the lease for each boot of a machine: `until` is the clock's time when its
`boot_seconds` were 0, less what it was set by in all."""
_NEVER: Final = datetime(1970, 1, 1, tzinfo=UTC)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _ClockPosition:
    """`start` is the clock's time when `boot_seconds` were 0, `total` the seconds that it was set
    by in all until then."""

    start: datetime
    total: float


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the processes have stored: by how many seconds the clock was set in all, when last
    (`None` before the first has stored it), and where it was last on this machine, if known."""

    total: float
    jumped_at: datetime | None
    position: _ClockPosition | None

    @classmethod
    def of(cls, rows: Mapping[str, Any], name: str) -> "_Stored":
        """From rows of `leases`, that of this machine's boot being `name`. Raises `ValueError` for
        the form of a newer version."""
        jumps, boot = rows.get(_JUMPS), rows.get(name)
        total = 0.0 if jumps is None else float(jumps.holder)
        if not math.isfinite(total):
            raise ValueError(total)
        start = boot and boot.until + timedelta(seconds=total)
        return cls(total, jumps and jumps.until, start and _ClockPosition(start, total))


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What the processes agree on: the position, what the clock was set by last, when, and how
    many rows were moved for that by this process."""

    position: _ClockPosition
    jumped_at: datetime
    jump: timedelta | None = None
    moved: int | None = None


class SharedClock:
    """A `Clock` that all processes on `db` share. `check` has to be called once before it is read.

    `wall` is used in place of the machine's clock, and of PostgreSQL's, with `seconds` to match.
    After the clock was set, it goes on as it was until what waits in the database was moved; if
    that fails, it is tried again.
    """

    def __init__(
        self,
        db: Database,
        *,
        wall: Clock | None = None,
        seconds: Callable[[], float] | None = None,
        every: float = ASK_EVERY,
    ) -> None:
        self._db = db
        self._every = every
        self._wall = wall
        if wall is None and db.dialect == "sqlite":
            self._wall = utc_now
        self.seconds: Callable[[], float] = seconds or boot_seconds
        """A clock that only runs forward, through a suspended machine too."""
        self.boot = boot_id() or uuid4().hex
        """What `seconds` counts from, the same in all processes that may compare theirs."""
        self.jumped_at = -math.inf
        """When the clock was last set, by `seconds`."""
        self.move_failed = False
        """Whether what waits could not be moved yet: leases may end too early or too late."""
        self._name = _BOOT + self.boot
        self._start: datetime | None = None  # by which the time is told
        self._at: _ClockPosition | None = None  # what was agreed on
        self._since = self.seconds()
        self._checking = asyncio.Lock()
        self._was_set = asyncio.Event()

    @property
    def is_servers(self) -> bool:
        """Whether it is PostgreSQL's."""
        return self._wall is None

    def __call__(self) -> datetime:
        """The present moment, aware, in UTC."""
        if self._wall is None:
            return self.at(self.seconds())
        before, now, after = self.seconds(), self._wall(), self.seconds()
        if self._start is None:
            return now
        if after - before > SLOW:
            return self.at(after)
        start = now - timedelta(seconds=after)
        if abs(start - self._start) > JUMP:
            self._was_set.set()
            return self.at(after)
        self._start = start
        return now

    def shown(self) -> datetime:
        """What its source shows, also before what waits was moved: what others sign is checked by
        this."""
        return self() if self._wall is None else self._wall()

    def at(self, seconds: float) -> datetime:
        """The time when `seconds` were so many, by the clock as it is set now."""
        if self._start is None:
            raise RuntimeError("the clock has not been compared with its source yet")
        return self._start + timedelta(seconds=seconds)

    async def check(self) -> StoreUnavailable | None:
        """Compare the clock with its source. If that was set, move what waits, unless another
        process has. If that fails, the clock goes on as it was, `check_after` tries again, and the
        error is returned. Raises `StoreUnavailable` if the source does not answer."""
        async with self._checking:
            start, rows = await self._read()
            if start is None:
                return None
            try:
                stored = _Stored.of(rows, self._name)
            except ValueError:  # its processes move what waits
                self._at, self._start = _ClockPosition(start, 0.0), start
                return None
            agreed = _compare(self._at, start, stored)
            if agreed is None:
                work = partial(_agree, self._db, self._name, self._at, start, self.seconds())
                try:
                    agreed = await self._db.write(work, seconds=MOVE_SECONDS)
                except StoreUnavailable as error:
                    self.move_failed = True
                    if self._start is None:
                        self._start = stored.position.start if stored.position else start
                    self._was_set.set()
                    return error
            self.move_failed = False
            self._at, self._start, seconds = agreed.position, start, self.seconds()
            age = (self.at(seconds) - agreed.jumped_at).total_seconds()
            if age >= -JUMP.total_seconds():  # else by an unknown clock
                self.jumped_at = max(self.jumped_at, seconds - max(age, 0.0))
            if agreed.jump is not None:
                self.jumped_at = seconds
                log.warning(
                    "clock.set", seconds=round(agreed.jump.total_seconds(), 1), moved=agreed.moved
                )
        return None

    async def settle(self) -> None:
        """Return when other processes have noticed whether PostgreSQL's clock was set before this
        one was started, at once where it is the machine's. Raises `StoreUnavailable`."""
        rest = self._since + 1.2 * self._every - self.seconds()
        if self.is_servers and rest > 0:
            await asyncio.sleep(rest)
            if error := await self.check():
                raise error

    async def _read(self) -> tuple[datetime | None, dict[str, Any]]:
        """The start that the source shows now, `None` if it took too long, and what is stored."""
        wanted = select(leases).where(leases.c.name.in_([_JUMPS, self._name]))
        async with self._db.read() as connection:
            rows = {row.name: row for row in await connection.execute(wanted)}
            before = self.seconds()
            shown = self._wall() if self._wall else (await connection.execute(_ASK)).scalar_one()
            after = self.seconds()
        now = shown.astimezone(UTC)
        if after - before > SLOW and self._start is not None:
            return None, rows
        # The answer was made at some time between the two.
        earliest, latest = now - timedelta(seconds=after), now - timedelta(seconds=before)
        if self._start is not None and earliest <= self._start <= latest:
            return self._start, rows
        return earliest + (latest - earliest) / 2, rows

    async def check_after(self, seconds: float) -> None:
        """Check in so many seconds, or at once where the clock was found to be set. Raises
        `StoreUnavailable`, also if what waits could not be moved."""
        await wait_for(self._was_set, seconds)
        self._was_set.clear()
        if error := await self.check():
            raise error


def _compare(at: _ClockPosition | None, start: datetime, stored: _Stored) -> _Agreed | None:
    """What is agreed on already; `None` if something is to be written."""
    known = at or stored.position
    kept = known if boot_id() is None else stored.position
    if stored.jumped_at is None or known is None or kept is None or known.total != kept.total:
        return None
    if abs(start - known.start) > JUMP or abs(start - kept.start) > DRIFT:
        return None
    return _Agreed(_ClockPosition(start, known.total), stored.jumped_at)


def _agree(
    db: Database,
    name: str,
    at: _ClockPosition | None,
    start: datetime,
    seconds: float,
    connection: Connection,
) -> _Agreed:
    """Store where the clock is. If it was set, and no other process has done so, move what waits.

    What others did is the difference between the total that is stored and the one known here.
    """
    first = db.insert(leases).values(name=_JUMPS, holder="0.0", until=_NEVER)
    connection.execute(first.on_conflict_do_nothing(index_elements=["name"]))
    locked = select(leases).where(leases.c.name.in_([_JUMPS, name])).order_by(leases.c.name)
    rows = {row.name: row for row in connection.execute(locked.with_for_update())}
    stored = _Stored.of(rows, name)
    known, total, jumped_at = at or stored.position, stored.total, rows[_JUMPS].until
    jump = moved = None
    if known is not None and abs(start - known.start) > JUMP:
        jump, moved = start - known.start, 0
        left = jump - timedelta(seconds=total - known.total)
        if abs(left) > JUMP:
            jumped_at = start + timedelta(seconds=seconds)
            statements = moves(db.dialect, left, jumped_at)
            moved = sum(connection.execute(one).rowcount for one in statements)
            total = round(total + left.total_seconds(), 6)
            jumps = update(leases).where(leases.c.name == _JUMPS)
            connection.execute(jumps.values(holder=repr(total), until=jumped_at))
    if boot_id() is not None:
        values = {"holder": socket.gethostname(), "until": start - timedelta(seconds=total)}
        connection.execute(db.upsert(leases, {"name": name}, values))
    return _Agreed(_ClockPosition(start, total), jumped_at, jump, moved)


@asynccontextmanager
async def shared_clock(
    db: Database,
    *,
    wall: Clock | None = None,
    seconds: Callable[[], float] | None = None,
    every: float = ASK_EVERY,
) -> AsyncIterator[SharedClock]:
    """The clock shared by all processes on `db`, for as long as the block lasts.

    `wall` and `seconds` are as in `SharedClock`. Raises `StoreUnavailable`.
    """
    clock = SharedClock(db, wall=wall, seconds=seconds, every=every)
    await clock.check()
    off = utc_now() - clock()
    if wall is None and abs(off) > LOGGED_FROM:
        log.warning("clock.off", seconds=round(off.total_seconds(), 1))
    keeping = asyncio.create_task(
        repeat("shared clock", partial(clock.check_after, every), pauses=MOVE_AGAIN_AFTER),
        name="shared-clock",
    )
    try:
        yield clock
    finally:
        await cancel(keeping)


# What waits, and the statements that move it.

HELD: Final = timedelta(seconds=30)
"""The longest lease of a run, a start or a batch."""
NAMED: Final = timedelta(minutes=1)
"""The longest lease with a name; one of ten minutes is renewed with every page."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Rows, and their times: when something is `due`, until when a `lease` lasts, and for how long
    at most, and `since` when something fails, which is given up after a while, or when it did."""

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
        since=[messages.c.tried_since, messages.c.last_attempt_at],
    ),
    Waits(endpoints.c.failing_since.is_not(None), since=[endpoints.c.failing_since]),
    Waits(
        endpoints.c.catch_up_from.is_not(None),
        since=[endpoints.c.catch_up_from, endpoints.c.catch_up_to],
    ),
    Waits(history_coverage.c.retry_at.is_not(None), due=[history_coverage.c.retry_at]),
    Waits(_TIMERS, due=[leases.c.until]),
    # Where the clocks are, which the two names above begin, does not move.
    Waits(~or_(leases.c.name.startswith(_JUMPS), _TIMERS), lease={leases.c.until: NAMED}),
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
