"""`tracker`, with its waits made short: its commands run as they are.

Run as `python -m tests.e2e.hurried COMMAND…`.
"""

import asyncio
import time
from datetime import timedelta
from functools import partial
from typing import Any

from apscheduler.triggers.interval import IntervalTrigger

from tracker import services as wiring
from tracker.cli import main
from tracker.polling import poll, sweep
from tracker.polling.workspaces import DatabaseWaits
from tracker.starting import catalogue as sync
from tracker.starting import held_start as ledger
from tracker.starting import recover
from tracker.store.writing import rollups as tally_keeper
from tracker.web.http import server
from tracker.worker import scheduler

SPEED = 50.0
KEYS_KEPT = 16.0
"""Seconds for which FLORA remembers a key in place of two hours, where that is to be seen."""


async def nap(seconds: float) -> None:
    """Sleep, but not for so long."""
    await asyncio.sleep(seconds / SPEED)


async def doze(seconds: float) -> None:
    """A nap, but not so short that who waits for another's start asks without a pause."""
    await asyncio.sleep(seconds and max(seconds / SPEED, 0.05))


def clock() -> float:
    """A monotonic clock that goes as fast."""
    return time.monotonic() * SPEED


class ShortWaits(DatabaseWaits):
    """Waits that FLORA asked for and other processes are told of, as short as the client's own."""

    async def left(self) -> float:
        return await super().left() * SPEED

    async def tell(self, seconds: float) -> None:
        await super().tell(seconds / SPEED)


def hurry() -> None:
    """What a client and a start wait for passes at fifty times the speed, and a start that a killed
    process held is free after two seconds in place of thirty."""
    shorten(ledger, HELD_FOR=timedelta(seconds=2))
    wiring.FloraClient = partial(wiring.FloraClient, monotonic=clock, sleep=nap)  # type: ignore
    wiring.DatabaseWaits = ShortWaits  # type: ignore[misc]
    wiring.Starter = partial(wiring.Starter, sleep=doze)  # type: ignore
    wiring.Batches = partial(wiring.Batches, sleep=doze)  # type: ignore


def hurry_much() -> None:
    """Besides, whatever a killed process held is free soon after, and what it left is looked for as
    often; and requests in flight at the end are not waited for as long."""
    hurry()
    soon = timedelta(seconds=0.4)
    shorten(ledger, HELD_FOR=soon)
    shorten(recover, LISTED_WITHIN=timedelta(seconds=1))
    for module in (poll, sweep, sync):
        shorten(module, LEASE=soon)
    for module in (ledger, poll, sweep):
        shorten(module, RENEW_AFTER=0.1)
    shorten(scheduler, GATHER=0.2, RECOVER_EVERY=soon)
    scheduler.cron_trigger = every_second  # type: ignore[assignment]
    shorten(server, GRACE=1)
    shorten(tally_keeper, LAST_FOLD_WITHIN=0.5)
    wiring.RollupCompactor = partial(wiring.RollupCompactor, gather=0.2)  # type: ignore


def forget_keys() -> None:
    """FLORA remembers a key for `KEYS_KEPT`: after a little less it is not sent again."""
    shorten(recover, KEY_KEPT=timedelta(seconds=KEYS_KEPT / 2))


def every_second(_: str) -> IntervalTrigger:
    """A trigger in place of one that a cron expression says."""
    return IntervalTrigger(seconds=1)


def shorten(module: Any, **times: Any) -> None:
    """Give times of a module shorter values."""
    for name, value in times.items():
        assert getattr(module, name) > value, f"{module.__name__}.{name} is not longer"
        setattr(module, name, value)


if __name__ == "__main__":
    hurry()
    main()
