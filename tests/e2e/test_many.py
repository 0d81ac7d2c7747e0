"""Several receivers and workers on one PostgreSQL, some with wrong clocks, some killed."""

from pathlib import Path

import pytest

from tests.e2e.many import endure
from tracker.worker import WorkerTimes


@pytest.mark.timeout(120)
async def test_many_processes_do_everything_once(
    tmp_path: Path, postgres_url: str, thorough: bool
) -> None:
    """With two receivers and two workers, whose clocks lie four minutes apart, and one of each
    killed on the way: every run is started once and ends up true, no claim and no lease is taken
    from who has it, no run is read twice, no two sweeps go on at once, and no look is late by a
    tick."""
    figures = await endure(
        postgres_url, tmp_path, receivers=2, workers=2, runs=80 if thorough else 30
    )
    assert figures.broken == []
    # Of a few runs, one worker may be the first each time.
    assert len(figures.seen.claimed_by) in ((2,) if thorough else (1, 2))
    assert figures.seen.late[-1] < WorkerTimes.tick
