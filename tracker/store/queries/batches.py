"""Batches: which rows a sheet had, and under which key each was or will be started.

What became of a row is not kept here: its key leads to its start in the ledger, and that to its
run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import islice
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Select, and_, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from tracker.core.row_key import Input, Turn, row_key
from tracker.core.run import RunStatus, Tracking
from tracker.store.engine import Database
from tracker.store.queries import cursors
from tracker.store.queries.starts import StartState
from tracker.store.schema import batch_rows, batches, runs, starts

T = TypeVar("T")

MAPPINGS: Final = 200
"""Batches of a technique whose mapping of columns is compared with a sheet's."""

AT_ONCE: Final = 500
"""So many keys are asked for in one statement; neither database takes any number of parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """A batch. `finished_at` is when a command saw it to its end; `None` while it is to be gone on
    with. `mapping` is which column is which input: `[input id, column, type]` each."""

    batch_id: str
    workspace_slot: str
    technique_id: str
    name: str
    created_at: datetime
    finished_at: datetime | None = None
    mapping: list[list[str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEntry:
    """One row of a batch: `position` counts the rows from 1, `line` is where it begins."""

    position: int
    line: int
    digest: str
    turn: Turn = field(default_factory=Turn)

    @property
    def key(self) -> str:
        """The idempotency key of its start."""
        return row_key(self.digest, self.turn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """The last time that a row was planned to run, and whether a batch with it was finished."""

    turn: Turn
    finished: bool


@dataclass(slots=True, kw_only=True)
class Tally:
    """How far a batch has come, in rows; `cost` is what its runs were charged so far, in USD.

    The bills of `not_final` of its runs may still come or change, so that the cost is at least so
    much; `quoted` is what those of them without a cost were quoted.

    A row that was `started` is counted once more as `completed`, `failed`, `active` or `lost`; the
    others are `refused`, `unresolved`, in `doubt` (sent, and no answer) or not started.
    """

    rows: int = 0
    started: int = 0
    active: int = 0
    completed: int = 0
    failed: int = 0
    lost: int = 0
    refused: int = 0
    unresolved: int = 0
    doubt: int = 0
    cost: Decimal = Decimal(0)
    quoted: Decimal = Decimal(0)
    not_final: int = 0
    next_check_at: datetime | None = None

    @property
    def cost_final(self) -> bool:
        """Whether no bill of its runs is expected to change."""
        return self.not_final == 0

    @property
    def ended(self) -> int:
        """Rows whose run is not waited for any more."""
        return self.started - self.active

    @property
    def unstarted(self) -> int:
        """Rows of which no run is known."""
        return self.rows - self.started


async def keep(db: Database, batch: BatchRow, entries: Sequence[BatchEntry]) -> None:
    """Keep a batch with its rows, or bring what is kept up to date, and open it again.

    A row never goes back to an earlier turn.
    """
    insert: Any = postgresql.insert if db.dialect == "postgresql" else sqlite.insert
    new = insert(batches)
    new = new.on_conflict_do_update(
        index_elements=[batches.c.batch_id],
        set_={
            "name": new.excluded.name,
            "finished_at": None,
            "mapping": func.coalesce(batches.c.mapping, new.excluded.mapping),
        },
    )
    rows = insert(batch_rows)
    rows = rows.on_conflict_do_update(
        index_elements=[batch_rows.c.batch_id, batch_rows.c.position],
        set_={name: rows.excluded[name] for name in ("line", "attempt", "idempotency_key")},
        where=rows.excluded.attempt >= batch_rows.c.attempt,
    )
    values = [_values(batch.batch_id, entry) for entry in entries]
    header = {
        "batch_id": batch.batch_id,
        "workspace_slot": batch.workspace_slot,
        "technique_id": batch.technique_id,
        "name": batch.name,
        "created_at": batch.created_at,
        "finished_at": None,
        "mapping": batch.mapping,
    }

    def work(connection: Connection) -> None:
        connection.execute(new, header)
        if values:
            connection.execute(rows, values)

    await db.write(work)


async def finish(db: Database, batch_id: str, at: datetime) -> None:
    """Note that a command has seen the batch to its end."""
    statement = update(batches).where(batches.c.batch_id == batch_id).values(finished_at=at)
    await db.write(lambda connection: connection.execute(statement).rowcount)


async def get(db: Database, batch_id: str) -> BatchRow | None:
    """The batch of that id; `None` where there is none."""
    async with db.read() as connection:
        statement = select(batches).where(batches.c.batch_id == batch_id)
        found = (await connection.execute(statement)).first()
    return None if found is None else BatchRow(**found._asdict())


async def list_batches(
    db: Database, *, cursor: str | None = None, limit: int
) -> tuple[list[BatchRow], str | None]:
    """A page of batches, newest first, and the cursor of the next page.

    Raises `InvalidRequest`, naming the field, for a cursor that was not given out here.
    """
    key = (batches.c.created_at, batches.c.batch_id)
    statement = (
        select(batches)
        .where(*cursors.after(key, cursor))
        .order_by(*(each.desc() for each in key))
        .limit(limit + 1)
    )
    async with db.read() as connection:
        found = [BatchRow(**row._asdict()) for row in await connection.execute(statement)]
    page, more = found[:limit], len(found) > limit
    return page, cursors.at(page[-1].created_at, page[-1].batch_id) if more else None


async def entries(
    db: Database, batch_id: str, *, after: int = 0, limit: int | None = None
) -> list[BatchEntry]:
    """The rows of a batch, as they stand in its sheet: those after a position, so many at most."""
    statement = (
        select(batch_rows)
        .where(batch_rows.c.batch_id == batch_id, batch_rows.c.position > after)
        .order_by(batch_rows.c.position)
        .limit(limit)
    )
    async with db.read() as connection:
        return [
            BatchEntry(
                position=row.position,
                line=row.line,
                digest=row.row_digest,
                turn=Turn(row.generation, row.attempt),
            )
            for row in await connection.execute(statement)
        ]


async def latest_turns(db: Database, slot: str, digests: Sequence[str]) -> dict[str, Latest]:
    """Of those rows that any batch of the workspace has had: the last turn of each."""
    found: dict[str, Latest] = {}
    async with db.read() as connection:
        for some in chunks(digests):
            statement = (
                select(
                    batch_rows.c.row_digest,
                    batch_rows.c.generation,
                    batch_rows.c.attempt,
                    batches.c.finished_at,
                )
                .join(batches)
                .where(batches.c.workspace_slot == slot, batch_rows.c.row_digest.in_(some))
            )
            for digest, generation, attempt, finished_at in await connection.execute(statement):
                _take_later(
                    found, digest, Turn(generation, attempt), finished=finished_at is not None
                )
    return found


async def mappings(
    db: Database, workspace_id: str, technique_id: str
) -> list[tuple[tuple[str, str, str], ...]]:
    """How the batches of a technique have mapped columns to inputs, the newest first, each once."""
    statement = (
        select(batches.c.mapping)
        .where(
            batches.c.workspace_slot == workspace_id,
            batches.c.technique_id == technique_id,
            batches.c.mapping.is_not(None),
        )
        .order_by(batches.c.created_at.desc(), batches.c.batch_id.desc())
        .limit(MAPPINGS)
    )
    async with db.read() as connection:
        rows = (await connection.execute(statement)).scalars()
        found = [tuple((one[0], one[1], one[2]) for one in mapping) for mapping in rows]
    return list(dict.fromkeys(found))


async def asked_without_mapping(
    db: Database, workspace_id: str, technique_id: str
) -> list[list[list[Input]]]:
    """What rows asked for, which older versions started without keeping their batch's mapping:
    the inputs of each, in one list for all batches that had the same inputs."""
    statement = (
        select(batches.c.batch_id, starts.c.inputs)
        .join(batch_rows)
        .join(
            starts,
            and_(
                starts.c.workspace_slot == batches.c.workspace_slot,
                starts.c.idempotency_key == batch_rows.c.idempotency_key,
            ),
        )
        .where(
            batches.c.workspace_slot == workspace_id,
            batches.c.technique_id == technique_id,
            batches.c.mapping.is_(None),
            starts.c.state.not_in((StartState.STORED, StartState.REFUSED)),
        )
    )
    of_batches: dict[str, list[list[Input]]] = {}
    async with db.read() as connection:
        for batch_id, inputs in await connection.execute(statement):
            of_batches.setdefault(batch_id, []).append(inputs)
    found: dict[frozenset[tuple[str, str]], list[list[Input]]] = {}
    for rows in of_batches.values():
        named = frozenset((one["id"], one["type"]) for inputs in rows for one in inputs)
        found.setdefault(named, []).extend(rows)
    return list(found.values())


async def tallies(db: Database, batch_ids: Sequence[str]) -> dict[str, Tally]:
    """How far each of the batches has come."""
    found = {batch_id: Tally() for batch_id in batch_ids}
    async with db.read() as connection:
        for row in await connection.execute(tally_of(batch_ids)):
            _count(found[row.batch_id], row)
    return found


def tally_of(batch_ids: Sequence[str]) -> Select[Any]:
    """The rows of batches, counted by what became of them."""
    told = (batch_rows.c.batch_id, starts.c.state, runs.c.status, runs.c.tracking)
    return (
        select(
            *told,
            func.count().label("count"),
            func.sum(runs.c.charged_cost).label("cost"),
            func.count(runs.c.run_id).filter(~runs.c.cost_final).label("not_final"),
            func.sum(runs.c.quoted_cost)
            .filter(~runs.c.cost_final, runs.c.charged_cost.is_(None))
            .label("quoted"),
            func.min(runs.c.next_check_at).label("next_check_at"),
        )
        .select_from(batch_rows)
        .join(batches)
        .outerjoin(
            starts,
            and_(
                starts.c.workspace_slot == batches.c.workspace_slot,
                starts.c.idempotency_key == batch_rows.c.idempotency_key,
            ),
        )
        .outerjoin(runs, runs.c.run_id == starts.c.run_id)
        .where(batch_rows.c.batch_id.in_(batch_ids))
        .group_by(*told)
    )


def chunks(values: Iterable[T]) -> Iterator[list[T]]:
    """The values in lists short enough for one statement."""
    left = iter(values)
    while some := list(islice(left, AT_ONCE)):
        yield some


def _values(batch_id: str, entry: BatchEntry) -> dict[str, Any]:
    return {
        "batch_id": batch_id,
        "position": entry.position,
        "line": entry.line,
        "row_digest": entry.digest,
        "generation": entry.turn.generation,
        "attempt": entry.turn.attempt,
        "idempotency_key": entry.key,
    }


def _take_later(found: dict[str, Latest], digest: str, turn: Turn, *, finished: bool) -> None:
    """Keep the later of two turns; a generation is finished where any batch with it is."""
    known = found.get(digest)
    if known is not None and known.turn.generation == turn.generation:
        found[digest] = Latest(turn=max(known.turn, turn), finished=known.finished or finished)
    elif known is None or known.turn < turn:
        found[digest] = Latest(turn=turn, finished=finished)


def _count(tally: Tally, row: Any) -> None:
    tally.rows += row.count
    match row.state:
        case StartState.STARTED:
            tally.started += row.count
        case StartState.REFUSED:
            tally.refused += row.count
        case StartState.UNRESOLVED:
            tally.unresolved += row.count
        case StartState.SENT | StartState.IN_DOUBT:
            tally.doubt += row.count
    if row.tracking == Tracking.ACTIVE:
        tally.active += row.count
        moments = (tally.next_check_at, row.next_check_at)
        tally.next_check_at = min((one for one in moments if one is not None), default=None)
    elif row.tracking == Tracking.LOST:
        tally.lost += row.count
    elif row.status == RunStatus.COMPLETED:
        tally.completed += row.count
    elif row.tracking == Tracking.SETTLED:
        tally.failed += row.count
    # A sum of doubles has digits that no price has.
    tally.cost += round(row.cost or Decimal(0), 6)
    tally.quoted += round(row.quoted or Decimal(0), 6)
    tally.not_final += row.not_final
