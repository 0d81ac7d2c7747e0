"""`tracker` with short waits; its commands are the real ones.

Run as `python -m tests.e2e.short_waits COMMAND…`.
"""

import asyncio
import time
from datetime import timedelta
from functools import partial
from typing import Any

from apscheduler.triggers.interval import IntervalTrigger

from tests.support.patience import always_wait_longer_for_the_database
from tracker import services, worker
from tracker.cli import main
from tracker.delivering.webhooks import DeliveryTimes
from tracker.polling import poll
from tracker.polling.reading import Backoff
from tracker.starting import recover, sending
from tracker.store.queries import batches, starts
from tracker.web.http import server
from tracker.worker import WorkerTimes
from tracker.workspaces import DatabaseWaits

SPEED = 50.0
KEYS_KEPT = 16.0
"""Seconds, not two hours, for which FLORA remembers a key in tests about that."""


async def short_sleep(seconds: float) -> None:
    """Sleep `SPEED` times shorter."""
    await asyncio.sleep(seconds / SPEED)


async def short_pause(seconds: float) -> None:
    """A short sleep that is long enough for a process that waits for another one's start."""
    await asyncio.sleep(seconds and max(seconds / SPEED, 0.05))


def clock() -> float:
    """A monotonic clock that runs `SPEED` times faster."""
    return time.monotonic() * SPEED


class ShortWaits(DatabaseWaits):
    """Waits that FLORA asked for, shared between processes and as short as the client's own."""

    async def left(self) -> float:
        return await super().left() * SPEED

    async def share(self, seconds: float) -> None:
        await super().share(seconds / SPEED)


class ShortBackoff(Backoff):
    """Pauses of a workspace, at least as long as its client's wait, which is in that one's time."""

    def failed(self, name: str, *, least: float = 0.0) -> float:
        return super().failed(name, least=least / SPEED)


def shorten_waits(*, patient: bool = True) -> None:
    """Clients and starts wait a fiftieth, and a killed process holds a start or a batch for two
    seconds, not thirty. The database is waited for longer, unless the test is about that."""
    if patient:
        always_wait_longer_for_the_database()
    shorten(sending, HELD_FOR=timedelta(seconds=2))
    shorten(batches, LEASE=timedelta(seconds=2))
    services.FloraClient = partial(services.FloraClient, monotonic=clock, sleep=short_sleep)  # type: ignore
    services.DatabaseWaits = ShortWaits  # type: ignore[misc]
    poll.Backoff = ShortBackoff  # type: ignore[misc]
    services.Starter = partial(services.Starter, sleep=short_pause)  # type: ignore
    services.Batches = partial(services.Batches, sleep=short_pause)  # type: ignore
    services.BatchWorker = partial(  # type: ignore
        services.BatchWorker,
        check_every=0.3,
        finish_every=0.3,
        renew_after=0.5,
        go_on_after=timedelta(seconds=0.5),
    )


def shorten_all_waits(*, patient: bool = True) -> None:
    """Also leases, the interval of recovery and compaction, and the grace period of the server."""
    shorten_waits(patient=patient)
    soon = timedelta(seconds=0.4)
    # Where the machine is busy, all that is done before a start is sent takes most of a second. A
    # lease that expires meanwhile leaves the start in doubt.
    shorten(sending, HELD_FOR=timedelta(seconds=1.5))
    shorten(batches, LEASE=soon)
    shorten_searches()
    services.BatchWorker = partial(services.BatchWorker, renew_after=0.1)  # type: ignore
    shorten(sending, RENEW_AFTER=0.1)
    shorten_leases(soon, renew_after=0.1)
    services.CatalogueSync = partial(services.CatalogueSync, lease=soon)  # type: ignore
    times = WorkerTimes(round_every=0.2, recover_every=soon)
    worker.Worker = partial(worker.Worker, times=times)  # type: ignore
    worker.CronTrigger = every_second  # type: ignore[assignment,misc]
    shorten(server, GRACE_SECONDS=1)
    shorten_webhooks(patient=patient)
    services.RollupCompactor = partial(services.RollupCompactor, delay=0.2)  # type: ignore


def shorten_searches() -> None:
    """A run is listed within a second, and no clock is set back by as much."""
    second = timedelta(seconds=1)
    shorten(recover, LISTED_WITHIN=second)
    shorten(starts, SET_BACK=second)


def shorten_leases(lease: timedelta, *, renew_after: float) -> None:
    """What a killed process polled or swept is free after `lease`."""
    for name in ("Poller", "Sweeper"):
        kind = partial(getattr(services, name), lease=lease, renew_after=renew_after)
        setattr(services, name, kind)


def shorten_webhooks(*, patient: bool = True) -> None:
    """A claimed message is free again after a second, and failed attempts are repeated soon."""
    times = DeliveryTimes(
        lease=timedelta(seconds=1),
        tick=0.2,
        configure_every=1.0,
        last_commits=6.0 if patient else DeliveryTimes.last_commits,
    )
    waits = tuple(timedelta(seconds=seconds) for seconds in (0.5, 1, 2, 4, 8, 16, 32))
    services.Webhooks = partial(services.Webhooks, waits=waits, times=times)  # type: ignore


def shorten_key_memory() -> None:
    """Stop repeating a key after half of `KEYS_KEPT`."""
    shorten(recover, KEY_KEPT=timedelta(seconds=KEYS_KEPT / 2))


def shorten_doubt(times: float) -> None:
    """All that decides about a start in doubt takes so many times less, and keeps its proportions:
    reads, sweeps, and how long a run may be listed late, a callback come and a key be known."""
    names = ("LISTED_WITHIN", "KEY_KEPT", "CALLBACKS_WITHIN")
    shorten(recover, **{name: getattr(recover, name) / times for name in names})
    shorten(starts, SET_BACK=starts.SET_BACK / times)
    every = WorkerTimes(recover_every=WorkerTimes.recover_every / times)
    worker.Worker = partial(worker.Worker, times=every)  # type: ignore
    sweeps = IntervalTrigger(seconds=300 / times)
    worker.CronTrigger = lambda _: sweeps  # type: ignore[assignment,misc]


def every_second(_: str) -> IntervalTrigger:
    """A trigger that fires every second, whatever the cron expression."""
    return IntervalTrigger(seconds=1)


def shorten(module: Any, **times: Any) -> None:
    """Replace times of a module by shorter ones."""
    for name, value in times.items():
        assert getattr(module, name) > value, f"{module.__name__}.{name} is not longer"
        setattr(module, name, value)


if __name__ == "__main__":
    shorten_waits()
    main()
