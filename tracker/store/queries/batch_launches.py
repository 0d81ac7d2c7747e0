"""Batches that a worker launches, and what earlier batches say about the rows of a new one.

`launch_at` is when a batch is due; it is null for one that is launched. Whoever holds its lease
launches it, and ends that with `end` if the batch was not ordered anew or stopped meanwhile:
either changes `launch_at`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, and_, or_, select, update

from tracker.core.inputs import Input, Turn
from tracker.store.engine import Database
from tracker.store.queries import audit
from tracker.store.queries.batches import (
    BATCH_COLUMNS,
    BatchRow,
    batch_counts,
    is_start_of,
    keep_errors,
)
from tracker.store.queries.paging import chunks
from tracker.store.queries.starts import StartState
from tracker.store.schema import LONGEST_LEASE, batch_rows, batches, is_free, starts

LEASE: Final = timedelta(seconds=30)
"""How long the lease of a process that died lasts; a living one renews it."""

_OPEN: Final = and_(batches.c.launch.is_not(None), batches.c.finished_at.is_(None))


async def claim_due(
    db: Database, workspaces: Collection[str], *, holder: str, now: datetime, limit: int
) -> list[BatchRow]:
    """Lease at most `limit` due batches of these workspaces, those that wait longest first."""
    due = (
        select(batches.c.batch_id)
        .where(
            _OPEN,
            or_(batches.c.launch_at <= now, batches.c.launch_at > now + LONGEST_LEASE),
            batches.c.workspace_slot.in_(workspaces),
            is_free(batches, now),
        )
        .order_by(batches.c.launch_at)
        .limit(limit)
    )
    if not workspaces or await db.fetchrow(due.limit(1)) is None:  # which takes no lock
        return []
    statement = (
        update(batches)
        .where(batches.c.batch_id.in_(due.with_for_update(skip_locked=True)))
        .values(lease_until=now + LEASE, lease_holder=holder, stopped=None)
        .returning(*BATCH_COLUMNS)
    )

    def work(connection: Connection) -> list[BatchRow]:
        return [BatchRow(**row._asdict()) for row in connection.execute(statement)]

    return await db.write(work)


async def renew(
    db: Database, batch: BatchRow, *, holder: str, now: datetime, waits: str | None = None
) -> bool:
    """Renew the lease; false if it is lost, or the batch was ordered anew or stopped.

    `waits` is what the launch waits for.
    """
    renewed = update(batches).where(_held(batch, holder))
    statement = renewed.values(lease_until=now + LEASE, stopped=waits)
    return await db.write(lambda connection: connection.execute(statement).rowcount) == 1


async def release(db: Database, batch: BatchRow, *, holder: str) -> None:
    """Release the lease; the batch stays due."""
    statement = (
        update(batches)
        .where(batches.c.batch_id == batch.batch_id, batches.c.lease_holder == holder)
        .values(lease_until=None, lease_holder=None)
    )
    await db.write(lambda connection: connection.execute(statement).rowcount)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEnd:
    """How a launch ended: `launch_at` is when to go on, `stopped` why it ended early; `errors` are
    why rows could not be tried, by position."""

    launch_at: datetime | None
    stopped: str | None
    errors: Mapping[int, str]


async def end(db: Database, batch: BatchRow, ended: LaunchEnd, *, holder: str) -> bool:
    """Store how a launch ended and release the lease; false, and nothing is stored, if the lease is
    lost or the batch was ordered anew or stopped."""
    header = (
        update(batches)
        .where(_held(batch, holder))
        .values(
            launch_at=ended.launch_at, stopped=ended.stopped, lease_until=None, lease_holder=None
        )
    )

    def work(connection: Connection) -> bool:
        if connection.execute(header).rowcount == 0:
            return False
        keep_errors(connection, batch.batch_id, ended.errors)
        return True

    return await db.write(work)


async def stop(db: Database, batch_id: str, why: str, *, noted: Mapping[str, Any]) -> bool:
    """Start no further row of a batch that a worker launches; false if there is none to start.

    `noted` is an entry of the audit log.
    """
    statement = (
        update(batches)
        .where(batches.c.batch_id == batch_id, _OPEN, batches.c.launch_at.is_not(None))
        .values(launch_at=None, stopped=why)
    )
    return await db.write(lambda connection: audit.execute_noted(connection, statement, noted))


async def finish_ended(db: Database, now: datetime) -> int:
    """Close launched batches whose runs have all ended; returns how many."""
    launched = (_OPEN, batches.c.launch_at.is_(None), batches.c.stopped.is_(None))
    ids = await db.fetchcol(select(batches.c.batch_id).where(*launched))
    if not ids:
        return 0
    counts = await batch_counts(db, ids)
    ended = [one for one, count in counts.items() if count.active == count.doubt == 0]
    if not ended:
        return 0
    statement = (
        update(batches).where(batches.c.batch_id.in_(ended), *launched).values(finished_at=now)
    )
    return await db.write(lambda connection: connection.execute(statement).rowcount)


def _held(batch: BatchRow, holder: str) -> ColumnElement[bool]:
    return and_(
        batches.c.batch_id == batch.batch_id,
        batches.c.lease_holder == holder,
        batches.c.launch_at == batch.launch_at,
    )


# What earlier batches did with the same rows and columns, for the plan of the next one.

MAPPINGS: Final = 200
"""Batches of a technique whose column mapping is compared with a new sheet's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """The last turn of a row, and whether a batch with it was finished."""

    turn: Turn
    finished: bool


async def latest_turns(db: Database, slot: str, digests: Sequence[str]) -> dict[str, Latest]:
    """The last turn of each of these rows that any batch of the workspace had; its generation is
    finished if any batch with it is."""
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
            for digest, *numbers, finished_at in await connection.execute(statement):
                turn, known = Turn(*numbers), found.get(digest)
                finished = finished_at is not None
                if known is not None and known.turn.generation == turn.generation:
                    turn, finished = max(known.turn, turn), known.finished or finished
                elif known is not None and known.turn > turn:
                    continue
                found[digest] = Latest(turn=turn, finished=finished)
    return found


async def mappings(
    db: Database, workspace_id: str, technique_id: str
) -> list[tuple[tuple[str, str, str], ...]]:
    """The distinct column mappings of a technique's batches, newest first."""
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
    rows = await db.fetchcol(statement)
    found = [tuple((one[0], one[1], one[2]) for one in mapping) for mapping in rows]
    return list(dict.fromkeys(found))


async def asked_without_mapping(
    db: Database, workspace_id: str, technique_id: str
) -> list[list[list[Input]]]:
    """Inputs of rows that older versions started without storing the batch's mapping: one list for
    all batches with the same inputs."""
    statement = (
        select(batches.c.batch_id, starts.c.inputs)
        .join(batch_rows)
        .join(starts, is_start_of(batch_rows))
        .where(
            batches.c.workspace_slot == workspace_id,
            batches.c.technique_id == technique_id,
            batches.c.mapping.is_(None),
            starts.c.state.not_in((StartState.STORED, StartState.REFUSED)),
        )
    )
    of_batches: dict[str, list[list[Input]]] = {}
    for batch_id, inputs in await db.fetch(statement):
        of_batches.setdefault(batch_id, []).append(inputs)
    found: dict[frozenset[tuple[str, str]], list[list[Input]]] = {}
    for rows in of_batches.values():
        named = frozenset((one["id"], one["type"]) for inputs in rows for one in inputs)
        found.setdefault(named, []).extend(rows)
    return list(found.values())
