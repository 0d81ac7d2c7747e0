"""The audit log: who did what, and who was refused; and the sessions of signed-in browsers.

An action is logged in the transaction that performs it, or in one before. The principal is set
where a request or command begins (`acting`) and travels in a context variable. Refused requests are
counted in memory and stored every few seconds, as one row per address, minute and token.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Executable, delete, insert, select, text, update

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.core.log import get_logger
from tracker.core.waiting import cancel, repeat
from tracker.store.engine import Database, insert_on
from tracker.store.queries.paging import between, matching, newest_first
from tracker.store.schema import audit, sessions, word

STORE_AFTER: Final = 2.0
"""Seconds between two commits of refused requests."""
MOST_ADDRESSES: Final = 100
"""Most addresses with rows of their own, per minute and process."""
OTHERS: Final = "others"
"""The address of all further ones."""
ANONYMOUS: Final = "anonymous"
"""The actor of requests without a known token."""

log = get_logger(__name__)


class Action(StrEnum):
    """The kind of an entry."""

    START = "start"
    LAUNCH = "launch"
    STOP = "stop"
    RESOLVE = "resolve"
    REPLAY = "replay"
    ACKNOWLEDGE = "acknowledge"
    FORGET = "forget"
    RESEND = "resend"
    ENABLE = "enable_endpoint"
    TEST = "test_endpoint"
    PRUNE = "prune"
    SIGN_IN = "sign_in"
    SIGN_OUT = "sign_out"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who acts: a token's name, or `cli:` or `batch:` and the user of the machine.

    `address` and `request_id` are those of an HTTP request.
    """

    name: str
    address: str | None = None
    request_id: str | None = None


_TRACKER: Final = Principal(name="tracker")
_principal: ContextVar[Principal] = ContextVar("principal", default=_TRACKER)


@contextmanager
def acting(principal: Principal) -> Iterator[None]:
    """Set the principal within the block; the default is the tracker itself."""
    token = _principal.set(principal)
    try:
        yield
    finally:
        _principal.reset(token)


def principal() -> Principal:
    """The principal of this context."""
    return _principal.get()


def entry(action: Action, at: datetime, **detail: Any) -> dict[str, Any]:
    """A row of the log by the current principal; `None` is left out of the detail."""
    who = principal()
    return {
        "at": at,
        "actor": who.name,
        "action": action.value,
        "detail": {name: value for name, value in detail.items() if value is not None},
        "request_id": who.request_id,
        "address": who.address,
        "count": 1,
    }


def note(connection: Connection, row: Mapping[str, Any]) -> None:
    """Write an entry within a transaction."""
    connection.execute(insert(audit).values(**row))


def execute_noted(connection: Connection, change: Executable, row: Mapping[str, Any]) -> bool:
    """Execute an update or a deletion within a transaction, and write an entry if it changed any
    row; whether it did."""
    changed = connection.execute(change).rowcount > 0
    if changed:
        note(connection, row)
    return changed


async def write(db: Database, row: Mapping[str, Any]) -> int:
    """Write an entry in a transaction of its own, and return its id. Raises `StoreUnavailable`."""
    statement = insert(audit).values(**row).returning(audit.c.id)
    return await db.write(lambda connection: int(connection.execute(statement).scalar_one()))


async def add_detail(db: Database, audit_id: int, detail: Mapping[str, Any]) -> None:
    """Set the detail of an entry. Raises `StoreUnavailable`."""
    statement = update(audit).where(audit.c.id == audit_id).values(detail=detail)
    await db.execute(statement)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One entry. For refused requests `at` is the minute and `count` their number."""

    id: int
    at: datetime
    actor: str
    action: str
    detail: dict[str, Any]
    request_id: str | None
    address: str | None
    count: int


async def list_audit(
    db: Database,
    *,
    since: datetime | None = None,
    action: str | None = None,
    cursor: str | None = None,
    limit: int,
) -> tuple[list[AuditRow], str | None]:
    """A page of the log, newest first, and the cursor of the next page.

    Raises `InvalidRequest` for an invalid cursor.
    """
    statement = select(audit).where(*matching(audit, action=action), *between(audit.c.at, since))
    key = (audit.c.at, audit.c.id)
    async with db.read() as connection:
        rows, following = await newest_first(connection, statement, key, cursor=cursor, limit=limit)
    return [AuditRow(**row._mapping) for row in rows], following


@dataclass(slots=True)
class _Refused:
    """The refused requests of one address, token and minute; the first of them in full."""

    request_id: str | None
    first: dict[str, Any]
    reasons: Counter[str] = field(default_factory=Counter)


_Key = tuple[datetime, str, str]
"""Minute, address, actor."""


class Refusals:
    """Counts refused requests and stores them every few seconds; an asynchronous context manager.

    Counts are kept through an outage of the database.
    """

    def __init__(self, db: Database, *, clock: Clock, store_after: float = STORE_AFTER) -> None:
        self.store_after = store_after
        self._db = db
        self._clock = clock
        self._pending: dict[_Key, _Refused] = {}
        self._minute: datetime | None = None
        self._addresses: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Refusals":
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel(self._task)
        try:
            await self.store()
        except StoreError as error:
            log.warning("audit.not_stored", error=str(error), rows=len(self._pending))

    def add(
        self, reason: str, *, address: str, actor: str | None, request_id: str | None, **first: Any
    ) -> None:
        """Count a refused request; `first` is the detail of the first one of its row."""
        minute = self._clock().replace(second=0, microsecond=0)
        if minute != self._minute:
            self._minute, self._addresses = minute, set()
        if address not in self._addresses:
            if len(self._addresses) >= MOST_ADDRESSES or len(self._pending) >= 10 * MOST_ADDRESSES:
                address = OTHERS
            else:
                self._addresses.add(address)
        key = (minute, address, actor or ANONYMOUS)
        refused = self._pending.setdefault(key, _Refused(request_id, first))
        refused.reasons[reason] += 1
        if self._task is None or self._task.done():
            storing = repeat("audit", self._store_soon, is_over=lambda: not self._pending)
            self._task = asyncio.create_task(storing, name="audit", context=Context())

    async def store(self) -> None:
        """Store the counts. Raises `StoreUnavailable` and keeps them then."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            await self._db.write(partial(_store, sorted(pending.items(), key=lambda one: one[0])))
        except BaseException:
            for key, newer in self._pending.items():
                pending.setdefault(key, newer)
                if pending[key] is not newer:
                    pending[key].reasons += newer.reasons
            self._pending = pending
            raise

    async def _store_soon(self) -> None:
        await asyncio.sleep(self.store_after)
        await self.store()


_ONCE: Final[dict[str, Any]] = {
    "index_elements": [audit.c.address, audit.c.at, audit.c.actor],
    "index_where": text("action = 'refused'"),
}


def _store(pending: Sequence[tuple[_Key, _Refused]], connection: Connection) -> None:
    """Insert each row, or add to the existing one; in one order, so that processes cannot
    deadlock."""
    insert = insert_on(connection.dialect.name)
    for (minute, address, actor), refused in pending:
        row = {
            "at": minute,
            "actor": actor,
            "action": Action.REFUSED.value,
            "detail": refused.first | {"reasons": dict(refused.reasons)},
            "request_id": refused.request_id,
            "address": address,
            "count": refused.reasons.total(),
        }
        made = insert(audit).values(**row).on_conflict_do_nothing(**_ONCE).returning(audit.c.id)
        if connection.execute(made).first() is not None:
            continue
        of = {"address": address, "at": minute, "actor": actor}
        wanted = select(audit.c.id, audit.c.detail).where(audit.c.action == word("refused"))
        wanted = wanted.where(*matching(audit, **of)).with_for_update()
        for audit_id, detail in connection.execute(wanted).all():
            reasons = Counter(detail.get("reasons", {})) + refused.reasons
            more = {"detail": detail | {"reasons": dict(reasons)}, "count": reasons.total()}
            connection.execute(update(audit).where(audit.c.id == audit_id).values(**more))


# Sessions of signed-in browsers.


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    """One session. `session_id` and `token_digest` are digests of the cookie and of the token."""

    session_id: str
    token_name: str
    token_digest: str
    secure: bool
    started_at: datetime
    last_used_at: datetime


async def begin_session(
    db: Database, row: SessionRow, *, idle: timedelta, lasts: timedelta
) -> None:
    """Store a session and delete expired ones, those of a clock that was ahead too, before their
    time comes. Raises `StoreUnavailable`."""
    now = row.started_at
    noted = entry(Action.SIGN_IN, now)
    over = delete(sessions).where(
        ~sessions.c.started_at.between(now - lasts, now + lasts)
        | ~sessions.c.last_used_at.between(now - idle, now + idle)
    )
    values = {name: getattr(row, name) for name in SessionRow.__slots__}

    def work(connection: Connection) -> None:
        connection.execute(over)
        connection.execute(insert(sessions).values(values))
        note(connection, noted)

    await db.write(work)


async def find_session(db: Database, session_id: str) -> SessionRow | None:
    """The session with this id, expired or not. Raises `StoreUnavailable`."""
    statement = select(sessions).where(sessions.c.session_id == session_id)
    row = await db.fetchrow(statement)
    return None if row is None else SessionRow(**row._mapping)


async def use_session(db: Database, session_id: str, *, now: datetime) -> None:
    """Set the time of the last use. Raises `StoreUnavailable`."""
    statement = update(sessions).where(sessions.c.session_id == session_id).values(last_used_at=now)
    await db.execute(statement)


async def end_session(db: Database, session_id: str, *, now: datetime) -> None:
    """Delete the session. Raises `StoreUnavailable`."""
    statement = delete(sessions).where(sessions.c.session_id == session_id)
    noted = entry(Action.SIGN_OUT, now)
    await db.write(lambda connection: execute_noted(connection, statement, noted))
