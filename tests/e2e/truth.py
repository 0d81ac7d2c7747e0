"""What the simulator knows against what the database says."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import sqlalchemy as sa

from tracker.simulator import Simulator
from tracker.store.engine import Database
from tracker.store.schema import run_outputs, runs, starts


async def settled_runs(database: Database) -> int:
    """How many runs are settled."""
    async with database.read() as connection:
        query = sa.select(sa.func.count()).where(runs.c.tracking == "settled")
        return (await connection.execute(query)).scalar_one()


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What FLORA's own record of keys and runs says against the start log. `paid_twice` and `wrong`
    are keys, `told_wrong` those whose callers were told of another run, `unresolved` those that are
    left to a person."""

    started: frozenset[str]
    states: Counter[str]
    paid_twice: list[str]
    wrong: list[str]
    told_wrong: list[str]
    unresolved: list[str]


async def keys_of(database: Database, flora: Simulator, told: Mapping[str, str]) -> Keys:
    """Which run each key started; `told` are the runs that callers were answered with."""
    started_with = flora.world.started_with
    async with database.read() as connection:
        rows = (await connection.execute(sa.select(starts))).all()
    return Keys(
        started=frozenset(started_with.values()),
        states=Counter(row.state for row in rows),
        paid_twice=[key for key, count in Counter(started_with.values()).items() if count > 1],
        wrong=[
            row.idempotency_key
            for row in rows
            if row.run_id is not None and started_with.get(row.run_id) != row.idempotency_key
        ],
        told_wrong=[key for key, run_id in told.items() if started_with.get(run_id) != key],
        unresolved=[row.idempotency_key for row in rows if row.state == "unresolved"],
    )


async def true_records(simulator: str) -> dict[str, dict[str, Any]]:
    """The simulator's own records, by run id."""
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        answer = await client.get(f"{simulator}/simulator/runs")
    return {record["run_id"]: record for record in answer.json()["runs"]}


async def assert_all_true(database: Database, simulator: str) -> None:
    """Every run of the simulator is settled with its own status, outputs, cost, error and times."""
    truth = await true_records(simulator)
    async with database.read() as connection:
        rows = (await connection.execute(sa.select(runs))).mappings().all()
        order = (run_outputs.c.run_id, run_outputs.c.position)
        outputs = (await connection.execute(sa.select(run_outputs).order_by(*order))).all()
    made: dict[str, list[dict[str, str]]] = {}
    for output in outputs:
        made.setdefault(output.run_id, []).append(
            {"output_id": output.output_id, "type": output.type, "url": output.url}
        )
    assert {row["run_id"] for row in rows} == set(truth)
    for row in rows:
        # A run that had ended when it was started shows its quote, until its bill is read. Here the
        # simulator bills what it quotes.
        is_billed = row["charged_cost"] is not None or row["recheck_at"] is None
        cost = row["charged_cost"] if is_billed else row["quoted_cost"]
        end = truth[row["run_id"]]["end"]
        told = {
            "status": row["status"],
            "outputs": made.get(row["run_id"], []),
            "charged_cost": float(cost),
            "error_code": row["error_code"],
            "error_message": row["error_message"],
            **{name: _ms(row[name]) for name in ("created_at", "started_at", "completed_at")},
        }
        assert told == {
            "status": end["status"],
            "outputs": end.get("outputs", []),
            "charged_cost": end["charged_cost"],
            "error_code": end.get("error_code"),
            "error_message": end.get("error_message"),
            **{name: end.get(name) for name in ("created_at", "started_at", "completed_at")},
        }
        assert row["tracking"] == "settled"
        assert not row["conflict"]


def _ms(moment: Any) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1000)
