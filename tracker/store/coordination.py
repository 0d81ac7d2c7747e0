"""How the processes on one database share their work: claims on due runs, leases, and signals.

Claims and leases expire, so that the work of a crashed process is taken up again. Of a run, nothing
but its claim and its times is written here.

Signals report changes within the process and to other processes. Within a process the writer
reports them after each commit. On PostgreSQL a write batch also notifies, as part of its
transaction, and every process listens on a connection of its own. A signal is a hint: it may come
twice or, while that connection is down, not at all, so every wait has a time-out.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import uuid4

import orjson
from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Update,
    and_,
    delete,
    func,
    not_,
    or_,
    select,
    update,
)

from tracker.core.log import get_logger
from tracker.core.record import LOST_READ_EVERY, Record
from tracker.core.run import Precedence, Tracking
from tracker.core.schedule import Policy, PollReason
from tracker.core.waiting import cancel, to_its_end, wait_for
from tracker.store.engine import Database
from tracker.store.postgres import connect_postgres
from tracker.store.queries.runs import RUN_COLUMNS, WorkspaceScope, records, within
from tracker.store.schema import is_free, leases, runs, word

if TYPE_CHECKING:
    from tracker.store.writing.writer import WriteOutcome

_APART: Final = timedelta(seconds=5)
"""How much the clocks of processes on one database may differ."""
LEASE_SECONDS: Final = 1.0
"""How long a caller that is cancelled waits until what it writes about a lease is committed."""

log = get_logger(__name__)


# Claims on due runs.

_CLAIMED: Final = (runs.c.next_check_at.is_not(None), runs.c.recheck_at.is_not(None))
"""Runs that can be claimed, each by its index."""
_ENDED: Final = runs.c.precedence >= Precedence.CALLBACK_FAILED


class Due(Enum):
    """Which due runs are claimed."""

    POLLS = "polls"
    """Runs to be polled, longest due first."""
    ENDS = "ends"
    """Those of them that have ended and lack their details."""
    NEWEST_ENDS = "newest_ends"
    """The same, those that became due last first."""
    BILLS = "bills"
    """Settled runs whose cost or outputs are read again, longest due first."""


async def claim_due(
    db: Database,
    *,
    holder: str,
    now: datetime,
    lease: timedelta,
    limit: int,
    workspaces: WorkspaceScope = None,
    which: Due = Due.POLLS,
) -> list[Record]:
    """Claim up to `limit` due runs for `holder` until `now + lease`.

    Concurrent callers get different runs and do not wait for each other. An observation that names
    the claim releases it.
    """
    due = due_runs(now, workspaces, which).limit(limit)
    statement = (
        update(runs)
        .where(runs.c.run_id.in_(due.with_for_update(skip_locked=True)))
        .values(lease_until=now + lease, lease_holder=holder)
        .returning(*RUN_COLUMNS)
    )

    claimed = await db.write(
        lambda connection: records(connection, connection.execute(statement).all())
    )
    return sorted(
        claimed,
        key=lambda record: (record.next_check_at or record.recheck_at or now, record.run.run_id),
        reverse=which is Due.NEWEST_ENDS,
    )


async def renew(db: Database, holder: str, run_ids: Sequence[str], until: datetime) -> int:
    """Extend the claims of `holder` on these runs until then; returns how many."""
    mine = _in_order(db, runs.c.run_id.in_(run_ids), runs.c.lease_holder == holder)
    return await db.execute(update(runs).where(mine).values(lease_until=until))


async def release(db: Database, holder: str, run_ids: Sequence[str] | None = None) -> int:
    """Release the claims of `holder`, on all runs or on `run_ids`; returns how many.

    Other processes, to which a claimed run is due when its claim ends, are notified.
    """
    which = _CLAIMED if run_ids is None else [runs.c.run_id.in_(run_ids)]
    held = [_in_order(db, among, runs.c.lease_holder == holder) for among in which]
    free = update(runs).values(lease_until=None, lease_holder=None)
    statements = [free.where(mine) for mine in held]

    def work(connection: Connection) -> int:
        released = _count_updated(connection, *statements)
        if released and db.dialect == "postgresql":
            connection.execute(select(func.pg_notify(DUE, db.origin)))
        return released

    return await db.write(work)


def _count_updated(connection: Connection, *statements: Update) -> int:
    return sum(connection.execute(each).rowcount for each in statements)


def _in_order(db: Database, *among: ColumnElement[bool]) -> ColumnElement[bool]:
    """These runs, locked in the order of the writers."""
    rows = select(runs.c.run_id).where(*among)
    if db.dialect == "postgresql":
        rows = rows.order_by(runs.c.run_id).with_for_update()
    return runs.c.run_id.in_(rows)


async def next_due_at(
    db: Database, workspaces: WorkspaceScope = None, *, now: datetime
) -> datetime | None:
    """When the next run can be claimed, in the past if one is due; `None` if there is none.

    A claimed run counts from the end of its claim.
    """
    first = (
        select(runs.c.next_check_at)
        .where(runs.c.next_check_at.is_not(None), is_free(runs, now), within(workspaces))
        .order_by(runs.c.next_check_at)
        .limit(1)
    )
    # Claimed runs were due, so they are at the front of the index.
    freed = select(func.min(runs.c.lease_until)).where(
        runs.c.next_check_at <= now, not_(is_free(runs, now)), within(workspaces)
    )
    async with db.read() as connection:
        found = [await connection.scalar(each) for each in (first, freed)]
    return min((at for at in found if at is not None), default=None)


async def recheck_is_due(db: Database, workspaces: WorkspaceScope = None, *, now: datetime) -> bool:
    """Whether the cost or the outputs of any settled run are due to be read again."""
    first = due_runs(now, workspaces, Due.BILLS).limit(1)
    return await db.fetchrow(first) is not None


def due_runs(now: datetime, workspaces: WorkspaceScope, which: Due) -> Select[Any]:
    """The ids of the runs that can be claimed, in the order in which `claim_due` takes them."""
    due = runs.c.recheck_at if which is Due.BILLS else runs.c.next_check_at
    statement = (
        select(runs.c.run_id)
        .where(due <= now, is_free(runs, now), within(workspaces))
        .order_by(due.desc() if which is Due.NEWEST_ENDS else due)
    )
    return statement.where(_ENDED) if which in (Due.ENDS, Due.NEWEST_ENDS) else statement


async def reset_far_schedules(db: Database, policy: Policy, now: datetime) -> int:
    """Make runs due that are scheduled later than any wait allows, as where the machine was started
    with its clock set back (while it runs, `SharedClock` moves what waits); returns how many.

    Waits for bills are longer than a clock is usually set back. So a bill is due too if it was last
    read in what is the future now. What was read then counts as the latest until that time has
    come: the timeline says the same of the run.
    """
    due = runs.c.next_check_at
    lost = runs.c.tracking == word(Tracking.LOST)
    far = and_(due > now + policy.longest_wait, or_(not_(lost), due > now + LOST_READ_EVERY))
    read_at = runs.c.cost_read_at, runs.c.outputs_read_at
    by_old_clock = (and_(at > now + _APART, runs.c.recheck_at > at) for at in read_at)
    bill_due = or_(runs.c.recheck_at > now + policy.cost_give_up, *by_old_clock)
    statements = (
        update(runs)
        .where(_in_order(db, far))
        .values(next_check_at=now, next_check_reason=PollReason.CLOCK_SET),
        update(runs).where(_in_order(db, runs.c.recheck_at > now, bill_due)).values(recheck_at=now),
    )
    return await db.write(lambda connection: _count_updated(connection, *statements))


MAX_LISTED: Final = 10_000
"""The most runs that `list_positions` reads."""


async def list_positions(
    db: Database, run_ids: Collection[str], workspaces: WorkspaceScope, *, among: int
) -> Mapping[str, int]:
    """The positions of runs in FLORA's list of technique runs, newest first, counted from 1.

    FLORA's pages are read one after the other, so the position is how many items have to be read.
    Runs that are not `among` the newest of all workspaces are left out.
    """
    newest = (
        select(*(runs.c[name] for name in ("run_id", "run_type", "workspace_id", "created_at")))
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(min(among, MAX_LISTED))
        .subquery()
    )
    position = func.row_number().over(order_by=(newest.c.created_at.desc(), newest.c.run_id.desc()))
    is_listed = newest.c.run_type.is_distinct_from("generation")
    of_kind = select(newest.c.run_id, position.label("position")).where(
        is_listed, within(workspaces, newest.c.workspace_id)
    )
    listed = of_kind.subquery()
    statement = select(listed.c.run_id, listed.c.position).where(listed.c.run_id.in_(run_ids))
    return {row.run_id: row.position for row in await db.fetch(statement)}


# Leases: work with a name, which one process does at a time.


async def take_lease(
    db: Database,
    name: str,
    holder: str,
    now: datetime,
    duration: timedelta,
    *,
    longest: timedelta | None = None,
) -> bool:
    """Take or extend the lease `name` until `now + duration`; false if another holder has it.

    `longest` is the longest duration it is ever taken for, if more than `duration`: one that lasts
    longer was taken before the clock was set back, and has expired.
    """
    beyond = now + (longest or duration) + _APART
    may_take = or_(leases.c.until <= now, leases.c.until > beyond, leases.c.holder == holder)
    values = {"holder": holder, "until": now + duration}
    statement = db.upsert(leases, {"name": name}, values, may_take).returning(leases.c.name)
    return await to_its_end(db.execute_row(statement), seconds=LEASE_SECONDS) is not None


async def drop_lease(db: Database, name: str, holder: str) -> None:
    """Release the lease `name`, if `holder` has it."""
    statement = delete(leases).where(leases.c.name == name, leases.c.holder == holder)
    await to_its_end(db.execute(statement), seconds=LEASE_SECONDS)


WRITE_CHECK_SECONDS: Final = 10.0
"""How long a row that was stored shows that the next one can be."""


async def check_writes(db: Database) -> None:
    """Return if the last write was committed, and a row was stored not long ago, or can be now.

    Other writes do not show it: what finds nothing to do changes no row, and is committed also
    where a disk is full. Raises `StoreUnavailable` if no row can be stored.
    """
    age = time.monotonic() - db.writes_checked_at
    if db.refuses_writes or age >= WRITE_CHECK_SECONDS:
        # SQLite writes no page for a row that stays as it is, so the holder is another each time.
        row = {"holder": uuid4().hex, "until": datetime.fromtimestamp(0, UTC)}
        await db.execute(db.upsert(leases, {"name": "write-check"}, row))
        db.writes_checked_at = time.monotonic()


# Signals.

ALIVE_SECONDS: Final = 20.0
"""How often the listening connection is checked."""
RETRY_SECONDS: Final = (0.2, 5.0)

# The channels of PostgreSQL. Every payload names the `Database.origin` that sent it, so that a
# process can ignore its own.
DUE: Final = "tracker_due"
"""A poll was brought forward, or a claimed run released. The payload is the origin."""
RUNS: Final = "tracker_runs"
"""Runs changed. The payload is a JSON list: the origin, then the ids of the runs."""
INBOX: Final = "tracker_inbox"
"""Deliveries wait that the origin has no time to apply. The payload is the origin."""
OUTBOX: Final = "tracker_outbox"
"""Events or messages are to be sent to endpoints. The payload is the origin."""
PAYLOAD_BYTES: Final = 7500
"""PostgreSQL takes 7999 bytes in one notification; the rest is for the origin."""


async def notify(db: Database, channel: str) -> None:
    """Notify other processes, on a channel whose payload is the origin; there are none on SQLite.
    Raises `StoreUnavailable`."""
    if db.dialect == "postgresql":
        await db.send("SELECT pg_notify($1, $2)", (channel, db.origin))


Listener = Callable[[Sequence[str]], None]
"""Called in the event loop with the ids of changed runs; with none where some may be missed."""


def run_notices(origin: str, run_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Channels and payloads that name all these runs, in as few notifications as hold them.

    A run whose id alone is longer than a notification is left out.
    """
    payloads: list[list[str]] = []
    space = 0
    for run_id in run_ids:
        size = len(orjson.dumps(run_id)) + 1
        if size > PAYLOAD_BYTES:
            continue
        if size > space:
            payloads.append([origin])
            space = PAYLOAD_BYTES
        payloads[-1].append(run_id)
        space -= size
    return [(RUNS, orjson.dumps(each).decode()) for each in payloads]


def read_runs(payload: str) -> tuple[str, list[str]]:
    """Origin and runs of a `RUNS` notification; empty if another program uses the channel."""
    try:
        value: Any = orjson.loads(payload)
    except ValueError:
        return "", []
    if not value or not isinstance(value, list):
        return "", []
    if not all(isinstance(each, str) for each in value):
        return "", []
    return value[0], value[1:]


class Signals:
    """Wakes the worker and the stream. `committed` is a hook of the writer.

    Listens to other processes as well within `async with Signals(database) as signals`.
    `retry_seconds` are the first and the longest wait before a lost connection is made again.
    """

    def __init__(self, db: Database, *, retry_seconds: tuple[float, float] = RETRY_SECONDS) -> None:
        self._db = db
        self._retry_seconds = retry_seconds
        self._due = asyncio.Event()
        self._listeners: set[Listener] = set()
        self._when_events: Callable[[], None] = lambda: None
        self._when_notified: dict[str, Callable[[], None]] = {
            DUE: self._due.set,
            INBOX: lambda: None,
            OUTBOX: lambda: None,
        }
        self._task: asyncio.Task[None] | None = None
        self._listening = False

    async def __aenter__(self) -> Self:
        if self._db.dialect == "postgresql":
            self._task = asyncio.create_task(self._listen(), name="signals")
        return self

    async def __aexit__(self, *_: object) -> None:
        task, self._task = self._task, None
        await cancel(task)

    def when_notified(self, channel: str, call: Callable[[], None]) -> None:
        """Call `call` whenever another process has notified this one on `INBOX` or `OUTBOX`."""
        self._when_notified[channel] = call

    def when_events(self, call: Callable[[], None]) -> None:
        """Call `call` whenever this process has committed events to send to endpoints."""
        self._when_events = call

    @property
    def listening(self) -> bool:
        """Whether signals of other processes arrive now; on SQLite there are none."""
        return self._db.dialect == "sqlite" or self._listening

    async def wait_due(self, timeout: float) -> bool:
        """Wait until a poll is brought forward, at most `timeout` seconds; whether one was.

        Signals since the last call count, so that none is missed between two calls.
        """
        if not await wait_for(self._due, timeout):
            return False
        self._due.clear()
        return True

    def wake_due(self) -> None:
        """End the present or the next `wait_due` of this process."""
        self._due.set()

    @contextlib.contextmanager
    def subscribed(self, listener: Listener) -> Iterator[None]:
        """Call `listener` for every change of a run for as long as the block lasts."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def committed(self, outcome: "WriteOutcome") -> None:
        """Hook of the writer: report a commit of this process."""
        if outcome.due:
            self._due.set()
        if outcome.changed_runs:
            self._publish(outcome.changed_runs)
        if outcome.outbox:
            self._when_events()

    def _publish(self, run_ids: Sequence[str]) -> None:
        for listener in tuple(self._listeners):
            listener(run_ids)

    async def _listen(self) -> None:
        wait, longest = self._retry_seconds
        is_reported = False
        while True:
            listened = False
            try:
                connection = await connect_postgres(self._db.url, "tracker-signals")
                try:
                    await self._listen_on(connection)
                finally:
                    listened, self._listening = self._listening, False
                    connection.terminate()
            except Exception as exc:
                # Whatever the driver raises in a handshake: without this task no signal arrives.
                if listened or not is_reported:
                    log.warning("signals.lost", error=type(exc).__name__)
                is_reported = True
            else:
                is_reported = False
            wait = self._retry_seconds[0] if listened else min(wait * 2, longest)
            await asyncio.sleep(wait)

    async def _listen_on(self, connection: Any) -> None:
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        for channel in (RUNS, *self._when_notified):
            await connection.add_listener(channel, self._on_notification)
        self._listening = True
        # Signals were missed while nothing listened.
        self._due.set()
        self._when_notified[OUTBOX]()
        self._publish(())
        while not lost.is_set():
            if not await wait_for(lost, ALIVE_SECONDS):
                await connection.execute("SELECT 1")

    def _on_notification(self, _connection: Any, _pid: int, channel: str, payload: str) -> None:
        origin, run_ids = read_runs(payload) if channel == RUNS else (payload, [])
        if origin == self._db.origin:
            return
        if channel == RUNS:
            self._publish(run_ids)
        else:
            self._when_notified[channel]()
