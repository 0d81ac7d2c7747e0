"""`--wait`: follows a run in the database until nothing is left to learn of it.

Usually a server or a worker brings the news. Where a run stays overdue, none is running, and the
command polls what is due by itself.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from tracker.core.record import Record
from tracker.core.run import Tracking

if TYPE_CHECKING:
    from tracker.wiring import Services

LOOK_EVERY: Final = 0.5
"""Seconds between two looks into the database."""
OVERDUE: Final = timedelta(seconds=3)
"""A run that is due for longer is nobody's: workers look at once."""


async def follow(services: "Services", record: Record, *, tell: Callable[[str], None]) -> Record:
    """The run when it is settled or lost. `tell` hears of each change of status or progress."""
    from tracker.store import read

    told = None
    while True:
        line = f"{record.run.run_id} {record.run.status} {record.run.progress:g} %"
        if line != told:
            tell(line)
        told = line
        if record.tracking is not Tracking.ACTIVE:
            return record
        await asyncio.sleep(LOOK_EVERY)
        due = record.next_check_at
        if due is not None and services.clock() - due > OVERDUE:
            await services.poller.poll_due()
        record = await read.get_run(services.database, record.run.run_id) or record
