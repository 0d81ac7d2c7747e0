"""The one door: every write of run state goes through here, and is answered after its commit.

A task takes whatever waits and commits it together. Nothing waits for company: an entry that
comes alone is committed alone, and while that commit is under way the next ones gather. So the cost
of a commit is shared exactly where there is load. On SQLite a batch also takes in what this process
has begun to read, for `GATHER_SECONDS` at most.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final, Self

import structlog
from sqlalchemy import Connection

from tracker.core.entry import Delivered, Entry
from tracker.core.errors import SchemaOutdated, StoreError, StoreUnavailable
from tracker.core.record import DurationsOf
from tracker.core.schedule import Policy
from tracker.core.seldom import Seldom
from tracker.store.batch import Outcome, Passed, Rules, Statements, pass_batch
from tracker.store.engine import Database
from tracker.store.faults import StoreBusy, WriteConflict
from tracker.store.text import clean_entry
from tracker.store.waiting import MAX_WAITING_BYTES, Waiting, WaitingList

WRITERS: Final = {"sqlite": 1, "postgresql": 2}
"""How many batches are under way at a time, at most. While PostgreSQL writes one, this process may
make the next; on SQLite there is one writer anyhow."""
ENOUGH: Final = 64
"""So many have to wait before a batch is begun beside another, and no more are taken at once unless
far more wait: to write a batch costs this process as much as five entries do, so that a small one
wants company; and while a large one is on its way its senders bring nothing that could be done."""
QUIET: Final = 4
"""So many rounds of the event loop in a row without a new entry; by then what the sockets held is
in the queue, but for large bodies."""
GATHER_SECONDS: Final = 0.02
"""How long a batch is held open for that at most, should the rounds be long or the arrivals never
pause."""
PATIENCE: Final = 0.05
"""Seconds after which nobody waits for the other batch any more, be it that a lock holds it up."""
PAUSE_SECONDS: Final = (0.05, 1.0)
"""The first and the longest wait before a database that is down is tried again."""

OnCommit = Callable[[Outcome], None]
"""Called in the event loop after each commit, before the callers are answered."""
OnWrite = Callable[[int, float, Exception | None], None]
"""Called after each attempt to commit: how many entries, in how many seconds, and what stopped it,
if anything did."""

log = structlog.get_logger(__name__)


class Door:
    """Takes entries and commits them in groups. Used as `async with Door(database, …) as door`.

    `deadline` is how long, in seconds, an entry waits for its commit before `put` gives up on it;
    `max_batch` is the most entries in one transaction. No more than `max_waiting` wait at all, nor
    more than `max_waiting_bytes` of callback bodies.
    """

    def __init__(
        self,
        db: Database,
        *,
        policy: Policy,
        durations_of: DurationsOf,
        max_batch: int = 500,
        max_waiting: int = 20_000,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        deadline: float = 7.0,
        on_commit: Sequence[OnCommit] = (),
        on_write: Sequence[OnWrite] = (),
    ) -> None:
        self._db = db
        self._rules = Rules(policy, durations_of)
        self._statements = _statements(db)
        self._max_batch = max_batch
        self._deadline = deadline
        self._on_commit = tuple(on_commit)
        self._on_write = tuple(on_write)
        self._queue = WaitingList(most=max_waiting, most_bytes=max_waiting_bytes)
        self._flying: list[list[Waiting]] = [[] for _ in range(WRITERS[db.dialect])]
        self._waited_for: set[int] = set()
        """The writers that are writing, but for those that have been at it for too long."""
        self._arrived = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._trouble: StoreError | None = None
        self._seldom = Seldom()
        self._said = False

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def start(self) -> None:
        """Begin to commit what comes, in the running event loop."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._run(writer), name=f"door-{writer}")
                for writer in range(len(self._flying))
            ]

    async def aclose(self) -> None:
        """Commit what waits, then stop. What comes later is refused with `StoreUnavailable`."""
        self._closing = True
        self._arrived.set()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._timer is not None:
            self._timer.cancel()

    @property
    def waiting(self) -> int:
        """How many entries are not committed yet."""
        return len(self._queue) + sum(map(len, self._flying))

    @property
    def trouble(self) -> StoreError | None:
        """Why the last attempt to commit failed; `None` where it did not."""
        return self._trouble

    async def put(self, entry: Entry) -> Passed:
        """Commit an entry, and return what it did.

        Raises `StoreUnavailable` where it was not committed in time (it still may be), and
        `StoreError` where the database refuses this very entry.
        """
        self._refuse_if_full([entry])
        return await self._enqueue(entry)

    async def put_all(self, entries: Sequence[Entry]) -> list[Passed]:
        """Commit entries, and return what each did, in order.

        They share transactions as they fit; what does not fit into one is committed in any order.
        Raises as `put` does, after all have been answered: those that could be committed are.
        """
        self._refuse_if_full(entries)
        answers = [self._enqueue(entry) for entry in entries]
        passed = await asyncio.gather(*answers, return_exceptions=True)
        done = []
        for each in passed:
            if isinstance(each, BaseException):
                raise each
            done.append(each)
        return done

    def _refuse_if_full(self, more: Sequence[Entry]) -> None:
        if self._closing or not self._tasks or any(task.done() for task in self._tasks):
            raise StoreUnavailable("the tracker is not running, or is shutting down")
        if not self._queue.has_room(more):
            raise StoreUnavailable(
                "too much waits to be written to the database"
            ) from self._trouble

    def _enqueue(self, entry: Entry) -> asyncio.Future[Passed]:
        loop = asyncio.get_running_loop()
        waiting = Waiting(clean_entry(entry), loop.create_future(), loop.time() + self._deadline)
        self._queue.add(waiting)
        if self._may_begin():
            self._arrived.set()
        if self._timer is None:
            self._timer = loop.call_at(waiting.expires, self._expire)
        return waiting.answer

    def _expire(self) -> None:
        """Give up on what has waited too long. One timer serves all: all wait equally long."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for waiting in self._queue.take_expired(now):
            self._give_up(waiting)
        flying = list(chain.from_iterable(self._flying))
        for waiting in flying:
            if waiting.expires <= now:
                self._give_up(waiting)
        left = [waiting.expires for waiting in flying if waiting.expires > now]
        if self._queue.first_expires is not None:
            left.append(self._queue.first_expires)
        self._timer = loop.call_at(min(left), self._expire) if left else None

    def _give_up(self, waiting: Waiting) -> None:
        if not waiting.answer.done():
            why = f" ({self._trouble})" if self._trouble else ""
            error = StoreUnavailable(f"the database did not commit this in time{why}")
            error.__cause__ = self._trouble
            waiting.answer.set_exception(error)

    async def _run(self, writer: int) -> None:
        answered = last = 0
        while True:
            if self._queue and self._may_begin():
                if last > 1 and self._takes_turns:
                    await self._let_arrive()
                batch = self._queue.take(self._share(answered))
                await self._commit(writer, batch)
                answered = last = len(batch)
            elif self._closing and not self._queue:
                return
            else:
                answered = 0
                self._arrived.clear()
                await self._arrived.wait()

    @property
    def _takes_turns(self) -> bool:
        """Whether a thread of this process writes, so that Python does one at a time: write, or
        take what comes."""
        return len(self._flying) == 1

    async def _let_arrive(self) -> None:
        """Let in what this process has begun to read, where the last batch was of several.

        The thread that writes and the event loop take turns anyhow, so that to begin at once would
        only make two commits out of one. Nobody waits for what is not there.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + GATHER_SECONDS
        there, quiet = len(self._queue), 0
        while quiet < QUIET and loop.time() < until and not self._queue.fills(self._max_batch):
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._queue) == there else 0
            there = len(self._queue)

    def _may_begin(self) -> bool:
        """Whether a writer that is free begins now, though others may be writing."""
        return not self._waited_for or self._closing or len(self._queue) >= ENOUGH

    def _stop_waiting_for(self, writer: int) -> None:
        self._waited_for.discard(writer)
        self._arrived.set()

    def _share(self, answered: int) -> int:
        """How many to take at once, where `answered` ones were just told of their commit.

        Who was just answered soon brings the next. If this commit took all who wait now, these and
        those would take turns for ever in the sizes that chance gave them, one and sixty-three say,
        and this process would idle while the sixty-three are written. So they are made even. Not
        where a thread of this process writes: there is nothing to be done beside it.
        """
        if self._takes_turns:
            return self._max_batch
        waiting = len(self._queue)
        even = (waiting + answered + 1) // 2 if answered else waiting
        return min(self._max_batch, even, max(ENOUGH, waiting // 4))

    async def _commit(self, writer: int, batch: list[Waiting]) -> None:
        """Commit a batch, whole or, where one of its entries is refused, in ever smaller parts.

        A database that is down is tried again until all who wait for this batch have given up.
        """
        self._waited_for.add(writer)
        loop = asyncio.get_running_loop()
        patience = loop.call_later(PATIENCE, self._stop_waiting_for, writer)
        try:
            await self._commit_parts(writer, deque([batch]))
        finally:
            patience.cancel()
            self._waited_for.discard(writer)
            self._flying[writer] = []

    async def _commit_parts(self, writer: int, parts: deque[list[Waiting]]) -> None:
        loop = asyncio.get_running_loop()
        pause = PAUSE_SECONDS[0]
        while parts:
            self._flying[writer] = [waiting for part in parts for waiting in part]
            part = self._still_waiting(parts.popleft(), loop.time())
            if not part:
                continue
            try:
                outcome = await self._write(part)
            except StoreBusy as exc:
                # A row that somebody else has locked holds up its own entry, and no other.
                self._refuse_or_split(part, exc, parts)
            except (StoreUnavailable, SchemaOutdated) as exc:
                self._in_trouble(exc)
                parts.appendleft(part)
                await asyncio.sleep(pause)
                pause = min(pause * 2, PAUSE_SECONDS[1])
            except Exception as exc:
                # Whatever it is, only the entry that causes it may fail.
                self._refuse_or_split(part, exc, parts)
            else:
                self._out_of_trouble()
                pause = PAUSE_SECONDS[0]
                self._settle(part, outcome)

    def _in_trouble(self, error: StoreError) -> None:
        if self._trouble is None:
            now = asyncio.get_running_loop().time()
            self._said = bool(self._seldom.count("unavailable", now=now))
            if self._said:
                log.warning("door.unavailable", error=str(error))
        self._trouble = error

    def _out_of_trouble(self) -> None:
        if self._trouble is not None and self._said:
            log.info("door.recovered")
        self._trouble = None

    def _still_waiting(self, part: list[Waiting], now: float) -> list[Waiting]:
        """Those whose time is not up; the others are answered here, as nothing else sees them."""
        for waiting in part:
            if waiting.expires <= now:
                self._give_up(waiting)
        return [waiting for waiting in part if waiting.expires > now]

    async def _write(self, part: list[Waiting]) -> Outcome:
        loop = asyncio.get_running_loop()
        began = loop.time()
        stopped_by: Exception | None = None
        try:
            return await self._commit_together(part)
        except Exception as exc:
            stopped_by = exc
            raise
        finally:
            for hook in self._on_write:
                _tell(hook, len(part), loop.time() - began, stopped_by)

    async def _commit_together(self, part: list[Waiting]) -> Outcome:
        entries = [waiting.entry for waiting in part]
        if self._db.takes_at_once and all(isinstance(entry, Delivered) for entry in entries):
            try:
                return await self._db.at_once(partial(self._pass_at_once, entries))
            except (StoreUnavailable, SchemaOutdated):
                raise
            except (StoreError, WriteConflict):
                pass  # it can be done the other way, or that tells why not
        return await self._db.write(partial(self._pass, entries))

    async def _pass_at_once(self, entries: list[Entry], connection: Any) -> Outcome:
        from tracker.store.batch_at_once import pass_at_once  # noqa: PLC0415 - as in `_statements`

        return await pass_at_once(connection, entries, self._rules, self._db.origin)

    def _pass(self, entries: list[Entry], connection: Connection) -> Outcome:
        return pass_batch(connection, entries, self._rules, self._statements)

    def _refuse_or_split(
        self, part: list[Waiting], error: Exception, parts: deque[list[Waiting]]
    ) -> None:
        if len(part) > 1:
            # Behind the parts that wait: theirs may be the good half.
            middle = len(part) // 2
            parts.extend([part[:middle], part[middle:]])
            return
        (waiting,) = part
        if isinstance(error, StoreError):
            refused = error
        else:
            refused = StoreError(f"this cannot be stored: {type(error).__name__}: {error}")
            refused.__cause__ = error
        log.error("door.refused", error=str(refused), entry=type(waiting.entry).__name__)
        if not waiting.answer.done():
            waiting.answer.set_exception(refused)

    def _settle(self, part: list[Waiting], outcome: Outcome) -> None:
        for hook in self._on_commit:
            _tell(hook, outcome)
        for waiting, passed in zip(part, outcome.passed, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(passed)


def _tell(hook: Callable[..., None], *what: object) -> None:
    """Call a hook, whose own faults are no fault of the door."""
    try:
        hook(*what)
    except Exception:
        log.exception("door.hook_failed")


def _statements(db: Database) -> Statements:
    # Each database's statements are built when they are first needed, and then once.
    if db.dialect == "sqlite":
        from tracker.store.batch_sqlite import SqliteStatements  # noqa: PLC0415

        return SqliteStatements()
    from tracker.store.batch_postgres import PostgresStatements  # noqa: PLC0415

    return PostgresStatements(db.origin)
