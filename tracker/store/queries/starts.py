"""The start log: every idempotency key, its request, and its outcome.

The states of a start::

    stored       the key is stored, nothing was sent. While a lease is held, the price is reserved
                 in the budgets                                   → sent
    sent         the first request is about to be sent or was sent; the holder of the lease waits
                 for the answer, or has died              → started, refused, in_doubt, stored
    in_doubt     a request may have reached FLORA without an answer; only evidence or a person
                 removes the doubt                                → started, refused, unresolved
    started      it became the run that the row names; set by the writer, together with the run
    refused      FLORA refused it without doubt, or a person decided that nothing was started; the
                 key may be used again                            → stored
    unresolved   a person has to decide                           → started, refused

The price stays reserved while a start is `sent`, `in_doubt` or `unresolved`; once it is `started`,
the cost of its run counts instead. A row that is `sent` without a lease is in doubt, because its
process died. Evidence may set any state to `started`. Only the holder of the lease sends the key
and writes the state. Keys belong to a workspace id.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import cache
from typing import Any, Final

import orjson
from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    and_,
    bindparam,
    case,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)

from tracker.core.formatting import clean
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed, Record, StartFacts
from tracker.core.run import Tracking, known
from tracker.core.starts import Budget, Tags, digest_of, same_types, same_values
from tracker.store.engine import Database, dump_json
from tracker.store.queries import audit, paging, spending
from tracker.store.queries.audit import Action
from tracker.store.queries.runs import RUN_COLUMNS, fetch_records, get_runs
from tracker.store.schema import LONGEST_LEASE, is_any_of, is_free, runs, starts, word


class StartState(StrEnum):
    """See the docstring of this module."""

    STORED = "stored"
    SENT = "sent"
    IN_DOUBT = "in_doubt"
    STARTED = "started"
    REFUSED = "refused"
    UNRESOLVED = "unresolved"


UNKNOWN: Final = (StartState.SENT, StartState.IN_DOUBT, StartState.UNRESOLVED)
"""States whose outcome is not known."""
FEW: Final = 5
"""Runs whose creation times are compared, so that one wrong time does no harm."""
LISTED: Final = (StartState.STORED, *UNKNOWN)
"""States that can be listed: rare, each with its own index."""
SET_BACK: Final = timedelta(minutes=1)
"""By how much our clock may have been set back since a start was sent."""
MOST_POSSIBLE: Final = 100
"""How many runs that a start may have become are stored."""
_IS_FRESH: Final = starts.c.state.in_([word("stored"), word("refused")])


@dataclass(frozen=True, slots=True)
class SentClock:
    """When a start was sent, by `SharedClock.seconds` of this boot of a machine, and by how many
    seconds FLORA's clock was ahead of ours then, if known."""

    boot: str
    seconds: float
    flora_ahead: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRow:
    """One start.

    The key was first sent at `in_use_since` and last at `sent_at`. `request_body` is kept while it
    may have to be repeated. `error` is the last answer without a run: status, code, message,
    fields; `conflict` in it says that FLORA knows the key, `possible` which runs the start may
    have become, `excluded` which a person says it has not. Each of `reserved_runs` runs takes
    `reserved_cost` USD from the budgets of the period of `reserved_at`; once started, these are the
    first run and those not observed yet. `run_count` is how many are known; `None` counts as one.
    `sent_clock` is when it was sent by a clock that only runs forward (`sent_by`), `set_back` by
    how many seconds the clock was set back since the first time.
    """

    workspace_id: str
    idempotency_key: str
    technique_id: str
    fingerprint: str
    inputs: list[dict[str, Any]]
    created_at: datetime
    state: StartState | str = StartState.STORED
    in_use_since: datetime | None = None
    callback_url: str | None = None
    sent_at: datetime | None = None
    run_id: str | None = None
    error: dict[str, Any] | None = None
    lease_until: datetime | None = None
    lease_holder: str | None = None
    callback_token: str | None = None
    request_body: str | None = None
    started_by: str | None = None
    tags: Tags | None = None
    reserved_at: datetime | None = None
    reserved_cost: Decimal | None = None
    reserved_runs: int | None = None
    run_count: int | None = None
    sent_clock: dict[str, Any] | None = None
    set_back: float | None = None

    @property
    def first_sent(self) -> datetime:
        """When its key was first sent, rather too early, by the clock as it is set now; when it was
        stored, if that is unknown."""
        return (self.in_use_since or self.created_at) - timedelta(seconds=self.set_back or 0.0)

    @property
    def last_sent(self) -> datetime:
        """When its key was last sent; when it was stored, if that is unknown."""
        return self.sent_at or self.created_at

    def sent_by(self, boot: str) -> "SentClock | None":
        """When its key was last sent, by the seconds of this boot; `None` if it was sent by another
        machine, before this one was started, or by a version that did not store it."""
        found = self.sent_clock or {}
        if found.get("boot") != boot or found.get("sent_at") != self.last_sent.isoformat():
            return None
        return SentClock(boot, found["seconds"], found["flora_ahead"])

    @property
    def is_fresh(self) -> bool:
        """Whether no request with this key can have taken effect."""
        return self.state in (StartState.STORED, StartState.REFUSED)

    def is_for(self, technique_id: str, inputs: Sequence[Mapping[str, Any]]) -> bool:
        """Whether it is the start of this technique with these inputs, in whatever order.

        Inputs may have no type. Types count once a request may have acted; until then they can be
        corrected. If retention has removed the stored inputs, the fingerprint alone decides, which
        includes order and types.
        """
        if self.fingerprint == digest_of([technique_id, inputs]):
            return True
        if self.technique_id != technique_id or not self.inputs:
            return False
        given = orjson.loads(dump_json(inputs))  # as a database returns them
        is_same = same_values(self.inputs, given)
        return is_same and (self.is_fresh or same_types(self.inputs, given))

    def retyped(self, inputs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The columns with the types of `inputs`, which it is for.

        The order stays: FLORA may know the key with it, and refuses it with another body.
        """
        types = defaultdict[str, deque[str]](deque)
        for one in inputs:
            types[clean(one["id"])].append(one["type"])
        mine = [one | {"type": types[one["id"]].popleft()} for one in self.inputs]
        return {"inputs": mine, "fingerprint": digest_of([self.technique_id, mine])}

    @property
    def is_known_to_flora(self) -> bool:
        """Whether FLORA answered 409 or 422: it has a request with this key."""
        error = self.error or {}
        return bool(error.get("conflict")) or error.get("code") == "idempotency_conflict"

    @property
    def possible_runs(self) -> frozenset[str] | None:
        """The only runs that it may have become; `None` while FLORA may be at work on the last
        request, or if that is not known."""
        found = (self.error or {}).get("possible") or {}
        if found.get("sent_at") != self.last_sent.isoformat():
            return None  # it was sent again since
        return frozenset(found["run_ids"]) - self.excluded_runs

    @property
    def excluded_runs(self) -> frozenset[str]:
        """The runs that someone else started, as a person says."""
        return frozenset((self.error or {}).get("excluded") or ())

    def with_possible(self, run_ids: Collection[str]) -> dict[str, Any] | None:
        """The `error` to store when it can only have become one of these runs."""
        if len(run_ids) > MOST_POSSIBLE:
            return self.error
        found = {"sent_at": self.last_sent.isoformat(), "run_ids": sorted(run_ids)}
        return (self.error or {}) | {"possible": found}

    def became(self, seen: Observation, *, callback_expected: bool) -> Observed:
        """The entry that the start became the run of this observation, which closes the start."""
        workspace_id = seen.workspace_id or self.workspace_id
        return Observed(
            observation=replace(seen, workspace_id=workspace_id, technique_id=self.technique_id),
            start=StartFacts(
                workspace_id=self.workspace_id,
                idempotency_key=self.idempotency_key,
                inputs=self.inputs,
                tags=self.tags,
                reserved_at=self.reserved_at,
                reserved_cost=self.reserved_cost,
            ),
            callback_expected=callback_expected,
        )

    @property
    def missing_runs(self) -> int:
        """How many of its runs are not known yet, as far as its inputs show: FLORA's answer names
        the first, and callbacks name the others."""
        is_started = self.state is StartState.STARTED
        return max((self.reserved_runs or 1) - 1, 0) if is_started else 0

    def gets_runs(self, known_runs: Sequence[Record], now: datetime) -> bool:
        """Whether callbacks to its own address may still name further runs."""
        token, ends = self.callback_token, [one.end_seen_at for one in known_runs]
        is_called_back = token is not None and (self.callback_url or "").endswith(f"/{token}")
        is_active = any(one.tracking is Tracking.ACTIVE for one in known_runs)
        last_end = max(filter(None, ends), default=None)
        return self.missing_runs > 0 and is_called_back and gets_callbacks(is_active, last_end, now)

    def is_held(self, now: datetime) -> bool:
        return self.lease_until is not None and now < self.lease_until <= now + LONGEST_LEASE


_RESERVED: Final = ("lease_holder", "lease_until", "reserved_at", "reserved_cost", "reserved_runs")


async def reserve(db: Database, new: StartRow, budgets: Sequence[Budget] = ()) -> StartRow:
    """Store a start once, and return its row.

    An existing row of its key is returned unchanged; the caller compares the request. A new one is
    written to the audit log.

    A `new` one with a `lease_holder` also takes the lease of a fresh start, as by `take`, gives it
    the types of its inputs, and reserves its price, which must fit into the `budgets`. The
    reservation lasts while the lease is held, and then for as long as the start may have been sent.
    Raises `BudgetExceeded`; then nothing is stored.
    """
    key, at = (new.workspace_id, new.idempotency_key), new.created_at
    names = ("technique_id", "workspace_id", "idempotency_key")
    entry = audit.entry(Action.START, at, **{name: getattr(new, name) for name in names})
    values = {name: getattr(new, name) for name in StartRow.__slots__}
    stored = {name: value for name, value in values.items() if value is not None}
    insert = db.insert(starts).values(stored | {"workspace_slot": new.workspace_id})
    on_key = [starts.c.workspace_slot, starts.c.idempotency_key]
    statement = insert.on_conflict_do_nothing(index_elements=on_key).returning(*starts.c)
    this = {"slot": key[0], "key": key[1]}
    renewed = {name: values[name] for name in ("state", "tags", *_RESERVED)}
    again = _update(*key, _IS_FRESH, is_free(starts, at)).values(renewed).returning(*starts.c)

    def work(connection: Connection) -> StartRow:
        # Before the key is read, so that a concurrent request has stored it by then.
        spending.lock(connection, budgets)
        row = _found(connection.execute(_BY_KEY, this).first())
        if row is not None:
            is_same = row.is_for(new.technique_id, new.inputs)
            is_free = row.is_fresh and not row.is_held(at) and not row.is_known_to_flora
            if new.lease_holder is None or not (is_same and is_free):
                return row
        cost = new.reserved_cost
        price = None if cost is None else cost * (new.reserved_runs or 1)
        spending.check_room(connection, budgets, price=price, now=at)
        held = statement if row is None else again.values(row.retyped(new.inputs))
        made = connection.execute(held).first()
        if made is None:  # a concurrent request stored it first
            return _row(connection.execute(_BY_KEY, this).one())
        audit.note(connection, entry)
        return _row(made)

    return await db.write(work)


_IS_THE_ONE: Final = and_(
    starts.c.workspace_slot == bindparam("slot"), starts.c.idempotency_key == bindparam("key")
)
_BY_KEY: Final = select(starts).where(_IS_THE_ONE)


async def get(db: Database, workspace_id: str, key: str) -> StartRow | None:
    """The start with this key, if any."""
    return _found(await db.fetchrow(_BY_KEY, {"slot": workspace_id, "key": key}))


# The runs of a start: one, or several if an input has several values. The first that was known is
# the `run_id` of the start; those after it have its key.

HAS_SEVERAL: Final = starts.c.run_count > literal_column("1")
"""Several runs of the start are known."""


def is_further_run(run: FromClause, start: FromClause = starts) -> ColumnElement[bool]:
    """`run`, the table `runs` or an alias of it, is a run of the start, and not its first."""
    return and_(
        run.c.idempotency_key == start.c.idempotency_key,
        paging.unindexed(run.c.workspace_id) == start.c.workspace_slot,
        run.c.run_id != start.c.run_id,
    )


async def of_run(db: Database, run_id: str) -> StartRow | None:
    """The start that became this run; the first if FLORA answered several keys with it."""
    first = select(starts).where(starts.c.run_id == run_id)
    further = select(starts).join(runs, is_further_run(runs)).where(runs.c.run_id == run_id)
    found = first.union_all(further).subquery()
    return _found(await db.fetchrow(select(found).order_by(found.c.created_at).limit(1)))


async def runs_of(db: Database, rows: Iterable[StartRow]) -> dict[str, list[Record]]:
    """The stored runs of starts of one workspace, by idempotency key: the first one, then the
    others by their creation."""
    rows = list(rows)
    records = await get_runs(db, (row.run_id for row in rows if row.run_id is not None))
    found = {row.idempotency_key: [] if row.run_id is None else [row.run_id] for row in rows}
    several = [row.idempotency_key for row in rows if (row.run_count or 1) > 1]
    if several:
        further = select(*RUN_COLUMNS).where(
            is_any_of(runs.c.idempotency_key, several),
            paging.unindexed(runs.c.workspace_id) == rows[0].workspace_id,
        )
        for record in await fetch_records(db, further.order_by(runs.c.created_at, runs.c.run_id)):
            run_id = record.run.run_id
            records[run_id] = record
            if (ids := found[record.idempotency_key or ""]) and run_id != ids[0]:
                ids.append(run_id)
    return {key: [records[one] for one in ids if one in records] for key, ids in found.items()}


async def of_keys(db: Database, workspace_id: str, keys: Iterable[str]) -> dict[str, StartRow]:
    """The starts of these keys, by key."""
    mine = starts.c.workspace_slot == workspace_id, is_any_of(starts.c.idempotency_key, [*keys])
    rows = await db.fetch(select(starts).where(*mine))
    return {row.idempotency_key: _row(row) for row in rows}


async def list_starts(
    db: Database,
    *,
    states: Sequence[str] | None = None,
    workspace_id: str | None = None,
    cursor: str | None = None,
    limit: int,
) -> tuple[list[StartRow], str | None]:
    """A page of starts, newest first, and the cursor of the next page.

    Without `states`, all whose outcome is not known. Their `possible_runs` are those that are left.
    Raises `InvalidRequest` for an invalid cursor.
    """
    key = (starts.c.created_at, starts.c.idempotency_key)
    of = paging.after(key, cursor)
    if workspace_id is not None:
        of.append(paging.unindexed(starts.c.workspace_slot) == workspace_id)
    newest = select(starts).where(*of).order_by(*(each.desc() for each in key)).limit(limit + 1)
    found: list[StartRow] = []
    async with db.read() as connection:
        # One query for each state, so that each uses its own index.
        for state in states or UNKNOWN:
            rows = await connection.execute(newest.where(is_in(StartState(state))))
            found += map(_row, rows)
    found.sort(key=lambda row: (row.created_at, row.idempotency_key), reverse=True)
    page, more = found[:limit], len(found) > limit
    last = page[-1] if page else None
    page = [await with_runs_left(db, row) for row in page]
    return page, paging.cursor_at(last.created_at, last.idempotency_key) if more and last else None


async def of_key(db: Database, key: str) -> list[StartRow]:
    """The starts with this key, in any workspace."""
    statement = select(starts).where(starts.c.idempotency_key == key)
    return [_row(row) for row in await db.fetch(statement)]


def of_tokens(connection: Connection, tokens: Sequence[str]) -> dict[str, StartRow]:
    """The starts with these callback tokens, by token."""
    statement = select(starts).where(
        starts.c.callback_token.is_not(None), starts.c.callback_token.in_(tokens)
    )
    return {row.callback_token: _row(row) for row in connection.execute(statement)}


async def take(
    db: Database, workspace_id: str, key: str, holder: str, now: datetime, lease: timedelta
) -> StartRow | None:
    """Take the lease until `now + lease`, and return the row; `None` if another holds it or the
    start became a run."""
    may_take = or_(is_free(starts, now), starts.c.lease_holder == holder)
    mine = _update(workspace_id, key, starts.c.state != StartState.STARTED, may_take)
    statement = mine.values(lease_until=now + lease, lease_holder=holder).returning(*starts.c)
    return _found(await db.execute_row(statement))


async def prolong(
    db: Database, workspace_id: str, key: str, holder: str, now: datetime, lease: timedelta
) -> bool:
    """Renew the lease of `holder`; false if it lost it.

    A lease that expired before anything was sent is lost: another start may use its reservation.
    """
    lasts = or_(starts.c.state != word("stored"), starts.c.lease_until > now)
    mine = _update(workspace_id, key, starts.c.lease_holder == holder, lasts)
    return await db.execute(mine.values(lease_until=now + lease)) == 1


@dataclass(frozen=True, slots=True)
class NotStored:
    """What is known of a start that was last sent at `sent_at`, and that the database did not take,
    or may not have taken: its columns with their values."""

    sent_at: datetime | None
    values: dict[str, Any]


def as_before(row: StartRow, sent_at: datetime) -> NotStored:
    """That a start is as before, if `mark_sent` stored that it is sent, and it was not sent."""
    names = ("sent_at", "sent_clock", "state", *_FIRST_SENT)
    return NotStored(sent_at, {name: getattr(row, name) for name in names})


async def give_back(
    db: Database, workspace_id: str, key: str, holder: str, known: NotStored | None = None
) -> bool:
    """Release the lease if `holder` still has it, and store what is `known`, unless the start was
    sent again or another holds it; false if another does."""
    mine = starts.c.lease_holder == holder
    values: dict[str, Any] = {"lease_until": None, "lease_holder": None}
    if known is not None:
        is_open = starts.c.state.in_([word("sent"), word("in_doubt")])
        applies = and_(starts.c.sent_at == known.sent_at, is_open)
        for name, value in known.values.items():
            column = starts.c[name]
            new = null() if value is None else literal(value, column.type)
            values[name] = case((applies, new), else_=column)
        mine = or_(mine, starts.c.lease_holder.is_(None))
    return await db.execute(_update(workspace_id, key, mine).values(values)) == 1


_FIRST_SENT: Final = ("set_back", "in_use_since", "callback_url", "request_body", "error")
"""What is stored with the first request of a key, besides its state."""


async def mark_sent(
    db: Database,
    workspace_id: str,
    key: str,
    *,
    holder: str,
    at: datetime,
    callback_url: str | None,
    request_body: str,
    sent: SentClock | None = None,
) -> StartRow | None:
    """Store that a request is about to be sent, and return the row.

    `None` if `holder` lost the start: its lease expired, another holds it, or it became a run. The
    callback address and the body are stored with the first request of a key; a repetition changes
    neither, and leaves a start in doubt. `sent` is `at` by a clock that only runs forward.
    """
    values = {
        "slot": workspace_id,
        "key": key,
        "holder": holder,
        "at": at,
        "url": callback_url,
        "body": request_body,
        "clock": sent and {"sent_at": at.isoformat(), **asdict(sent)},
    }
    return _found(await db.execute_row(_mark_sent(), values))


@cache
def _mark_sent() -> Any:
    """The statement of `mark_sent`, with parameters."""

    def given(name: str, column: str) -> ColumnElement[Any]:
        return bindparam(name, type_=starts.c[column].type)

    at = given("at", "sent_at")
    news = (null(), at, given("url", "callback_url"), given("body", "request_body"), null())
    first = {"state": word("sent"), **dict(zip(_FIRST_SENT, news, strict=True))}
    values = {name: case((_IS_FRESH, new), else_=starts.c[name]) for name, new in first.items()}
    is_open = or_(_IS_FRESH, starts.c.state.in_([word("sent"), word("in_doubt")]))
    held = and_(starts.c.lease_holder == bindparam("holder"), starts.c.lease_until > at)
    statement = update(starts).where(_IS_THE_ONE, is_open, held)
    statement = statement.values(sent_at=at, sent_clock=given("clock", "sent_clock"), **values)
    return statement.returning(*starts.c)


async def mark(
    db: Database,
    workspace_id: str,
    key: str,
    *,
    holder: str,
    state: StartState,
    error: dict[str, Any] | None,
) -> StartRow | None:
    """Set the state of a start and return its row, `None` if `holder` lost it.

    `STARTED` is set only by the writer, together with the run.
    """
    values = outcome(state, error)
    held = and_(starts.c.state != StartState.STARTED, starts.c.lease_holder == holder)
    statement = _update(workspace_id, key, held).values(**values)
    return _found(await db.execute_row(statement.returning(*starts.c)))


def outcome(state: StartState, error: dict[str, Any] | None) -> dict[str, Any]:
    """The columns of a start that was answered without a run."""
    values: dict[str, Any] = {"state": state.value, "error": error}
    if state in (StartState.STORED, StartState.REFUSED):
        values["request_body"] = None
    return values


async def open_starts(db: Database) -> list[StartRow]:
    """Starts that are `sent` or `in_doubt`, oldest first."""
    rows = await _in_states(db, StartState.SENT, StartState.IN_DOUBT)
    return sorted(rows, key=lambda row: (row.created_at, row.idempotency_key))


async def that_may_be(db: Database, run_id: str) -> list[StartRow]:
    """The starts without a known outcome that are stored as possibly that run."""
    rows = await _in_states(db, StartState.IN_DOUBT, StartState.UNRESOLVED)
    return [row for row in rows if run_id in (row.possible_runs or ())]


async def rivals(db: Database, workspace_id: str, technique_id: str, key: str) -> list[StartRow]:
    """Other starts of the technique without a known outcome: a run may belong to them as well."""
    rows = await _in_states(db, *UNKNOWN)
    return [
        row
        for row in rows
        if (row.workspace_id, row.technique_id) == (workspace_id, technique_id)
        and row.idempotency_key != key
    ]


async def _in_states(db: Database, *states: StartState) -> list[StartRow]:
    """The starts in these rare states, each by its own index."""
    parts = [select(starts).where(is_in(state)) for state in states]
    return [_row(row) for row in await db.fetch(union_all(*parts))]


async def possible(db: Database, row: StartRow, run_ids: Iterable[str]) -> set[str]:
    """Those of the runs that may be the start's: they became known since its first sending, FLORA
    listed them when it was done with the last request, and nothing else accounts for them (they are
    of no other start or technique, were not given to `track`, and no person has excluded them)."""
    listed = row.possible_runs
    found = {run_id for run_id in run_ids if listed is None or run_id in listed}
    found -= row.excluded_runs
    if not found:
        return set()
    by_start = select(starts.c.run_id).where(starts.c.run_id.in_(found))
    by_itself = select(runs.c.run_id).where(
        runs.c.run_id.in_(found),
        or_(
            runs.c.source.in_([Source.START, Source.TRACK]),
            runs.c.first_seen_at < row.first_sent - SET_BACK,
            and_(
                runs.c.technique_id.startswith("tech_", autoescape=True),
                runs.c.technique_id != row.technique_id,
            ),
        ),
    )
    return found.difference(await db.fetchcol(by_start.union(by_itself)))


async def with_runs_left(db: Database, row: StartRow) -> StartRow:
    """The start, with those of its `possible_runs` that nothing accounts for by now."""
    if row.state not in UNKNOWN or row.possible_runs is None:
        return row
    left = await possible(db, row, row.possible_runs)
    return replace(row, error=row.with_possible(left))


async def newest_known(
    db: Database, workspace_id: str | None, *, before: datetime
) -> datetime | None:
    """FLORA's creation time of the newest runs that became known before; `None` if none did.

    The oldest of a few counts, so that one wrong time does no harm.
    """
    newest = (
        select(runs.c.created_at)
        .where(
            runs.c.workspace_id == workspace_id,
            runs.c.created_at_known,
            runs.c.first_seen_at < before,
        )
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(FEW)
    )
    return min(await db.fetchcol(newest), default=None)


def is_in(state: StartState) -> ColumnElement[bool]:
    """The start is in this state; matches the partial index of the state."""
    of = starts.c.state
    if state in (StartState.STORED, StartState.SENT):
        return and_(of.in_([word("stored"), word("sent")]), of == word(state))
    return of == word(state)


def _is(workspace_id: str, key: str) -> ColumnElement[bool]:
    return and_(starts.c.workspace_slot == workspace_id, starts.c.idempotency_key == key)


def _update(workspace_id: str, key: str, *conditions: ColumnElement[bool]) -> Any:
    return update(starts).where(_is(workspace_id, key), *conditions)


def _found(row: Row[Any] | None) -> StartRow | None:
    return None if row is None else _row(row)


def _row(row: Row[Any]) -> StartRow:
    values = row._asdict()
    values["workspace_id"] = values.pop("workspace_slot")
    return StartRow(**values | {"state": known(StartState, values["state"])})


# A proxy may forward only the exact path `/callbacks/flora`, so that callbacks to the addresses of
# single starts are lost.
MISSING: Final = 5
"""After this many missed callbacks in a row new starts use the bare address."""
MISSING_AFTER: Final = timedelta(minutes=2)
"""How long after the end of its run a callback counts as missed: FLORA has tried three times."""
AMONG: Final = 10_000
"""The newest runs, among which these are."""
TRY_AGAIN_AFTER: Final = timedelta(hours=1)
"""How long until addresses of single starts are tried again."""


def gets_callbacks(is_active: bool, last_end: datetime | None, now: datetime) -> bool:
    """Whether FLORA may still call back for runs that are not known, beside known ones of which one
    is active, or the last end became known then."""
    # A clock that was set back prolongs no wait.
    return is_active or (last_end is not None and abs(now - last_end) < MISSING_AFTER)


async def own_are_missing(db: Database, *, now: datetime, among: int = AMONG) -> bool:
    """Whether the last `MISSING` runs with a callback address of their own got no callback, and one
    of them was started within `TRY_AGAIN_AFTER`. They are looked for among so many of the newest
    runs, because there may be none."""
    newest = select(runs.c.created_at).order_by(runs.c.created_at.desc()).limit(among).subquery()
    first = select(func.min(newest.c.created_at)).scalar_subquery()
    statement = (
        select(runs.c.callback_at, starts.c.sent_at)
        .join(starts, and_(starts.c.run_id == runs.c.run_id, starts.c.callback_token.is_not(None)))
        .where(
            runs.c.source == Source.START,
            runs.c.callback_expected,
            runs.c.end_seen_at < now - MISSING_AFTER,
            runs.c.created_at >= first,
            starts.c.callback_url.like("%/" + starts.c.callback_token),
        )
        .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
        .limit(MISSING)
    )
    found = await db.fetch(statement)
    return (
        len(found) == MISSING
        and all(row.callback_at is None for row in found)
        and any(row.sent_at is not None and row.sent_at > now - TRY_AGAIN_AFTER for row in found)
    )
