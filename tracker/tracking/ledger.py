"""A start held by one caller: while it lasts, nobody else sends or judges its key."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import FloraRefusal, StartUnderWay, StoreError
from tracker.store import starts
from tracker.store.engine import Database
from tracker.store.starts import StartRow, StartState

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
    """A row of the ledger of starts, as it stands now, in the hands of one caller."""

    database: Database
    clock: Clock
    row: StartRow
    holder: str

    @property
    def key(self) -> str:
        """The idempotency key."""
        return self.row.idempotency_key

    async def about_to_send(self, callback_url: str | None) -> None:
        """Note that a request leaves now. Raises `StartUnderWay` where the hold was lost."""
        row = await starts.mark_sent(
            self.database,
            self.row.workspace_slot,
            self.key,
            holder=self.holder,
            at=self.clock(),
            callback_url=callback_url,
        )
        if row is None:
            raise StartUnderWay(
                f"idempotency key {self.key!r} was taken over by another request: ask again soon"
            )
        self.row = row

    async def note(self, state: StartState, error: dict[str, Any]) -> None:
        """Write what is known into the ledger; where that fails the row stays as it is."""
        try:
            row = await starts.mark(
                self.database,
                self.row.workspace_slot,
                self.key,
                holder=self.holder,
                state=state,
                error=error,
            )
        except StoreError as failure:
            log.error("start.ledger_failed", key=self.key, state=state, error=str(failure))
        else:
            self.row = row or self.row


@asynccontextmanager
async def holding(
    database: Database, row: StartRow, process: str, clock: Clock
) -> AsyncIterator[HeldStart | None]:
    """Hold a start for as long as the block lasts; `None` where another has it, or it has started.

    `process` names the process in the lease. Raises `StoreUnavailable`.
    """
    slot, key = row.workspace_slot, row.idempotency_key
    holder = f"{process}:{uuid4()}"
    taken = True  # as far as anybody knows, where the taking is broken off
    try:
        try:
            taken = await starts.take(database, slot, key, holder, clock(), HELD_FOR)
        except StoreError:
            # Hardly ever was it taken all the same. During an outage every start would try for half
            # a minute to give back what it does not have; so it runs out by itself.
            taken = False
            raise
        if not taken:
            yield None
            return
        renewing = asyncio.create_task(_renew(database, row, holder, clock))
        try:
            fresh = await starts.get(database, slot, key)  # it may have moved on meanwhile
            yield HeldStart(database, clock, fresh or row, holder)
        finally:
            renewing.cancel()
    finally:
        if taken:
            giving_back = asyncio.create_task(_give_back(database, row, holder))
            _giving_back.add(giving_back)  # else nobody would hold it, and it might vanish
            giving_back.add_done_callback(_giving_back.discard)
            await asyncio.wait([giving_back], timeout=GIVEN_BACK_WITHIN)


async def _give_back(database: Database, row: StartRow, holder: str) -> None:
    """Until it is done or has run out: the caller's next try would wait for a hold of nobody's."""
    loop = asyncio.get_running_loop()
    runs_out = loop.time() + HELD_FOR.total_seconds()
    said = False
    while loop.time() < runs_out:
        try:
            await starts.give_back(database, row.workspace_slot, row.idempotency_key, holder)
        except StoreError as failure:
            if not said:
                log.warning("start.hold_kept", key=row.idempotency_key, error=str(failure))
            said = True
            await asyncio.sleep(GIVE_BACK_AGAIN_AFTER)
        else:
            return


async def _renew(database: Database, row: StartRow, holder: str, clock: Clock) -> None:
    while True:
        await asyncio.sleep(RENEW_AFTER)
        try:
            await starts.prolong(
                database, row.workspace_slot, row.idempotency_key, holder, clock(), HELD_FOR
            )
        except StoreError as failure:
            log.warning("start.hold_not_renewed", key=row.idempotency_key, error=str(failure))


def described(error: Exception) -> dict[str, Any]:
    """An error as the ledger keeps it."""
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
