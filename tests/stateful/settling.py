"""Once faults stop, everything settles with FLORA's true values, in few rounds and requests."""

from datetime import timedelta
from typing import Final

from tests.stateful.flora import WORKSPACE
from tests.stateful.promises import assert_true, snapshot
from tests.stateful.world import World

CALM: Final = 4 * 3600
"""Seconds, longer than every lease, pause and doubt, by either clock: ours is at most three hours
ahead."""
DAY: Final = 86400
ALL_OF_IT: Final = timedelta(days=365)
ROUNDS: Final = 6
"""Maximum number of polling rounds, each when the next run is due, until all known runs settle."""
READS: Final = 3
"""Maximum number of requests for each run and round."""


async def settle(world: World) -> None:
    """Stop all faults, end all runs, do the worker's jobs as time passes, and compare."""
    clocks, flora, services = world.clocks, world.flora, world.process.services
    flora.armed.clear()
    world.process.doom = None
    clocks.ahead = 0
    clocks.elapsed += CALM
    flora.work()
    for number, run in enumerate(flora.runs.values()):
        flora.go_on(run, ("completed", "failed")[number % 2])
    await services.applier.drain()
    before = flora.requests
    await services.recovery.recover()
    rounds = 0
    while await _open_runs(world):
        rounds += 1
        assert rounds <= ROUNDS, "known runs do not settle"
        await _poll(world)
        due = await services.poller.next_due_at()
        if due is not None:
            clocks.elapsed += max((due - clocks.ours()).total_seconds(), 1)
    # Unreported runs are found by the next sweep; generations are searched once a day.
    clocks.elapsed += DAY
    await world.sweep()
    await _poll(world)
    await _recheck(world)
    world.figures["most rounds"] = max(world.figures["most rounds"], rounds)
    await _compare(world)
    verdict = await services.verifier.verify(world.workspace, since=ALL_OF_IT)
    assert verdict.good, verdict
    assert verdict.compared == len(flora.runs)
    unknown = len(world.memory.records.keys() - flora.runs.keys())
    bound = READS * (len(flora.runs) + unknown + 1) * (rounds + 2)
    assert flora.requests - before <= bound, f"{flora.requests - before} requests: {bound} do"


async def _open_runs(world: World) -> bool:
    now = await snapshot(world.process.services.database)
    return any(
        not record.run.settled
        for run_id, record in now.records.items()
        if run_id in world.flora.runs
    )


async def _poll(world: World) -> None:
    while (await world.process.services.poller.poll_due()).more:
        pass


async def _recheck(world: World) -> None:
    """Read bills again as a worker does, until all are final."""
    clocks, poller = world.clocks, world.process.services.poller
    for _ in range(ROUNDS):
        while (await poller.recheck_due()).more:
            pass
        clocks.elapsed += 120


async def _compare(world: World) -> None:
    """Every run of FLORA is settled with its true values, and every start has an outcome."""
    now = await snapshot(world.process.services.database)
    for run_id, truth in world.flora.runs.items():
        assert run_id in now.records, f"{run_id} is lost"
        record = now.records[run_id]
        assert record.run.settled, f"{run_id} does not settle"
        assert record.cost_final, f"the bill of {run_id} is not final"
        assert record.recheck_at is None
        assert_true(record, truth)
        assert (record.run.workspace_id, record.run.run_type) == (WORKSPACE, truth.run_type)
        assert record.run.technique_id == truth.technique_id
    for key, row in now.starts.items():
        paid = any(run.key == key for run in world.flora.runs.values())
        assert (
            row.state in ("started", "unresolved") if paid else ("refused", "unresolved", "started")
        )
