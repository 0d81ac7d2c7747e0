"""Waiting for runs: following them in the database until each has ended."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import cache, partial
from typing import TYPE_CHECKING

from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.run import Tracking
from tracker.errors import RunFailed, RunLost, RunUnknown, WaitTimeout
from tracker.library.run import RunFields

if TYPE_CHECKING:
    from tracker.services import Services

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
    services: "Services", run_ids: Iterable[str], timeout: float | None
) -> AsyncGenerator[Record, None]:
    """Each run's record as it ends: settled or lost.

    Raises `RunUnknown`, also for a run that is removed meanwhile, `WaitTimeout`, and
    `StoreUnavailable` if the database does not answer for a minute.
    """
    wanted = list(dict.fromkeys(run_ids))
    reason: str | None = None

    def delayed(line: str) -> None:
        nonlocal reason
        reason = line
        notify(line)

    give_up = None if timeout is None else time.monotonic() + timeout
    found = await known(services, wanted, patience=timeout or None)
    for record in found.values():
        if record.tracking is not Tracking.ACTIVE:
            yield record
    active = {key: one for key, one in found.items() if one.tracking is Tracking.ACTIVE}
    async with aclosing(services.follower.follow(list(active), notify=delayed)) as updates:
        while active:
            try:
                # Not around the loop: a time-out must not interrupt what the caller does.
                left = None if give_up is None else max(give_up - time.monotonic(), 0.0)
                async with asyncio.timeout(left):
                    changed = await anext(updates)
            except StopAsyncIteration:
                raise RunUnknown(list(active)) from None
            except TimeoutError as error:
                still = [RunFields._of(one) for one in active.values()]
                raise WaitTimeout._of(still, timeout or 0.0, reason) from error
            active |= {one.record.run.run_id: one.record for one in changed}
            for record, _ in changed:
                if record.tracking is not Tracking.ACTIVE:
                    del active[record.run.run_id]
                    yield record


async def known(
    services: "Services", run_ids: Sequence[str], *, patience: float | None = None
) -> dict[str, Record]:
    """These runs, as soon as the database answers. Raises `RunUnknown`, and `StoreUnavailable`
    after a minute, or `patience` seconds if that is less."""
    from tracker.polling.follow import OUTAGE, until_available

    read = partial(services.follower.read, run_ids)
    once = cache(notify)  # it is repeated with the same reason
    found = await until_available(read, once, give_up_after=min(patience or OUTAGE, OUTAGE))
    if missing := [run_id for run_id in run_ids if run_id not in found]:
        raise RunUnknown(missing)
    return found


def notify(line: str) -> None:
    """Log why a wait takes longer."""
    log.warning("run.wait_delayed", reason=line)
