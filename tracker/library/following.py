"""Waiting for runs: following them in the database until each has ended."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial

from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.run import Tracking
from tracker.errors import RunFailed, RunLost, RunUnknown, WaitTimeout
from tracker.library.run import RunFields
from tracker.polling.follow import CHUNK, OUTAGE, until_available
from tracker.services import Services
from tracker.store.queries import runs as read

log = get_logger(__name__)


def id_of(run: RunFields | str) -> str:
    """The id of a run, or the id itself."""
    return run if isinstance(run, str) else run.run_id


def raise_failures(runs: Sequence[RunFields]) -> None:
    """Raise `RunFailed` or `RunLost` for the first of the ended runs that did not complete."""
    for run in runs:
        if run.tracking == Tracking.LOST:
            raise RunLost(run, runs)
        if not run.succeeded:
            raise RunFailed(run, runs)


async def as_settled(
    services: Services, run_ids: Iterable[str], timeout: float | None
) -> AsyncGenerator[Record, None]:
    """Each run's record as it ends: settled or lost.

    Raises `RunUnknown`, also for a run that is removed meanwhile, `WaitTimeout`, and
    `StoreUnavailable` if the database does not answer for a minute.
    """
    wanted = list(dict.fromkeys(run_ids))
    give_up = None if timeout is None else time.monotonic() + timeout
    patience = OUTAGE if timeout is None else min(timeout, OUTAGE)
    known = await until_available(
        partial(_records, services, wanted), _notify, give_up_after=patience
    )
    if missing := [run_id for run_id in wanted if run_id not in known]:
        raise RunUnknown(missing)
    for record in known.values():
        if record.tracking is not Tracking.ACTIVE:
            yield record
    known = {key: one for key, one in known.items() if one.tracking is Tracking.ACTIVE}
    if not known:
        return
    async with aclosing(services.follower.follow(list(known), notify=_notify)) as updates:
        while known:
            try:
                # Not around the loop: a time-out must not interrupt what the caller does.
                left = None if give_up is None else max(give_up - time.monotonic(), 0.0)
                async with asyncio.timeout(left):
                    changed = await anext(updates)
            except StopAsyncIteration:
                raise RunUnknown(list(known)) from None
            except TimeoutError as error:
                still = [RunFields.of(one) for one in known.values()]
                raise WaitTimeout(still, timeout or 0.0) from error
            known |= {one.record.run.run_id: one.record for one in changed}
            for record, _ in changed:
                if record.tracking is not Tracking.ACTIVE:
                    del known[record.run.run_id]
                    yield record


async def _records(services: Services, run_ids: Sequence[str]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for start in range(0, len(run_ids), CHUNK):
        found |= await read.get_runs(services.database, run_ids[start : start + CHUNK])
    return {run_id: found[run_id] for run_id in run_ids if run_id in found}


def _notify(line: str) -> None:
    log.warning("run.wait_delayed", reason=line)
