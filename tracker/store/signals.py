"""Signals: changes in the database are reported within the process and to other processes.

Within a process the writer reports them after each commit. On PostgreSQL a write batch also
notifies, as part of its transaction, and every process listens on a connection of its own. A signal
is a hint: it may come twice or, while that connection is down, not at all, so every wait has a
time-out.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import orjson

from tracker.core.log import get_logger
from tracker.core.waiting import cancel, wait_for
from tracker.store.engine import Database
from tracker.store.postgres import connect_postgres

if TYPE_CHECKING:
    from tracker.store.writing.writer import WriteOutcome

ALIVE_SECONDS: Final = 20.0
"""How often the listening connection is checked."""
RETRY_SECONDS: Final = (0.2, 5.0)

# The channels of PostgreSQL. Every payload names the `Database.origin` that sent it, so that a
# process can ignore its own.
DUE: Final = "tracker_due"
"""A poll was brought forward, or a claimed run released. The payload is the origin."""
RUNS: Final = "tracker_runs"
"""Runs changed. The payload is a JSON list: the origin, then the ids of the runs."""
INBOX: Final = "tracker_inbox"
"""Deliveries wait that the origin has no time to apply. The payload is the origin."""
OUTBOX: Final = "tracker_outbox"
"""Events or messages are to be sent to endpoints. The payload is the origin."""
PAYLOAD_BYTES: Final = 7500
"""PostgreSQL takes 7999 bytes in one notification; the rest is for the origin."""

Listener = Callable[[Sequence[str]], None]
"""Called in the event loop with the ids of changed runs; with none where some may be missed."""

log = get_logger(__name__)


def run_notices(origin: str, run_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Channels and payloads that name all these runs, in as few notifications as hold them.

    A run whose id alone is longer than a notification is left out.
    """
    payloads: list[list[str]] = []
    space = 0
    for run_id in run_ids:
        size = len(orjson.dumps(run_id)) + 1
        if size > PAYLOAD_BYTES:
            continue
        if size > space:
            payloads.append([origin])
            space = PAYLOAD_BYTES
        payloads[-1].append(run_id)
        space -= size
    return [(RUNS, orjson.dumps(each).decode()) for each in payloads]


def read_runs(payload: str) -> tuple[str, list[str]]:
    """Origin and runs of a `RUNS` notification; empty if another program uses the channel."""
    try:
        value: Any = orjson.loads(payload)
    except ValueError:
        return "", []
    if not value or not isinstance(value, list):
        return "", []
    if not all(isinstance(each, str) for each in value):
        return "", []
    return value[0], value[1:]


class Signals:
    """Wakes the worker and the stream. `committed` is a hook of the writer.

    Listens to other processes as well within `async with Signals(database) as signals`.
    `retry_seconds` are the first and the longest wait before a lost connection is made again.
    """

    def __init__(self, db: Database, *, retry_seconds: tuple[float, float] = RETRY_SECONDS) -> None:
        self._db = db
        self._retry_seconds = retry_seconds
        self._due = asyncio.Event()
        self._listeners: set[Listener] = set()
        self._on_inbox: Callable[[], None] = lambda: None
        self._on_event: Callable[[], None] = lambda: None
        self._on_outbox: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None
        self._listening = False

    async def __aenter__(self) -> Self:
        if self._db.dialect == "postgresql":
            self._task = asyncio.create_task(self._listen(), name="signals")
        return self

    async def __aexit__(self, *_: object) -> None:
        task, self._task = self._task, None
        await cancel(task)

    def when_inbox_waits(self, call: Callable[[], None]) -> None:
        """Call `call` whenever another process has stored what it has no time to apply."""
        self._on_inbox = call

    def when_outbox_waits(
        self, committed: Callable[[], None], notified: Callable[[], None]
    ) -> None:
        """Call `committed` whenever this process has committed an event, and `notified` whenever
        another one has committed events or messages."""
        self._on_event, self._on_outbox = committed, notified

    @property
    def listening(self) -> bool:
        """Whether signals of other processes arrive now; on SQLite there are none."""
        return self._db.dialect == "sqlite" or self._listening

    async def wait_due(self, timeout: float) -> bool:
        """Wait until a poll is brought forward, at most `timeout` seconds; whether one was.

        Signals since the last call count, so that none is missed between two calls.
        """
        if not await wait_for(self._due, timeout):
            return False
        self._due.clear()
        return True

    def wake_due(self) -> None:
        """End the present or the next `wait_due` of this process."""
        self._due.set()

    @contextlib.contextmanager
    def subscribed(self, listener: Listener) -> Iterator[None]:
        """Call `listener` for every change of a run for as long as the block lasts."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def committed(self, outcome: "WriteOutcome") -> None:
        """Hook of the writer: report a commit of this process."""
        if outcome.due:
            self._due.set()
        if outcome.changed_runs:
            self._publish(outcome.changed_runs)
        if outcome.outbox:
            self._on_event()

    async def announce_outbox(self) -> None:
        """Tell other processes that something is to be sent. Raises `StoreUnavailable`."""
        if self._db.dialect == "postgresql":
            await self._db.send("SELECT pg_notify($1, $2)", (OUTBOX, self._db.origin))

    def _publish(self, run_ids: Sequence[str]) -> None:
        for listener in tuple(self._listeners):
            listener(run_ids)

    async def _listen(self) -> None:
        wait, longest = self._retry_seconds
        is_reported = False
        while True:
            listened = False
            try:
                connection = await connect_postgres(self._db.url, "tracker-signals")
                try:
                    await self._listen_on(connection)
                finally:
                    listened, self._listening = self._listening, False
                    connection.terminate()
            except Exception as exc:
                # Whatever the driver raises in a handshake: without this task no signal arrives.
                if listened or not is_reported:
                    log.warning("signals.lost", error=type(exc).__name__)
                is_reported = True
            else:
                is_reported = False
            wait = self._retry_seconds[0] if listened else min(wait * 2, longest)
            await asyncio.sleep(wait)

    async def _listen_on(self, connection: Any) -> None:
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        for channel in (DUE, RUNS, INBOX, OUTBOX):
            await connection.add_listener(channel, self._on_notification)
        self._listening = True
        # Signals were missed while nothing listened.
        self._due.set()
        self._on_outbox()
        self._publish(())
        while not lost.is_set():
            if not await wait_for(lost, ALIVE_SECONDS):
                await connection.execute("SELECT 1")

    def _on_notification(self, _connection: Any, _pid: int, channel: str, payload: str) -> None:
        origin, run_ids = read_runs(payload) if channel == RUNS else (payload, [])
        if origin == self._db.origin:
            return
        if channel == RUNS:
            self._publish(run_ids)
        elif channel == DUE:
            self._due.set()
        elif channel == OUTBOX:
            self._on_outbox()
        else:
            self._on_inbox()
