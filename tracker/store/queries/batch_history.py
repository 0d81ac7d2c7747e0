"""What earlier batches did with the same rows and columns, for the plan of the next one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import and_, select

from tracker.core.row_key import Input, Turn
from tracker.store.engine import Database
from tracker.store.queries.batches import chunks
from tracker.store.queries.starts import StartState
from tracker.store.schema import batch_rows, batches, starts

MAPPINGS: Final = 200
"""Batches of a technique whose column mapping is compared with a new sheet's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """The last turn of a row, and whether a batch with it was finished."""

    turn: Turn
    finished: bool


async def latest_turns(db: Database, slot: str, digests: Sequence[str]) -> dict[str, Latest]:
    """The last turn of each of these rows that any batch of the workspace had."""
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
    async with db.read() as connection:
        rows = (await connection.execute(statement)).scalars()
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


def _take_later(found: dict[str, Latest], digest: str, turn: Turn, *, finished: bool) -> None:
    """Keep the later turn; a generation is finished if any batch with it is."""
    known = found.get(digest)
    if known is not None and known.turn.generation == turn.generation:
        found[digest] = Latest(turn=max(known.turn, turn), finished=known.finished or finished)
    elif known is None or known.turn < turn:
        found[digest] = Latest(turn=turn, finished=finished)
