"""Who waits for a change in the database is told, within the process and across processes.

Within a process the writer reports it after each commit. On PostgreSQL a write batch also notifies,
as part of its transaction, and every process listens on a connection of its own. A signal is a
hint: it may come twice or, while that connection is down, not at all, so every wait has a time-out.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self

import structlog

from tracker.store.engine import Database
from tracker.store.notices import DUE, INBOX, RUNS, read_origin, read_runs
from tracker.store.postgres import connect_postgres
from tracker.store.writing.writer import WriteOutcome

ALIVE_SECONDS: Final = 20.0
"""How often the listening connection is asked whether it still lives."""
RETRY_SECONDS: Final = (0.2, 5.0)
"""The first and the longest wait before it is made anew."""

Listener = Callable[[Sequence[str]], None]
"""Called in the event loop with the ids of changed runs; with none where some may be missed."""

log = structlog.get_logger(__name__)


class Signals:
    """What the worker and the stream wait on. `committed` is a hook for the writer.

    Used as `async with Signals(database) as signals`, in the event loop that waits.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._due = asyncio.Event()
        self._listeners: set[Listener] = set()
        self._on_inbox: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def start(self) -> None:
        """Listen to other processes too, where the database can carry it."""
        if self._db.dialect == "postgresql" and self._task is None:
            self._task = asyncio.create_task(self._listen(), name="signals")

    def when_inbox_waits(self, call: Callable[[], None]) -> None:
        """Call `call` whenever another process has stored what it has no time to apply."""
        self._on_inbox = call

    async def aclose(self) -> None:
        """Stop listening."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    @property
    def listening(self) -> bool:
        """Whether other processes are heard at this moment; on SQLite there are none."""
        return self._db.dialect == "sqlite" or self._listening.is_set()

    async def wait_listening(self) -> None:
        """Return as soon as other processes are heard."""
        if self._db.dialect == "postgresql":
            await self._listening.wait()

    async def wait_due(self, timeout: float) -> bool:
        """Wait until a look is brought forward, at most `timeout` seconds; whether one was.

        What happened since the last call counts, so that nothing is missed between two.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._due.wait()
        except TimeoutError:
            return False
        self._due.clear()
        return True

    @contextlib.contextmanager
    def subscribed(self, listener: Listener) -> Iterator[None]:
        """Tell `listener` of every change of a run for as long as the block lasts."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def committed(self, outcome: WriteOutcome) -> None:
        """The writer's hook: pass on what a commit of this process did."""
        if outcome.due:
            self._due.set()
        if outcome.changed_runs:
            self._tell(outcome.changed_runs)

    def _tell(self, run_ids: Sequence[str]) -> None:
        for listener in tuple(self._listeners):
            listener(run_ids)

    async def _listen(self) -> None:
        wait, longest = RETRY_SECONDS
        said = False
        while True:
            heard = False
            try:
                connection = await connect_postgres(self._db.url, "tracker-signals")
                try:
                    await self._listen_on(connection)
                finally:
                    heard = self._listening.is_set()
                    self._listening.clear()
                    connection.terminate()
            except Exception as exc:
                # Whatever the driver raises in a handshake: without this task nobody is told.
                if heard or not said:
                    log.warning("signals.lost", error=type(exc).__name__)
                said = True
            else:
                said = False
            wait = RETRY_SECONDS[0] if heard else min(wait * 2, longest)
            await asyncio.sleep(wait)

    async def _listen_on(self, connection: Any) -> None:
        gone = asyncio.Event()
        connection.add_termination_listener(lambda _: gone.set())
        await connection.add_listener(DUE, self._heard)
        await connection.add_listener(RUNS, self._heard)
        await connection.add_listener(INBOX, self._heard)
        self._listening.set()
        # Whatever was said while nobody listened is made up for by looking.
        self._due.set()
        self._tell(())
        while not gone.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ALIVE_SECONDS):
                    await gone.wait()
            if not gone.is_set():
                await connection.execute("SELECT 1")

    def _heard(self, _connection: Any, _pid: int, channel: str, payload: str) -> None:
        if channel != RUNS:
            if read_origin(payload) != self._db.origin:
                self._due.set() if channel == DUE else self._on_inbox()
            return
        origin, run_ids = read_runs(payload)
        if origin != self._db.origin:
            self._tell(run_ids)
