"""`tracker`, with the waits that FLORA asks for made short: its commands run as they are.

What a client and a start wait for passes at fifty times the speed, and what a killed process held
is free after two seconds in place of ninety. Run as `python -m tests.e2e.hurried COMMAND…`.
"""

import asyncio
import time
from datetime import timedelta
from functools import partial

from tracker import wiring
from tracker.cli import main
from tracker.tracking import ledger

SPEED = 50.0


async def nap(seconds: float) -> None:
    """Sleep, but not for so long."""
    await asyncio.sleep(seconds / SPEED)


def clock() -> float:
    """A monotonic clock that goes as fast."""
    return time.monotonic() * SPEED


if __name__ == "__main__":
    assert timedelta(seconds=2) < ledger.HELD_FOR
    ledger.HELD_FOR = timedelta(seconds=2)  # type: ignore[misc]
    wiring.FloraClient = partial(wiring.FloraClient, monotonic=clock, sleep=nap)  # type: ignore
    wiring.Starter = partial(wiring.Starter, sleep=nap)  # type: ignore
    wiring.Batches = partial(wiring.Batches, sleep=nap)  # type: ignore
    main()
