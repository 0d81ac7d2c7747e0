"""A start held by one caller: while its lease lasts, nobody else sends or judges its key."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

import structlog

from tracker.core.clock import Clock, boot_seconds
from tracker.core.errors import FloraRefusal, StartPending, StoreError, TrackerError
from tracker.store.engine import Database
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow, StartState

HELD_FOR: Final = timedelta(seconds=30)
"""What a process that died held is free after this; one that lives renews it."""
RENEW_AFTER: Final = 10.0
"""Seconds after which a hold is renewed."""
GIVEN_BACK_WITHIN: Final = 1.5
"""Seconds that a caller waits until its hold is given back; it is all the same, only later."""
GIVE_BACK_AGAIN_AFTER: Final = 1.0
"""Seconds until that is tried again, where the database did not take it."""

_giving_back: set[asyncio.Task[None]] = set()

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class HeldStart:
    """A start in the hands of one caller, as it stands now.

    `valid_until` is until when the lease surely holds, in seconds of a clock that goes on while the
    machine is suspended; `has_left` tells that a request has been let through since it was taken.
    """

    database: Database
    clock: Clock
    row: StartRow
    holder: str
    valid_until: float
    has_left: bool = False

    @property
    def key(self) -> str:
        """The idempotency key."""
        return self.row.idempotency_key

    @property
    def _id(self) -> tuple[str, str]:
        return self.row.workspace_slot, self.key

    async def let_through(self, callback_url: str | None, request_body: str) -> None:
        """The fence: called directly before a request is written, which it lets through only where
        nobody else can be sending the key.

        Raises `StartPending` where the lease has run out, however long this process, or the
        machine, stood still; and `StoreError` where that cannot be told.
        """
        row = await starts.mark_sent(
            self.database,
            *self._id,
            holder=self.holder,
            at=self.clock(),
            callback_url=callback_url,
            request_body=request_body,
        )
        # Last of all: the database's answer may have come in before a long sleep.
        if row is None or boot_seconds() >= self.valid_until:
            raise StartPending(
                f"idempotency key {self.key!r} was taken over by another request: ask again soon"
            )
        self.row, self.has_left = row, True

    async def note(self, state: StartState, error: dict[str, Any] | None) -> None:
        """Write what is known; where that fails the row stays as it is."""
        try:
            row = await starts.mark(
                self.database, *self._id, holder=self.holder, state=state, error=error
            )
        except StoreError as failure:
            log.error("start.not_noted", key=self.key, state=state, error=str(failure))
        else:
            self.row = row or self.row


@asynccontextmanager
async def holding(
    database: Database,
    row: StartRow | tuple[str, str],
    process: str,
    clock: Clock,
    *,
    reserve: Callable[[str, timedelta], Awaitable[StartRow]] | None = None,
) -> AsyncIterator[HeldStart | None]:
    """Hold a start for as long as the block lasts; `None` where another has it, or it has started.

    `row` is the start, or workspace and key of one that is not kept yet: `reserve` then keeps and
    takes it for the holder, and for as long, as it is told. `process` names the process in the
    lease. Raises `StoreUnavailable`, and what `reserve` raises.
    """
    slot, key = (row.workspace_slot, row.idempotency_key) if isinstance(row, StartRow) else row
    holder = f"{process}:{uuid4()}"
    taken = True  # as far as is known, where the taking is broken off
    valid_until = boot_seconds() + HELD_FOR.total_seconds()
    try:
        try:
            if reserve is not None:
                row = await reserve(holder, HELD_FOR)
                taken = row.lease_holder == holder
            else:
                taken = await starts.take(database, slot, key, holder, clock(), HELD_FOR)
        except TrackerError:
            # Hardly ever was it taken all the same. During an outage every start would try for half
            # a minute to give back what it does not have; so it runs out by itself.
            taken = False
            raise
        if not taken:
            yield None
            return
        if reserve is None:
            row = await starts.get(database, slot, key) or row  # it may have moved on meanwhile
        if not isinstance(row, StartRow):
            raise AssertionError("what is not kept yet is reserved")
        held = HeldStart(database, clock, row, holder, valid_until)
        renewing = asyncio.create_task(_renew(held))
        try:
            yield held
        finally:
            renewing.cancel()
    finally:
        if taken:
            giving_back = asyncio.create_task(_give_back(database, slot, key, holder))
            _giving_back.add(giving_back)  # else nobody would hold it, and it might vanish
            giving_back.add_done_callback(_giving_back.discard)
            await asyncio.wait([giving_back], timeout=GIVEN_BACK_WITHIN)


async def _give_back(database: Database, slot: str, key: str, holder: str) -> None:
    """Until it is done or has run out: the caller's next try would wait for a hold of nobody's."""
    loop = asyncio.get_running_loop()
    runs_out = loop.time() + HELD_FOR.total_seconds()
    said = False
    while loop.time() < runs_out:
        try:
            await starts.give_back(database, slot, key, holder)
        except StoreError as failure:
            if not said:
                log.warning("start.hold_kept", key=key, error=str(failure))
            said = True
            await asyncio.sleep(GIVE_BACK_AGAIN_AFTER)
        else:
            return


async def _renew(held: HeldStart) -> None:
    """Prolong the lease until told to stop, or until it is found to be lost."""
    while True:
        await asyncio.sleep(RENEW_AFTER)
        valid_until = boot_seconds() + HELD_FOR.total_seconds()
        try:
            mine = await starts.prolong(
                held.database, *held._id, held.holder, held.clock(), HELD_FOR
            )
        except StoreError as failure:
            log.warning("start.hold_not_renewed", key=held.key, error=str(failure))
            continue
        # What had surely run out by now may have been free in between, and its room another's.
        if not mine or boot_seconds() >= held.valid_until:
            held.valid_until = float("-inf")
            return
        held.valid_until = valid_until


def described(error: Exception) -> dict[str, Any]:
    """An error as the start log keeps it."""
    if isinstance(error, FloraRefusal):
        return {
            "status": error.status,
            "code": error.code,
            "message": error.message,
            "fields": [
                {"field": one.field, "message": one.message}
                | ({"valid_values": list(one.valid_values)} if one.valid_values else {})
                for one in error.fields
            ],
            "request_id": error.request_id,
        }
    return {"message": str(error)}
