"""Starting a batch's rows: some at a time, each by its own key, as long as FLORA takes them.

What is about one row (FLORA refuses its inputs) is noted with it, and the others go on. What every
further row would meet too (no credits, a refused key, no answer at all) ends the launch; the rows
that are left are started when the command is repeated.

While FLORA asks for a pause, no row begins. Nor does one while another row's start is in doubt:
where FLORA does not say which run a used key became, the history tells it only as long as few runs
may be it.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.errors import (
    FloraError,
    FloraRefusal,
    FloraUnreachable,
    IdempotencyConflict,
    InvalidRequest,
    RateLimited,
    ServerFault,
    StartUnresolved,
    StoreError,
    TrackerError,
)
from tracker.store import starts
from tracker.store.engine import Database
from tracker.store.starts import StartState
from tracker.tracking.batch_rows import Plan, PlannedRow
from tracker.tracking.start import Starter, StartRequest
from tracker.tracking.workspaces import Workspace

ABOUT_THE_ROW: Final = (400, 409, 413, 415, 422)
"""Refusals that the next row may not meet."""
TRIES: Final = 3
"""So often a row is tried of which FLORA gives no usable answer."""
SILENCE: Final = 20.0
"""Seconds without a start that worked, after which no connection to FLORA ends the launch."""
FAILURES: Final = 3
"""So many rows in a row without a usable answer end it, too."""
LOOK_EVERY: Final = 0.2
"""Seconds between two looks whether a doubt is settled."""

log = structlog.get_logger(__name__)


class Launch:
    """One command's work on the rows that are missing.

    `errors` tells why rows could not be started, by key; `stopped` what ended the launch early.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        database: Database,
        workspace: Workspace,
        starter: Starter,
        concurrency: int,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._plan = plan
        self._database = database
        self._workspace = workspace
        self._starter = starter
        self._concurrency = concurrency
        self._clock = clock
        self._sleep = sleep
        self._queue: deque[PlannedRow] = deque()
        self._later: list[PlannedRow] = []
        self._flying: dict[str, PlannedRow] = {}
        self._tries: Counter[str] = Counter()
        self._silent: set[str] = set()
        self._worked_at = time.monotonic()
        self._broken_off = False
        self.started = 0
        self.errors: dict[str, str] = {}
        self.stopped: TrackerError | None = None
        for row in plan.missing:
            (self._queue if self._is_new(row) else self._later).append(row)

    @property
    def left(self) -> int:
        """Rows that are still to be started."""
        return len(self._queue) + len(self._later) + len(self._flying)

    @property
    def paused(self) -> float:
        """Seconds for which FLORA asked to wait."""
        client = self._workspace.client
        return 0.0 if client is None else client.budget.state().paused

    @property
    def free_in(self) -> float:
        """Seconds until a row can be tried that some process, perhaps one that is gone, holds.

        0 while there is anything else to do.
        """
        if self._queue or self._flying or not self._later:
            return 0.0
        return min(self._held_for(row) for row in self._later)

    def break_off(self) -> None:
        """Begin no further row."""
        self._broken_off = True

    async def run(self) -> None:
        """Start what is missing; returns when nothing is left that can be started now."""
        seats = self._concurrency
        while True:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(seats, len(self._queue))):
                    group.create_task(self._work())
            if not self._later or self._over:
                return
            while (wait := self.free_in) > 0 and not self._over:
                await self._sleep(min(wait, 1.0))
            self._queue.extend(row for row in self._later if self._held_for(row) == 0)
            self._later = [row for row in self._later if self._held_for(row) > 0]
            # What is in doubt is tried alone: the history can tell most then.
            seats = 1

    @property
    def _over(self) -> bool:
        return self._broken_off or self.stopped is not None

    async def _work(self) -> None:
        try:
            while self._queue:
                await self._turn()
                if self._over or not self._queue:
                    return
                row = self._queue.popleft()
                self._flying[row.entry.key] = row
                try:
                    await self._start(row)
                finally:
                    del self._flying[row.entry.key]
        except StoreError as error:
            self._stop(error)

    async def _turn(self) -> None:
        """Wait while FLORA wants a pause, or a start is in doubt."""
        while not self._over:
            if (paused := self.paused) > 0:
                await self._sleep(min(paused, 1.0))
            elif await self._in_doubt():
                await self._sleep(LOOK_EVERY)
            else:
                return

    async def _in_doubt(self) -> bool:
        """Whether one of the starts under way has had no answer that says what it did."""
        if not self._flying:
            return False
        slot = self._plan.batch.workspace_slot
        rows = await starts.of_keys(self._database, slot, list(self._flying))
        return any(
            row.state is StartState.SENT and (row.error or row.sent_at != row.in_use_since)
            for row in rows.values()
        )

    async def _start(self, row: PlannedRow) -> None:
        key = row.entry.key
        request = StartRequest(
            technique=self._plan.technique.technique_id,
            inputs=row.inputs,
            workspace_id=self._workspace.workspace_id,
            idempotency_key=key,
        )
        try:
            await self._starter.start(request)
        except RateLimited:
            self._queue.appendleft(row)
        except StartUnresolved as error:
            await self._unresolved(row, error)
        except (IdempotencyConflict, InvalidRequest) as error:
            self.errors[key] = str(error)
        except ServerFault as error:
            self._no_answer(row, error)
        except FloraRefusal as error:
            if error.status in ABOUT_THE_ROW:
                self.errors[key] = str(error)
            else:
                self._stop(error)
        except FloraError as error:
            self._no_answer(row, error)
        else:
            self.started += 1
            self._worked_at = time.monotonic()
            self._silent.clear()

    async def _unresolved(self, row: PlannedRow, error: StartUnresolved) -> None:
        """Nobody can tell what the key became, or somebody else is still at it."""
        found = await starts.get(self._database, self._plan.batch.workspace_slot, row.entry.key)
        if found is not None and found.state is not StartState.UNRESOLVED:
            self._try_later(row, error)
        else:
            self.errors[row.entry.key] = str(error)

    def _no_answer(self, row: PlannedRow, error: FloraError) -> None:
        """FLORA gave no usable answer for this row: perhaps it has none for any."""
        self._silent.add(row.entry.key)
        unconnected = isinstance(error, FloraUnreachable) and not error.may_have_acted
        if (unconnected and time.monotonic() - self._worked_at >= SILENCE) or len(
            self._silent
        ) >= max(FAILURES, self._concurrency):
            self._stop(error)
        self._try_later(row, error)

    def _try_later(self, row: PlannedRow, error: TrackerError) -> None:
        self._tries[row.entry.key] += 1
        if self._tries[row.entry.key] < TRIES:
            self._later.append(row)
        else:
            self.errors[row.entry.key] = str(error)

    def _stop(self, error: TrackerError) -> None:
        if self.stopped is None:
            log.warning("batch.stopped", error=str(error), left=self.left)
            self.stopped = error

    def _is_new(self, row: PlannedRow) -> bool:
        """Whether it is certain that no request for this row has acted, and that nobody is at
        it."""
        start = self._plan.states[row.entry.key].start
        tried = start is not None and start.state not in (StartState.STORED, StartState.REFUSED)
        return not tried and self._held_for(row) == 0

    def _held_for(self, row: PlannedRow) -> float:
        """Seconds until the row can be tried: another process held its key when the batch was
        planned, or a retry was advised for later."""
        start = self._plan.states[row.entry.key].start
        until = (row.not_before, None if start is None else start.lease_until)
        now = self._clock()
        return max([0.0, *((at - now).total_seconds() for at in until if at is not None)])
