"""Webhooks out, by real processes that are killed."""

from pathlib import Path

import pytest

from tests.e2e.hooks import outage
from tests.e2e.processes import open_sandbox
from tests.e2e.short_waits import shorten_webhooks
from tests.support.patience import always_wait_longer_for_the_database
from tracker.store.engine import Database


def prepare() -> None:
    """Messages that are not taken are sent again soon."""
    always_wait_longer_for_the_database()
    shorten_webhooks()


@pytest.mark.thorough
@pytest.mark.timeout(120)
async def test_every_run_arrives_through_an_outage_and_kills(
    tmp_path: Path, database_url: str, database: Database
) -> None:
    """Each run's message arrives at an endpoint that was down, under one id and not before the run
    is settled, although the tracker is killed three times; and at another one. (Outages:
    tests/delivering/test_webhooks.py; kills: the crash points and test_handlers.py.)

    `python -m bench.soak_hooks` is the same with a thousand runs in five minutes, and measures how
    late messages come."""
    async with open_sandbox(tmp_path, database_url, prepare=prepare) as sandbox:
        down, up = await outage(sandbox, database, runs=60, seconds=4, kills=3, within=60)
    assert down.runs == 60
    assert (down.broken, up.broken) == ([], [])
