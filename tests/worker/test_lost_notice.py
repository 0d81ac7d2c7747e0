"""A notification that nobody hears costs a tick, and no run."""

import math

from tests.store.making import callback, open_writer
from tests.support.waiting import eventually
from tests.worker.test_scheduler import swept, working
from tracker.core.clock import utc_now
from tracker.simulator import Options, running
from tracker.store.coordination import Signals
from tracker.store.engine import Database
from tracker.store.queries.runs import get_run
from tracker.worker import WorkerTimes

TICK = 0.5


async def test_a_swallowed_notification_costs_a_tick(postgres_url: str) -> None:
    """Of a callback that another process took, and of which no word came through, a worker knows
    when it looks by itself."""
    assert WorkerTimes.tick > TICK
    async with (
        running(Options(run_seconds=0.1, failures=0)) as flora,
        working(postgres_url, flora, tick=TICK) as (worker, services),
        await Database.open(postgres_url) as receiver,
        Signals(receiver) as deaf,
    ):
        # Nobody listens to what seems to be his own word.
        receiver.origin = services.database.origin
        await eventually(lambda: deaf.listening)
        await deaf.wait_due(0)
        await eventually(lambda: swept(services))
        # It is the tick, and not the round that comes every fourth, which does not come here.
        await eventually(lambda: worker._poll_anyway_at > 0)
        worker._poll_anyway_at = math.inf
        run = flora.start()
        async with open_writer(receiver) as writer:
            await writer.submit(callback(run.run_id, at=utc_now()))

        async def settled() -> bool:
            record = await get_run(receiver, run.run_id)
            return record is not None and record.run.settled

        assert not await deaf.wait_due(0.1)
        await eventually(settled)
