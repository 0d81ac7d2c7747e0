"""Fixtures: a simulated FLORA whose runs take a moment, and trackers on the test's database."""

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from tests.support.waiting import NO_SWEEPS
from tracker import Tracker, services
from tracker.polling.follow import Follower
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running

INPUTS = {"prompt": "garden tools"}


@pytest.fixture(autouse=True)
def _polled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting program polls after 0.1 s in place of `OVERDUE`."""
    soon = partial(Follower, overdue_after=timedelta(seconds=0.1))
    monkeypatch.setattr(services, "Follower", soon)


@pytest.fixture
async def flora() -> AsyncIterator[Simulator]:
    """A FLORA whose runs take up to 0.4 s, and whose callbacks are all lost."""
    async with running(Options(failures=0.0, drop=1.0, run_seconds=0.3)) as simulator:
        yield simulator


MakeTracker = Callable[..., Tracker]


def _makes(flora: Simulator, database_url: str) -> MakeTracker:
    def make(*, worker: bool | None = None, **more: Any) -> Tracker:
        options = flora.world.options
        given: dict[str, Any] = {
            "flora_base_url": flora.base_url,
            "flora_api_key": options.api_key,
            "flora_webhook_secret": options.webhook_secret,
            "tracker_database_url": database_url,
            "tracker_poll_interval": 0.2,
            "tracker_reconcile_cron": NO_SWEEPS,
            "tracker_start_doubt": 1,
        }
        return Tracker(Settings(**(given | more)), worker=worker)

    return make


@pytest.fixture
def make_tracker(flora: Simulator, database_url: str) -> MakeTracker:
    """Makes trackers on that FLORA and a database, with any settings; they are not open."""
    return _makes(flora, database_url)


@pytest.fixture
async def small_tracker(flora: Simulator, sqlite_url: str) -> AsyncIterator[Tracker]:
    """An open tracker on SQLite, for what has nothing to do with the engine."""
    async with _makes(flora, sqlite_url)() as opened:
        yield opened


@pytest.fixture
async def tracker(make_tracker: MakeTracker) -> AsyncIterator[Tracker]:
    """An open tracker without a worker, as in a script."""
    async with make_tracker() as opened:
        yield opened
