"""The outputs of runs as files: one job for each output, and what became of it.

What is there whole is not fetched again.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from tracker.core.clock import Clock
from tracker.core.record import Record
from tracker.core.run import Output, Tracking
from tracker.delivering.errors import MediaError
from tracker.delivering.fetch import Fetched, Fetcher
from tracker.delivering.names import stem
from tracker.delivering.part import Part
from tracker.delivering.shelf import Entry, Key, Shelf, digest_of

AHEAD: Final = 500
"""So many outputs are known of before they are fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A run whose outputs are wanted. `row` names its row where it is of a batch; such a row may
    have no run: `status` then says why."""

    record: Record | None
    row: str | None = None
    status: str = ""


class Outcome(StrEnum):
    """What became of one output."""

    FETCHED = "fetched"
    PRESENT = "present"
    """It was there whole."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One output to be there as a file. `name` is the file's, without its ending."""

    run_id: str
    position: int
    output: Output
    row: str | None
    name: str

    @property
    def key(self) -> Key:
        """What tells its file from every other."""
        return (self.row, self.run_id, self.position, self.output.output_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one output: its entry in the manifest, or why it could not be had."""

    job: Job
    outcome: Outcome
    entry: Entry | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A run, or a row, without outputs to fetch.

    `harmless` where none will ever be: it failed, or made none.
    """

    run_id: str | None
    row: str | None
    status: str
    harmless: bool


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of all outputs, and which runs had none to fetch."""

    results: list[Result] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)

    def of(self, outcome: Outcome) -> list[Result]:
        """The results with that outcome."""
        return [result for result in self.results if result.outcome is outcome]

    @property
    def complete(self) -> bool:
        """Whether every output that was asked for is there."""
        return not self.of(Outcome.FAILED) and all(one.harmless for one in self.absent)


OnBytes = Callable[[Job, int, int | None], None]
"""Told of a file under way: how many bytes are there, and of how many if that is known."""
OnResult = Callable[[Result], None]


class Work:
    """One download under way. `report` is the caller's: it is there when this is interrupted."""

    def __init__(
        self,
        shelf: Shelf,
        fetcher: Fetcher,
        report: Report,
        *,
        clock: Clock,
        on_bytes: OnBytes | None = None,
        on_result: OnResult | None = None,
    ) -> None:
        self._shelf = shelf
        self._fetcher = fetcher
        self._clock = clock
        self._report = report
        self._on_bytes = on_bytes
        self._on_result = on_result
        self._taken: set[tuple[str | None, str | None]] = set()
        self._queue: asyncio.Queue[Job | None] = asyncio.Queue(AHEAD)

    async def do(self, source: AsyncIterator[Wanted], *, concurrency: int) -> None:
        """Fetch every output of what `source` gives, so many at a time. A run that comes again is
        passed over. Raises what `source` raises."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._find(source, concurrency))
                for _ in range(concurrency):
                    group.create_task(self._fetch_all())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _find(self, source: AsyncIterator[Wanted], concurrency: int) -> None:
        async for wanted in source:
            record = wanted.record
            which = (wanted.row, None if record is None else record.run.run_id)
            if which in self._taken:
                continue
            self._taken.add(which)
            if (absent := _absent(wanted)) is not None:
                self._report.absent.append(absent)
            for job in jobs_of(wanted):
                await self._queue.put(job)
        for _ in range(concurrency):
            await self._queue.put(None)

    async def _fetch_all(self) -> None:
        while (job := await self._queue.get()) is not None:
            result = await self._fetch(job)
            self._report.results.append(result)
            if self._on_result is not None:
                self._on_result(result)

    async def _fetch(self, job: Job) -> Result:
        try:
            if job.output.type == "text":
                return await self._write_text(job)
            if (entry := await self._present(job)) is not None:
                return Result(job=job, outcome=Outcome.PRESENT, entry=entry)
            told = self._on_bytes
            fetched = await self._fetcher.fetch(
                job.output.url,
                self._shelf.folder,
                job.name,
                output_type=job.output.type,
                on_bytes=None if told is None else lambda size, whole: told(job, size, whole),
            )
        except MediaError as error:
            return Result(job=job, outcome=Outcome.FAILED, error=str(error))
        except OSError as error:
            reason = f"the file cannot be written: {error.strerror or error}"
            return Result(job=job, outcome=Outcome.FAILED, error=reason)
        return Result(job=job, outcome=Outcome.FETCHED, entry=self._keep(job, fetched))

    async def _present(self, job: Job) -> Entry | None:
        """The entry of an output that is there whole."""
        entry = self._shelf.find(job.key)
        if entry is None and (path := self._shelf.unlisted(job.name)) is not None:
            size, digest = await asyncio.to_thread(digest_of, path)
            return self._keep(job, Fetched(path=path, size=size, sha256=digest))
        return entry

    async def _write_text(self, job: Job) -> Result:
        """Keep a text, which stands in place of a link."""
        text = job.output.url.encode(errors="replace")
        entry = self._shelf.find(job.key)
        if entry is not None and entry.sha256 == hashlib.sha256(text).hexdigest():
            return Result(job=job, outcome=Outcome.PRESENT, entry=entry)
        part = Part(self._shelf.folder, job.name)
        path = self._shelf.folder / f"{job.name}.txt"

        def write() -> None:
            part.begin(None)
            part.write(text)
            part.finish(path)

        await asyncio.to_thread(write)
        written = Fetched(
            path=path,
            size=part.size,
            sha256=part.sha256,
            content_type="text/plain; charset=utf-8",
        )
        return Result(job=job, outcome=Outcome.FETCHED, entry=self._keep(job, written))

    def _keep(self, job: Job, fetched: Fetched) -> Entry:
        """Keep in the manifest that a file is there."""
        entry = Entry(
            file=fetched.path.name,
            row=job.row,
            run_id=job.run_id,
            position=job.position,
            output_id=job.output.output_id,
            type=job.output.type,
            size=fetched.size,
            sha256=fetched.sha256,
            content_type=fetched.content_type,
            at=f"{self._clock().replace(tzinfo=None).isoformat(timespec='seconds')}Z",
        )
        self._shelf.add(entry)
        return entry


def jobs_of(wanted: Wanted) -> Iterator[Job]:
    """A job for each output of a settled run. Files are named by row, run and output."""
    record = wanted.record
    if record is None or record.tracking is not Tracking.SETTLED:
        return
    outputs = record.run.outputs or ()
    ids = [output.output_id for output in outputs]
    for position, output in enumerate(outputs):
        parts = [record.run.run_id, output.output_id]
        if not output.output_id or ids.count(output.output_id) > 1:
            parts.append(str(position))
        if wanted.row is not None:
            parts.insert(0, wanted.row)
        yield Job(
            run_id=record.run.run_id,
            position=position,
            output=output,
            row=wanted.row,
            name=stem(*parts),
        )


def _absent(wanted: Wanted) -> Absent | None:
    """Why a run has no outputs to fetch; `None` where it has."""
    record = wanted.record
    if record is None:
        refused = wanted.status == "refused"
        return Absent(run_id=None, row=wanted.row, status=wanted.status, harmless=refused)
    run = record.run
    if record.tracking is not Tracking.SETTLED:
        status = "lost" if record.tracking is Tracking.LOST else str(run.status)
        return Absent(run_id=run.run_id, row=wanted.row, status=status, harmless=False)
    if not run.outputs:
        return Absent(run_id=run.run_id, row=wanted.row, status=str(run.status), harmless=True)
    return None
