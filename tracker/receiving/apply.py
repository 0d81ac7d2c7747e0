"""Stored callbacks are applied to their runs: promptly, in groups, by any process.

The process that stored a callback is told directly and applies it within milliseconds. Every other
one looks when it starts and then every second, so that a process that dies takes nothing along.

Acknowledging goes first. While many callbacks wait to be acknowledged at the same time, this
process applies one group a second and leaves the rest for later, or for one that has the time.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Final, Self

import structlog
from sqlalchemy import Connection

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.core.rate_limited_log import Seldom
from tracker.core.record import TEST_DELIVERY, Delivery
from tracker.polling.workspaces import Workspaces
from tracker.receiving import callback
from tracker.store.engine import Database
from tracker.store.errors import StoreBusy, StoreRefused
from tracker.store.notices import inbox_notice
from tracker.store.writing import delivery_rows
from tracker.store.writing.group_commit import OnWrite, call_hook
from tracker.store.writing.inbox import NOTHING, Applied, Group, Read, apply_waiting
from tracker.store.writing.writer import MergeRules, WriteOutcome, statements_for

MAX_GROUP: Final = 500
"""The most deliveries in one transaction."""
LOOK_EVERY: Final = 1.0
"""Seconds after which a process looks for deliveries that another one left."""
PAUSE: Final = 0.01
"""Seconds between two groups while callbacks come in, in which it is seen how many wait."""
CROWD: Final = 20
"""So many callbacks that wait to be acknowledged at the same time, on average, are served first. At
a third of the highest rate five to ten wait, as measured on both databases; as many as there are
senders where they bring all that can be taken."""
LONGEST_PAUSE: Final = 0.9
"""Seconds that applying holds back at most: with the group itself, at least one a second."""
NOTIFY_EVERY: Final = 0.1
"""Seconds between two notifications at least: each takes a lock that all commits share."""
RETRY: Final = (0.05, 1.0)
"""The first and the longest wait before a database that is down is tried again."""
HELD_UP_SECONDS: Final = 5.0
"""How long a delivery is left whose run someone else has locked."""
LAST_WITHIN: Final = 2.0
"""Seconds that the end of a process waits for what it stored last."""

log = structlog.get_logger(__name__)


class Reader:
    """Says what a stored delivery says, as of the settings that this process has."""

    def __init__(self, workspaces: Workspaces) -> None:
        self._workspaces = workspaces

    def read(self, delivery: Delivery) -> Read:
        """An observation, or why it is quarantined. Never raises, whatever the body."""
        if delivery.event_type == TEST_DELIVERY:
            return Read(None)
        signer = self.signer(delivery.workspace_id)
        seen = callback.observe(delivery.body, at=delivery.received_at, signer=signer)
        if isinstance(seen, str):
            return Read(None, seen)
        workspace = self._workspaces.of(seen.workspace_id)
        if workspace is None and seen.workspace_id is not None:
            return Read(
                None, f"it speaks of workspace {seen.workspace_id}, which is not configured here"
            )
        if len(self._workspaces) == 1:
            if workspace is not None:
                workspace.learn(seen.workspace_id)
            return Read(seen)
        return Read(seen, signers=self._signers(seen.workspace_id))

    def signer(self, workspace_id: str | None) -> str | None:
        """The workspace whose secret signed a delivery, as long as one of that id is configured.

        Where none is, the id was a mistake in the settings, or nobody knew one when it came.
        """
        return workspace_id if self._workspaces.has(workspace_id) else None

    def _signers(self, workspace_id: str | None) -> set[str | None]:
        """That workspace, and those that share a secret with it."""
        mine = self._workspaces.of(workspace_id)
        secrets = set(mine.secrets) if mine is not None else set()
        sharing = {
            one.workspace_id for one in self._workspaces if not secrets.isdisjoint(one.secrets)
        }
        return sharing | {workspace_id}


class Applier:
    """Applies what waits. Used as `async with Applier(…) as applier`.

    With `background` true it looks every second; else only when it is woken or told to `drain`.
    `on_commit` is called after each commit with what it did to runs, `on_applied` with how many
    deliveries were applied and how many quarantined, `on_write` after each attempt to commit.
    """

    def __init__(
        self,
        database: Database,
        *,
        workspaces: Workspaces,
        rules: MergeRules,
        clock: Clock,
        background: bool,
        on_commit: Sequence[Callable[[WriteOutcome], None]] = (),
        on_applied: Sequence[Callable[[int, int], None]] = (),
        on_write: Sequence[OnWrite] = (),
    ) -> None:
        self._database = database
        self._read = Reader(workspaces).read
        self._rules = rules
        self._statements = statements_for(database)
        self._clock = clock
        self._background = background
        self._on_commit = tuple(on_commit)
        self._on_applied = tuple(on_applied)
        self._on_write = tuple(on_write)
        self._woken = asyncio.Event()
        self._crowds: list[int] = []
        """How many callbacks waited at each commit of the last pause."""
        self._notified_at = float("-inf")
        self._limit = MAX_GROUP
        self._held_up: dict[str, float] = {}
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._seldom = Seldom()

    async def __aenter__(self) -> Self:
        if self._background:
            self.wake()  # someone may have died before it could apply what it had stored
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def stored(self, crowd: int) -> None:
        """Deliveries were stored by this process just now, when so many waited for that."""
        self._crowds.append(crowd)
        self.wake()

    def committed(self, outcome: WriteOutcome) -> None:
        """A write of runs was committed, which may have let quarantined deliveries wait again."""
        if outcome.requeued:
            self.wake()

    def wake(self) -> None:
        """Deliveries may be waiting: look soon."""
        self._woken.set()
        if self._task is None and not self._closing:
            # In a context of its own: not what the request that came first is logged with.
            self._task = asyncio.create_task(self._run(), name="applier", context=Context())

    async def aclose(self) -> None:
        """Stop; what was stored just now is still applied, if that is quick."""
        self._closing = True
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        if self._woken.is_set():
            try:
                async with asyncio.timeout(LAST_WITHIN):
                    await self.drain()
            except (StoreError, TimeoutError):
                log.info("inbox.left", advice="another process applies it, or the next start")

    async def drain(self) -> int:
        """Apply all that waits now and that nobody else is at, and return how many deliveries that
        were. Raises `StoreUnavailable`."""
        count, more = 0, True
        while more:
            taken, more = await self._apply_group()
            count += taken
        return count

    async def _run(self) -> None:
        wait = RETRY[0]
        while True:
            self._woken.clear()
            began = time.monotonic()
            try:
                taken, more = await self._apply_group()
            except StoreError as error:
                self._woken.set()
                self._report(error)
                await asyncio.sleep(wait)
                wait = min(wait * 2, RETRY[1])
                continue
            except asyncio.CancelledError:
                self._woken.set()
                raise
            except Exception:
                # Without this task nothing is applied: it goes on, whatever happens.
                log.exception("inbox.failed")
                await asyncio.sleep(RETRY[1])
                continue
            wait = RETRY[0]
            if more:
                self._woken.set()
            if taken:
                await self._hold_back(began + LONGEST_PAUSE)
            await self._until_woken()

    async def _until_woken(self) -> None:
        longest = LOOK_EVERY if self._background or self._held_up else None
        try:
            async with asyncio.timeout(longest):
                await self._woken.wait()
        except TimeoutError:
            self._woken.set()

    async def _hold_back(self, until: float) -> None:
        """Return when few callbacks wait to be acknowledged, or at that moment of the monotonic
        clock."""
        while self._crowds and (now := time.monotonic()) < until:
            self._crowds.clear()
            await asyncio.sleep(PAUSE)
            if sum(self._crowds) < CROWD * len(self._crowds):
                return
            await self._notify(now)

    async def _notify(self, now: float) -> None:
        """Tell other processes that there is something to apply, which this one has no time for."""
        if self._database.dialect == "sqlite" or now - self._notified_at < NOTIFY_EVERY:
            return
        self._notified_at = now
        channel, payload = inbox_notice(self._database.origin)
        with suppress(StoreError):  # they look every second anyhow
            await self._database.send("SELECT pg_notify($1, $2)", (channel, payload))

    async def _apply_group(self) -> tuple[int, bool]:
        """Apply one group: how many deliveries it brought to their end, the quarantined ones among
        them, and whether more may be waiting.

        Where one of them cannot be applied the next group is half as large, until that one is
        alone. Raises `StoreError` where no delivery is to blame.
        """
        async with self._one_at_a_time:
            now = time.monotonic()
            self._held_up = {key: until for key, until in self._held_up.items() if until > now}
            group = Group(limit=self._limit, read=self._read, held_up=[*self._held_up])
            taken: list[str] = []
            try:
                applied = await self._write(group, taken)
            except Exception as error:
                if not taken or not _is_to_blame(error):
                    raise
                self._limit = max(len(taken) // 2, 1)
                if len(taken) > 1:
                    return 0, True
                if isinstance(error, StoreBusy):
                    self._held_up[taken[0]] = time.monotonic() + HELD_UP_SECONDS
                    return 0, True
                applied = await self._quarantine(taken[0], error)
            else:
                self._limit = min(self._limit * 2, MAX_GROUP)
            if applied.taken:
                self._tell(applied)
            return applied.taken, applied.more or applied.outcome.requeued

    async def _write(self, group: Group, taken: list[str]) -> Applied:
        began = time.monotonic()
        stopped_by: Exception | None = None
        try:
            return await self._database.write(partial(self._apply, group, taken))
        except Exception as error:
            stopped_by = error
            raise
        finally:
            if taken or stopped_by is not None:  # to look and find nothing is no commit
                for hook in self._on_write:
                    call_hook(hook, len(taken), time.monotonic() - began, stopped_by)

    def _apply(self, group: Group, taken: list[str], connection: Connection) -> Applied:
        return apply_waiting(
            connection,
            group,
            taken,
            clock=self._clock,
            rules=self._rules,
            statements=self._statements,
        )

    async def _quarantine(self, delivery_id: str, error: Exception) -> Applied:
        """Put aside the one delivery that cannot be applied, with the reason."""
        reason = f"it cannot be applied: {error}"
        if not isinstance(error, StoreError):
            reason = f"it cannot be applied: {type(error).__name__}: {error}"
        quarantined = [(delivery_id, reason)]
        await self._database.write(partial(delivery_rows.quarantine, which=quarantined))
        return Applied(1, True, quarantined, NOTHING)

    def _tell(self, applied: Applied) -> None:
        for on_commit in self._on_commit:
            call_hook(on_commit, applied.outcome)
        bad = len(applied.quarantined)
        for on_applied in self._on_applied:
            call_hook(on_applied, applied.taken - bad, bad)
        reasons: dict[str, list[str]] = {}
        for delivery_id, reason in applied.quarantined:
            reasons.setdefault(reason, []).append(delivery_id)
        for reason, ids in reasons.items():
            log.warning("callback.quarantined", reason=reason, delivery_id=ids[0], count=len(ids))

    def _report(self, error: StoreError) -> None:
        if count := self._seldom.count("unavailable", now=time.monotonic()):
            log.warning("inbox.not_applied", error=str(error), count=count)


def _is_to_blame(error: Exception) -> bool:
    """Whether some delivery of the group is: a run that someone else has locked holds up its own
    delivery, and no other; the database refuses what one says; or the tracker has a fault that one
    brings to light. A database that does not answer, or lets nobody write, is no fault of theirs.
    """
    return isinstance(error, StoreBusy | StoreRefused) or not isinstance(error, StoreError)
