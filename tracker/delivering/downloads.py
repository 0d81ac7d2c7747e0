"""`tracker runs download`: the outputs of runs as files, one for each output.

A file that is there already is not fetched again. FLORA's links expire, so runs can also be
followed and downloaded as each settles.
"""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import TrackerError
from tracker.core.formatting import counted
from tracker.core.record import Record
from tracker.core.run import Output, Tracking
from tracker.delivering.addresses import MediaError
from tracker.delivering.fetch import MAX_BYTES, FetchedFile, Fetcher
from tracker.delivering.files import (
    DownloadDirectory,
    FileKey,
    ManifestEntry,
    PartialFile,
    digest_of,
)
from tracker.polling.follow import CHECK_ANYWAY, CHECK_EVERY, Follower, Notify, until_available
from tracker.starting.batch_rows import RowState, kept_rows
from tracker.store.engine import Database
from tracker.store.queries import batches, changes, runs
from tracker.store.signals import Signals

QUEUED: Final = 500
"""Maximum number of outputs that wait to be fetched."""
LONGEST_PART: Final = 60
"""Characters. With four parts, an ending and `.part.json` a file name stays below 255 bytes."""
_NOT_STARTED: Final = ("not_started", "sending")
_HARMLESS: Final = re.compile(r"[A-Za-z0-9_-]+")
_OTHER: Final = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadOptions:
    """Where files go, and what may be fetched. `max_bytes` limits each file."""

    to: Path
    allow_private: bool = False
    max_bytes: int = MAX_BYTES
    concurrency: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRun:
    """A run whose outputs are wanted.

    `row` is its row in a batch. A row may have no run (`record`): `status` says why.
    """

    record: Record | None
    row: str | None = None
    status: str = ""


class DownloadOutcome(StrEnum):
    """What happened to one output."""

    FETCHED = "fetched"
    PRESENT = "present"
    """It was downloaded before."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadJob:
    """One output to save as a file. `name` is the file's name without its ending."""

    run_id: str
    position: int
    output: Output
    row: str | None
    name: str

    @property
    def key(self) -> FileKey:
        """Identifies the file in the manifest."""
        return (self.row, self.run_id, self.position, self.output.output_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadResult:
    """The result for one output: its entry in the manifest, or the error."""

    job: DownloadJob
    outcome: DownloadOutcome
    entry: ManifestEntry | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunWithoutOutputs:
    """A run, or a row of a batch, with nothing to fetch.

    `harmless` if it never will have outputs: it failed, or completed without any.
    """

    run_id: str | None
    row: str | None
    status: str
    harmless: bool


@dataclass(slots=True, kw_only=True)
class DownloadReport:
    """Results for all outputs, and the runs that had nothing to fetch."""

    results: list[DownloadResult] = field(default_factory=list)
    absent: list[RunWithoutOutputs] = field(default_factory=list)

    def of(self, outcome: DownloadOutcome) -> list[DownloadResult]:
        """The results with that outcome."""
        return [result for result in self.results if result.outcome is outcome]

    @property
    def complete(self) -> bool:
        """Whether every requested output is there."""
        return not self.of(DownloadOutcome.FAILED) and all(one.harmless for one in self.absent)


OnJobBytes = Callable[[DownloadJob, int, int | None], None]
"""Called with the bytes received so far for a file and its total, if known."""
OnResult = Callable[[DownloadResult], None]


class Downloader:
    """Selects runs (`named`, `batch`, `settled`) and downloads their outputs."""

    def __init__(
        self, *, database: Database, signals: Signals, follower: Follower, clock: Clock
    ) -> None:
        self._database = database
        self._signals = signals
        self._follower = follower
        self._clock = clock

    async def named(
        self, run_ids: Sequence[str], *, watch: bool, notify: Notify | None = None
    ) -> AsyncIterator[WantedRun]:
        """These runs; with `watch` each once it is settled or lost."""
        if not watch:
            known = await runs.get_runs(self._database, run_ids)
            for run_id in run_ids:
                if run_id in known:
                    yield WantedRun(record=known[run_id])
            return
        async with aclosing(self._follower.follow(run_ids, notify=notify)) as updates:
            async for updated in updates:
                for record, _ in updated:
                    if record.tracking is not Tracking.ACTIVE:
                        yield WantedRun(record=record)

    async def batch(
        self, batch_id: str, *, watch: bool, notify: Notify | None = None
    ) -> AsyncIterator[WantedRun]:
        """The runs of a batch, row by row.

        With `watch` each once it is settled or lost, including runs that another command has yet
        to start. Raises `TrackerError` for an unknown batch.
        """
        rows = await self._rows(batch_id)
        if watch:
            row_of: dict[str, str] = {}
            told = False

            async def more() -> tuple[Sequence[str], bool]:
                nonlocal told
                rows = await self._rows(batch_id)
                new = {row.run_id: row.name for row in rows if row.run_id}
                new = {run_id: name for run_id, name in new.items() if run_id not in row_of}
                row_of.update(new)
                not_started = [row for row in rows if row.not_started]
                if not_started and not new and not told and notify is not None:
                    told = True
                    rows_are = counted(len(not_started), "row is", "rows are")
                    notify(f"{rows_are} not started yet: `tracker batch` starts them")
                return list(new), bool(not_started)

            async with aclosing(self._follower.follow((), more=more, notify=notify)) as updates:
                async for updated in updates:
                    for record, _ in updated:
                        if record.tracking is not Tracking.ACTIVE:
                            yield WantedRun(record=record, row=row_of[record.run.run_id])
            rows = [row for row in await self._rows(batch_id) if row.run_id is None]
        for row in rows:
            yield WantedRun(record=row.state.record, row=row.name, status=row.state.status)

    async def _rows(self, batch_id: str) -> "list[_BatchRow]":
        batch = await batches.get(self._database, batch_id)
        if batch is None:
            raise TrackerError(f"batch {batch_id} is not known: `tracker batches list` shows all")
        states = await kept_rows(self._database, batch)
        width = len(str(max((state.entry.position for state in states), default=0)))
        return [
            _BatchRow(
                state=state,
                name=f"{state.entry.position:0{width}}",
                not_started=batch.finished_at is None and state.status in _NOT_STARTED,
            )
            for state in states
        ]

    async def settled(
        self, *, technique_id: str | None, watch: bool, notify: Notify | None = None
    ) -> AsyncIterator[WantedRun]:
        """All settled runs, newest first; with `watch` then each run that settles, forever.

        Some come more than once.
        """
        changed = asyncio.Event()
        with self._signals.subscribed(lambda _: changed.set()):
            reached = await changes.newest(self._database)
            cursor: str | None = None
            while True:
                page, cursor = await runs.list_runs(
                    self._database,
                    tracking=Tracking.SETTLED,
                    technique_id=technique_id,
                    cursor=cursor,
                    limit=100,
                )
                for record in page:
                    yield WantedRun(record=record)
                if cursor is None:
                    break
            while watch:
                changed.clear()
                settled_since = partial(
                    changes.settled_since, self._database, reached, technique_id=technique_id
                )
                records, reached = await until_available(settled_since, notify)
                for record in records:
                    yield WantedRun(record=record)
                notified = self._database.dialect == "postgresql" and self._signals.listening
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_ANYWAY if notified else CHECK_EVERY):
                        await changed.wait()

    async def download(
        self,
        source: AsyncIterator[WantedRun],
        options: DownloadOptions,
        report: DownloadReport,
        *,
        on_bytes: OnJobBytes | None = None,
        on_result: OnResult | None = None,
    ) -> None:
        """Fetch every output of the runs of `source`, and add the results to `report`.

        The caller passes the report in, to have it after an interruption. A run that comes again
        is skipped. Raises `DownloadDirectoryError`, and whatever `source` raises.
        """
        queue: asyncio.Queue[DownloadJob | None] = asyncio.Queue(QUEUED)

        async def find_jobs() -> None:
            seen: set[tuple[str | None, str | None]] = set()
            async for wanted in source:
                run_id = None if wanted.record is None else wanted.record.run.run_id
                if (wanted.row, run_id) in seen:
                    continue
                seen.add((wanted.row, run_id))
                if (absent := _absent(wanted)) is not None:
                    report.absent.append(absent)
                for job in jobs_of(wanted):
                    await queue.put(job)
            for _ in range(options.concurrency):
                await queue.put(None)

        async def save_all(saver: "_OutputSaver") -> None:
            while (job := await queue.get()) is not None:
                result = await saver.save(job, on_bytes)
                report.results.append(result)
                if on_result is not None:
                    on_result(result)

        with DownloadDirectory(options.to) as directory:
            async with Fetcher(
                allow_private=options.allow_private, max_bytes=options.max_bytes
            ) as fetcher:
                saver = _OutputSaver(directory, fetcher, self._clock)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(find_jobs())
                        for _ in range(options.concurrency):
                            group.create_task(save_all(saver))
                except BaseExceptionGroup as several:
                    raise several.exceptions[0] from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchRow:
    """A row of a batch, named by its position."""

    state: RowState
    name: str
    not_started: bool

    @property
    def run_id(self) -> str | None:
        return None if self.state.record is None else self.state.record.run.run_id


class _OutputSaver:
    """Saves single outputs in the download directory."""

    def __init__(self, directory: DownloadDirectory, fetcher: Fetcher, clock: Clock) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._clock = clock

    async def save(self, job: DownloadJob, on_bytes: OnJobBytes | None) -> DownloadResult:
        outcome = DownloadOutcome.FETCHED
        try:
            if job.output.type == "text":
                text = job.output.url.encode(errors="replace")
                entry = self._directory.find(job.key)
                if entry is not None and entry.sha256 == hashlib.sha256(text).hexdigest():
                    outcome = DownloadOutcome.PRESENT
                else:
                    entry = self._add(job, await asyncio.to_thread(self._write_text, job, text))
            elif (entry := await self._present(job)) is not None:
                outcome = DownloadOutcome.PRESENT
            else:
                fetched = await self._fetcher.fetch(
                    job.output.url,
                    self._directory.folder,
                    job.name,
                    output_type=job.output.type,
                    on_bytes=None if on_bytes is None else partial(on_bytes, job),
                )
                entry = self._add(job, fetched)
        except (MediaError, OSError) as error:
            if isinstance(error, OSError):
                message = f"the file cannot be written: {error.strerror or error}"
            else:
                message = str(error)
            return DownloadResult(job=job, outcome=DownloadOutcome.FAILED, error=message)
        return DownloadResult(job=job, outcome=outcome, entry=entry)

    async def _present(self, job: DownloadJob) -> ManifestEntry | None:
        """The entry of a file that is complete; one that the manifest lacks is added to it."""
        entry = self._directory.find(job.key)
        if entry is None and (path := self._directory.unlisted(job.name)) is not None:
            size, digest = await asyncio.to_thread(digest_of, path)
            return self._add(job, FetchedFile(path=path, size=size, sha256=digest))
        return entry

    def _write_text(self, job: DownloadJob, text: bytes) -> FetchedFile:
        """Save a text, which FLORA shows in place of a link."""
        part = PartialFile(self._directory.folder, job.name)
        path = self._directory.folder / f"{job.name}.txt"
        part.start(None)
        part.write(text)
        part.finish(path)
        content_type = "text/plain; charset=utf-8"
        return FetchedFile(path=path, size=part.size, sha256=part.sha256, content_type=content_type)

    def _add(self, job: DownloadJob, file: FetchedFile) -> ManifestEntry:
        entry = ManifestEntry(
            file=file.path.name,
            row=job.row,
            run_id=job.run_id,
            position=job.position,
            output_id=job.output.output_id,
            type=job.output.type,
            size=file.size,
            sha256=file.sha256,
            content_type=file.content_type,
            at=f"{self._clock().replace(tzinfo=None).isoformat(timespec='seconds')}Z",
        )
        self._directory.add(entry)
        return entry


def jobs_of(wanted: WantedRun) -> Iterator[DownloadJob]:
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
        yield DownloadJob(
            run_id=record.run.run_id,
            position=position,
            output=output,
            row=wanted.row,
            name=file_stem(*parts),
        )


def _absent(wanted: WantedRun) -> RunWithoutOutputs | None:
    """Why a run has nothing to fetch; `None` if it has outputs."""
    record, run_id, harmless = wanted.record, None, False
    if record is None:
        status, harmless = wanted.status, wanted.status == "refused"
    else:
        run_id, status = record.run.run_id, str(record.run.status)
        if record.tracking is Tracking.LOST:
            status = "lost"
        elif record.tracking is Tracking.SETTLED:
            if record.run.outputs:
                return None
            harmless = True
    return RunWithoutOutputs(run_id=run_id, row=wanted.row, status=status, harmless=harmless)


def file_stem(*identifiers: str) -> str:
    """A file name without its ending: safe, readable, and different for different identifiers.

    Where characters are replaced or cut off, a piece of the identifier's digest is added.
    """
    return ".".join(map(_name_part, identifiers))


def _name_part(text: str) -> str:
    """`text` as one part of a name: never empty, without dots, slashes or a leading dash."""
    if len(text) <= LONGEST_PART and _HARMLESS.fullmatch(text) and not text.startswith("-"):
        return text
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    kept = _OTHER.sub("_", text).strip("_-")[: LONGEST_PART - len(digest) - 1]
    return f"{kept}-{digest}" if kept else digest
