"""A run's row is its timeline merged again, whatever was seen, by whom and in which order."""

import asyncio
import random
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.making import TestWriter, as_entry, merge_timeline, observations, open_writer
from tracker.core.observation import Observation, merge
from tracker.core.run import RunState
from tracker.store.engine import Database
from tracker.store.queries.runs import get_run
from tracker.store.writing.writer import cleaned

RUNS = ("run_1", "run_2", "run_3")
observed = st.lists(st.sampled_from(RUNS).flatmap(observations), min_size=1, max_size=12)


def by_hand(run_id: str, observed: list[Observation]) -> RunState | None:
    """What these observed amount to, by the merge alone."""
    run = None
    for observation in observed:
        if observation.run_id == run_id:
            run = merge(run, cleaned(observation))
    return run


@pytest.mark.one_database("sqlite")
@pytest.mark.timeout(180)
@given(observed=observed, size=st.integers(1, 12))
@settings(
    max_examples=max(10, settings().max_examples * 3 // 10),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_the_row_is_the_merge_of_its_events(
    writer: TestWriter, db: Database, observed: list[Observation], size: int
) -> None:
    """Row, stored timeline and merge agree, however the observed fall into batches."""
    example = uuid4()
    observed = [_renamed(each, f"{example}_{each.run_id}") for each in observed]
    entries = [as_entry(each) for each in observed]
    for begin in range(0, len(entries), size):
        await writer.submit_all(entries[begin : begin + size])
    for run_id in {each.run_id for each in observed}:
        record = await get_run(db, run_id)
        assert record is not None
        assert record.run == by_hand(run_id, observed)
        assert record.run == await merge_timeline(db, run_id)


@pytest.mark.one_database("postgres")
@given(observed=st.lists(observations("run"), min_size=30, max_size=60), seed=st.integers(0, 999))
@settings(
    max_examples=max(3, settings().max_examples // 16),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_two_writers_lose_nothing(
    db: Database, other_db: Database, observed: list[Observation], seed: int
) -> None:
    """Two processes that see the same runs at the same time, in opposite orders, end up in one
    state: no deadlock, no update lost, and the timeline still merges to the row."""
    chance = random.Random(seed)
    names = [f"{uuid4()}_{number}" for number in range(8)]
    observed = [_renamed(each, chance.choice(names)) for each in observed]
    halves = [[as_entry(each) for each in observed[half::2]] for half in (0, 1)]
    halves[1].reverse()
    async with open_writer(db, max_group=5) as one, open_writer(other_db, max_group=4) as other:
        await asyncio.gather(one.submit_all(halves[0]), other.submit_all(halves[1]))
    for run_id in {each.run_id for each in observed}:
        record = await get_run(db, run_id)
        assert record is not None
        assert record.run == by_hand(run_id, observed)
        assert record.run == await merge_timeline(db, run_id)


def _renamed(observation: Observation, run_id: str) -> Observation:
    return Observation.from_json(observation.to_json() | {"run_id": run_id})
