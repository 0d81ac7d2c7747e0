"""Which runs to download: named ones, a batch's, or all that have settled.

FLORA's links do not live for ever, so runs can also be followed, and each be downloaded as it
settles.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import TrackerError
from tracker.core.run import Tracking
from tracker.delivering.fetch import MAX_BYTES, Fetcher
from tracker.delivering.outputs import OnBytes, OnResult, Report, Wanted, Work
from tracker.delivering.shelf import Shelf
from tracker.polling.follow import LOOK_ANYWAY, LOOK_EVERY, Follower, Tell, patiently
from tracker.starting.batch_rows import RowState, kept_rows
from tracker.store.engine import Database
from tracker.store.queries import batches
from tracker.store.queries import changes as news
from tracker.store.queries import runs as read
from tracker.store.signals import Signals
from tracker.tracking.telling.words import counted

CONCURRENCY: Final = 4
_TO_COME: Final = ("not_started", "sending")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Where files go, and what may be fetched. `max_bytes` bounds each file."""

    to: Path
    allow_private: bool = False
    max_bytes: int = MAX_BYTES
    concurrency: int = CONCURRENCY


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A row of a batch, named by its position. One that is `to_come` has yet to be started."""

    state: RowState
    name: str
    to_come: bool

    @property
    def run_id(self) -> str | None:
        return None if self.state.record is None else self.state.record.run.run_id


class Downloader:
    """Finds runs, and fetches their outputs."""

    def __init__(
        self, *, database: Database, signals: Signals, follower: Follower, clock: Clock
    ) -> None:
        self._database = database
        self._signals = signals
        self._follower = follower
        self._clock = clock

    async def named(
        self, run_ids: Sequence[str], *, watch: bool, tell: Tell | None = None
    ) -> AsyncIterator[Wanted]:
        """These runs as they stand; with `watch` each once it is settled or lost."""
        if not watch:
            known = await read.get_runs(self._database, run_ids)
            for run_id in run_ids:
                if run_id in known:
                    yield Wanted(record=known[run_id])
            return
        async with aclosing(self._follower.follow(run_ids, tell=tell)) as changes:
            async for sights in changes:
                for record, _ in sights:
                    if record.tracking is not Tracking.ACTIVE:
                        yield Wanted(record=record)

    async def batch(
        self, batch_id: str, *, watch: bool, tell: Tell | None = None
    ) -> AsyncIterator[Wanted]:
        """The runs of a batch, row by row; with `watch` each once it is settled or lost, those too
        that another command is yet to start. Raises `TrackerError` for a batch that is not known.
        """
        rows = await self._rows(batch_id)
        if watch:
            names: dict[str, str] = {}
            told = False

            async def more() -> tuple[Sequence[str], bool]:
                nonlocal told
                rows = await self._rows(batch_id)
                new = {
                    row.run_id: row.name for row in rows if row.run_id and row.run_id not in names
                }
                names.update(new)
                to_come = [row for row in rows if row.to_come]
                if to_come and not new and not told and tell is not None:
                    told = True
                    rows_are = counted(len(to_come), "row is", "rows are")
                    tell(f"{rows_are} not started yet: `tracker batch` starts them")
                return list(new), bool(to_come)

            async with aclosing(self._follower.follow((), more=more, tell=tell)) as changes:
                async for sights in changes:
                    for record, _ in sights:
                        if record.tracking is not Tracking.ACTIVE:
                            yield Wanted(record=record, row=names[record.run.run_id])
            rows = [row for row in await self._rows(batch_id) if row.run_id is None]
        for row in rows:
            yield Wanted(record=row.state.record, row=row.name, status=row.state.status)

    async def _rows(self, batch_id: str) -> "list[_Row]":
        batch = await batches.get(self._database, batch_id)
        if batch is None:
            raise TrackerError(
                f"batch {batch_id} is not known here: `tracker batches list` shows all"
            )
        states = await kept_rows(self._database, batch)
        width = len(str(max((state.entry.position for state in states), default=0)))
        return [
            _Row(
                state=state,
                name=f"{state.entry.position:0{width}}",
                to_come=batch.finished_at is None and state.status in _TO_COME,
            )
            for state in states
        ]

    async def settled(
        self, *, technique_id: str | None, watch: bool, tell: Tell | None = None
    ) -> AsyncIterator[Wanted]:
        """All runs that have settled, newest first; with `watch` then each that settles, for ever.

        Some come more than once.
        """
        changed = asyncio.Event()
        with self._signals.subscribed(lambda _: changed.set()):
            reached = await news.last_number(self._database)
            cursor: str | None = None
            while True:
                page, cursor = await read.list_runs(
                    self._database,
                    tracking=Tracking.SETTLED,
                    technique_id=technique_id,
                    cursor=cursor,
                    limit=100,
                )
                for record in page:
                    yield Wanted(record=record)
                if cursor is None:
                    break
            while watch:
                changed.clear()
                look = partial(
                    news.settled_since, self._database, reached, technique_id=technique_id
                )
                records, reached = await patiently(look, tell)
                for record in records:
                    yield Wanted(record=record)
                await self._pause(changed)

    async def download(
        self,
        source: AsyncIterator[Wanted],
        order: Order,
        report: Report,
        *,
        on_bytes: OnBytes | None = None,
        on_result: OnResult | None = None,
    ) -> None:
        """Fetch every output of the runs of `source`, and add to `report` what became of it.

        The report is the caller's, so that it is there when this is interrupted. Raises
        `ShelfError` where the folder cannot be used, and whatever `source` raises.
        """
        with Shelf(order.to) as shelf:
            async with Fetcher(
                allow_private=order.allow_private, max_bytes=order.max_bytes
            ) as fetcher:
                work = Work(
                    shelf,
                    fetcher,
                    report,
                    clock=self._clock,
                    on_bytes=on_bytes,
                    on_result=on_result,
                )
                await work.do(source, concurrency=order.concurrency)

    async def _pause(self, changed: asyncio.Event) -> None:
        told = self._database.dialect == "postgresql" and self._signals.listening
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_ANYWAY if told else LOOK_EVERY):
                await changed.wait()
