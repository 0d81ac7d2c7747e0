"""What clients and FLORA were told, and FLORA's own records, against what the database says."""

from collections import Counter
from dataclasses import dataclass

import sqlalchemy as sa

from tests.e2e.clients import OURS, Clients
from tests.e2e.truth import assert_all_true
from tests.store.making import merge_timeline
from tests.support.deliveries import applied
from tests.support.endpoint import Receiver
from tracker.simulator import Simulator
from tracker.store.engine import Database
from tracker.store.queries.runs import get_run
from tracker.store.schema import batch_rows, batches, deliveries, endpoints, runs, starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was acknowledged, and what of it was not held: `lost` and `paid_twice` name that.

    `unresolved` starts are those that the tracker says it cannot tell the run of.
    """

    deliveries: int
    starts: int
    unresolved: int
    runs: int
    lost: list[str]
    paid_twice: list[str]


async def judge(
    database: Database, flora: Simulator, clients: Clients, receiver: Receiver
) -> Verdict:
    """Every run is settled, true, and its timeline merged again; and what else was promised.

    Raises `AssertionError` where a run is not.
    """
    world = flora.world
    await applied(database)
    await assert_all_true(database, flora.root)
    for run_id in world.runs:
        record = await get_run(database, run_id)
        assert record is not None
        assert record.run == await merge_timeline(database, run_id)
    taken = Counter(sent.delivery_id for sent in world.deliveries if sent.accepted)
    # A generation was not started by anybody's key, and has no inputs.
    prompts = {name: run.inputs[0]["value"] for name, run in world.runs.items() if run.inputs}
    paid = Counter(prompt for prompt in prompts.values() if prompt.startswith(OURS))
    return Verdict(
        deliveries=taken.total() + len(clients.taken),
        starts=len(clients.started),
        unresolved=await starts_in(database, "unresolved"),
        runs=len(world.runs),
        lost=[
            *await _lost_deliveries(database, taken, clients.taken),
            *await _lost_starts(database, clients.started, prompts),
            *[f"message of {run_id}" for run_id in await unsent_runs(database, receiver)],
            *[f"signature of {got.message_id}" for got in receiver.got if not got.verified],
            *(clients.ordered - {*prompts.values(), *await _undecided_prompts(database)}),
        ],
        paid_twice=[prompt for prompt, count in paid.items() if count > 1],
    )


async def starts_in(database: Database, *states: str) -> int:
    """How many starts the start log has in these states."""
    query = sa.select(sa.func.count()).where(starts.c.state.in_(states))
    async with database.read() as connection:
        return (await connection.execute(query)).scalar_one()


async def batches_to_launch(database: Database) -> int:
    """How many ordered batches have rows without a start, or have ended and are not closed."""
    rows = sa.select(batch_rows.c.batch_id).outerjoin(
        starts, starts.c.idempotency_key == batch_rows.c.idempotency_key
    )
    unstarted = rows.where(sa.func.coalesce(starts.c.state, "stored") == "stored")
    query = sa.select(sa.func.count()).where(
        batches.c.launch.is_not(None),
        batches.c.finished_at.is_(None),
        sa.or_(batches.c.launch_at.is_(None), batches.c.batch_id.in_(unstarted)),
    )
    async with database.read() as connection:
        return (await connection.execute(query)).scalar_one()


async def _undecided_prompts(database: Database) -> list[str]:
    """The prompts of starts whose outcome the tracker says it does not know."""
    query = sa.select(starts.c.inputs).where(starts.c.state.in_(("sent", "in_doubt", "unresolved")))
    async with database.read() as connection:
        return [inputs[0]["value"] for inputs in (await connection.execute(query)).scalars()]


async def undecided_starts(database: Database, flora: Simulator) -> int:
    """How many starts are sent or in doubt, and will be known by themselves.

    One whose run has called back to nobody is not: it is left to a person when its key is
    forgotten.
    """
    query = sa.select(starts.c.inputs).where(starts.c.state.in_(("sent", "in_doubt")))
    async with database.read() as connection:
        rows = (await connection.execute(query)).scalars().all()
    heard = {one.run_id for one in flora.world.deliveries if one.accepted}
    silent = [
        run.inputs[0]["value"]
        for run in flora.world.runs.values()
        if run.inputs and run.run_id not in heard
    ]
    known = [inputs[0]["value"] for inputs in rows]
    # While such a run is there, no other start of its technique is sent again either.
    return 0 if any(prompt in silent for prompt in known) else len(known)


async def unsent_runs(database: Database, receiver: Receiver) -> list[str]:
    """The runs that ended after the only endpoint was configured, and whose end it did not take."""
    since = sa.select(endpoints.c.since).scalar_subquery()
    ended = sa.func.coalesce(runs.c.completed_at, runs.c.end_seen_at)
    query = sa.select(runs.c.run_id).where(runs.c.tracking == "settled", ended >= since)
    async with database.read() as connection:
        settled = (await connection.execute(query)).scalars().all()
    taken = receiver.runs
    return [run_id for run_id in settled if run_id not in taken]


async def _lost_deliveries(
    database: Database, taken: Counter[str], not_understood: set[str]
) -> list[str]:
    """FLORA's deliveries that were answered 2xx more often than they are counted, or are without
    their effect, and others that are not there."""
    received = sa.select(deliveries.c.delivery_id, deliveries.c.receipts)
    applied = received.where(deliveries.c.run_id == runs.c.run_id, runs.c.callback_at.is_not(None))
    async with database.read() as connection:
        kept = Counter(dict((await connection.execute(received)).all()))
        effective = Counter(dict((await connection.execute(applied)).all()))
    return [*(taken - effective), *(not_understood - kept.keys())]


async def _lost_starts(
    database: Database, told: dict[str, str], prompts: dict[str, str]
) -> list[str]:
    """Starts that a client was told of and that the start log does not have so, and starts that
    have another run there."""
    query = sa.select(starts.c.idempotency_key, starts.c.run_id, starts.c.inputs)
    async with database.read() as connection:
        rows = (await connection.execute(query)).all()
    kept = {row.idempotency_key: row.run_id for row in rows}
    lost = [key for key, run_id in told.items() if kept.get(key) != run_id]
    return lost + [
        row.idempotency_key
        for row in rows
        if row.run_id is not None and prompts[row.run_id] != row.inputs[0]["value"]
    ]
