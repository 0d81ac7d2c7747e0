"""Who folds the tallies: every process that writes, a few seconds after it did.

So nothing has to be scheduled, an idle tracker does nothing, and it does not matter which of the
processes of a deployment are running. Nobody waits for it: readers add up what is not folded yet.
"""

import asyncio
from contextlib import suppress
from typing import Final, Self

import structlog

from tracker.core.errors import StoreError
from tracker.store import tallies
from tracker.store.batch import Outcome
from tracker.store.engine import Database

GATHER: Final = 3.0
"""Seconds from a commit to the fold that takes it in, so that those of many commits share one."""
RETRY: Final = 5.0
"""Seconds until a fold that failed is tried again."""
LAST_FOLD_WITHIN: Final = 2.0
"""Seconds that the end of a process waits for its last fold."""

log = structlog.get_logger(__name__)


class TallyKeeper:
    """Folds while the `async with` block lasts, and once more at its end. `committed` is a hook
    for the door.

    With `background` false nothing happens before the end: a one-shot has no time to lose.
    """

    def __init__(self, db: Database, *, background: bool, gather: float = GATHER) -> None:
        self._db = db
        self._background = background
        self._gather = gather
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        self._is_down = False

    async def __aenter__(self) -> Self:
        if self._background:
            self._changed.set()  # somebody may have been killed before it could fold
            self._task = asyncio.create_task(self._run(), name="tally-keeper")
        return self

    async def __aexit__(self, *_: object) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._changed.is_set() and not self._is_down:
            with suppress(TimeoutError):  # the next process does it
                async with asyncio.timeout(LAST_FOLD_WITHIN):
                    await self._fold()

    def committed(self, outcome: Outcome) -> None:
        """The door's hook: there may be something to fold."""
        self._changed.set()
        self._is_down = False  # whatever the last fold met

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._gather)
            if not await self._fold():
                await asyncio.sleep(RETRY)

    async def _fold(self) -> bool:
        self._changed.clear()
        try:
            await tallies.fold(self._db)
        except StoreError as error:
            if not self._failing:
                log.warning("tallies.not_folded", error=str(error))
            self._failing = self._is_down = True
            self._changed.set()
            return False
        except asyncio.CancelledError:
            self._changed.set()
            raise
        self._failing = self._is_down = False
        return True
