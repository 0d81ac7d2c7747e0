"""The outputs of runs as files, one for each output, and those of a batch as one ZIP.

A file that is there already is not fetched again. FLORA's links expire, so runs can also be
followed and downloaded as each settles.

The ZIP is written while its files are fetched: a few at a time, in the order of the sheet, into a
temporary folder, and deleted once they are in it, so that neither memory nor disk grows with the
batch. Pictures and videos are compressed already, so files are stored as they are.
"""

import asyncio
import tempfile
import zipfile
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

from tracker.core.clock import Clock
from tracker.core.errors import DownloadDirectoryError, StoreError, TrackerError
from tracker.core.events import RunFilter
from tracker.core.formatting import counted
from tracker.core.record import Record
from tracker.core.run import Tracking
from tracker.core.waiting import run_all
from tracker.delivering.addresses import MediaError
from tracker.delivering.fetch import MAX_BYTES, Fetcher
from tracker.delivering.files import DownloadDirectory
from tracker.delivering.saving import (
    DownloadJob,
    DownloadOutcome,
    DownloadResult,
    OnJobBytes,
    OutputSaver,
    RenewedLink,
    WantedRun,
    jobs_of,
    row_names,
    row_numbers,
)
from tracker.flora.parse import ports
from tracker.polling.changes import Broadcaster
from tracker.polling.follow import Follower, More, Notify
from tracker.polling.poll import Poller
from tracker.starting.rows import kept_rows
from tracker.store.engine import Database
from tracker.store.queries import batches, runs, techniques

T = TypeVar("T")

QUEUED: Final = 500
"""Maximum number of outputs that wait to be fetched."""
FRUITLESS_READS: Final = 10
"""Runs in a row that show no new link, after which FLORA is not asked for others."""
_NOT_STARTED: Final = ("not_started", "sending")
ZIP_AHEAD: Final = 6
"""Files that are fetched at the same time for a ZIP."""
ZIP_FILE_BYTES: Final = 512 * 1024**2
"""Bytes of the largest file in a ZIP."""
ZIP_ATTEMPTS: Final = 2
"""Attempts for each file without progress: someone waits for the ZIP."""
MISSING: Final = "MISSING.txt"
"""Lists the outputs that could not be fetched and the rows without outputs, if there are any."""
_BLOCK: Final = 256 * 1024

_Fetched = Path | bytes | str
"""A file, a text, or why it could not be fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadOptions:
    """Where files go, and what may be fetched. `max_bytes` limits each file."""

    to: Path
    allow_private: bool = False
    max_bytes: float = MAX_BYTES
    concurrency: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunWithoutOutputs:
    """A run, or a row of a batch, with nothing to fetch.

    `harmless` if it never will have outputs: it failed, or completed without any. `awaited` if it
    completed and outputs may still come: FLORA is asked again.
    """

    run_id: str | None
    row: str | None
    status: str
    harmless: bool
    awaited: bool = False


@dataclass(slots=True, kw_only=True)
class DownloadReport:
    """Results for all outputs, and the runs that had nothing to fetch.

    `failure` is why the directory could not be used, where that did not end the command.
    """

    results: list[DownloadResult] = field(default_factory=list)
    absent: list[RunWithoutOutputs] = field(default_factory=list)
    failure: str | None = None

    def of(self, outcome: DownloadOutcome) -> list[DownloadResult]:
        return [result for result in self.results if result.outcome is outcome]

    @property
    def complete(self) -> bool:
        """Whether every requested output is there."""
        return (
            self.failure is None
            and not self.of(DownloadOutcome.FAILED)
            and all(one.harmless for one in self.absent)
        )


OnResult = Callable[[DownloadResult], None]


@dataclass(kw_only=True, eq=False)
class Downloader:
    """Selects runs (`named`, `batch`, `settled`) and downloads their outputs."""

    database: Database
    follower: Follower
    changes: Broadcaster
    poller: Poller
    clock: Clock

    async def named(
        self, run_ids: Sequence[str], *, watch: bool, notify: Notify | None = None
    ) -> AsyncIterator[WantedRun]:
        """These runs; with `watch` each once it is settled or lost."""
        if not watch:
            known = await runs.get_runs(self.database, run_ids)
            for run_id in run_ids:
                if run_id in known:
                    yield WantedRun(record=known[run_id])
            return
        async with aclosing(self._ended(run_ids, None, notify)) as ended:
            async for record in ended:
                yield WantedRun(record=record)

    async def _ended(
        self, run_ids: Sequence[str], more: More | None, notify: Notify | None
    ) -> AsyncGenerator[Record, None]:
        """Each of these runs, and of `more`, once it is settled or lost."""
        async with aclosing(self.follower.follow(run_ids, more=more, notify=notify)) as updates:
            async for updated in updates:
                for record, _ in updated:
                    if record.tracking is not Tracking.ACTIVE:
                        yield record

    async def batch(
        self,
        batch_id: str,
        *,
        watch: bool,
        name_by: str | None = None,
        notify: Notify | None = None,
    ) -> AsyncIterator[WantedRun]:
        """The runs of a batch, row by row.

        With `watch` each once it is settled or lost, including runs that another command has yet
        to start, and those that callbacks have yet to name. Files are named by the column
        `name_by`, else by the row's number. Raises `TrackerError` for an unknown batch,
        `InvalidRequest` for an unknown column.
        """
        rows = await self._rows(batch_id, name_by)
        if watch:
            row_of: dict[str, WantedRun] = {}
            report = notify

            async def more() -> tuple[Sequence[str], bool]:
                nonlocal report
                rows = await self._rows(batch_id, name_by)
                new = {row.run_id: row for row in rows if row.run_id and row.run_id not in row_of}
                row_of.update(new)
                not_started = sum(row.is_to_start for row in rows)
                if not_started and not new and report is not None:
                    rows_are = counted(not_started, "row is", "rows are")
                    report(f"{rows_are} not started yet: `tracker batch` starts them")
                    report = None  # once
                return list(new), not_started > 0 or await self._gets_runs(batch_id)

            async with aclosing(self._ended((), more, notify)) as ended:
                async for record in ended:
                    row = row_of[record.run.run_id]
                    yield replace(row, record=record, status=record.shown_status)
            rows = [row for row in await self._rows(batch_id, name_by) if row.run_id is None]
        for row in rows:
            yield row

    async def _gets_runs(self, batch_id: str) -> bool:
        counts = await batches.batch_counts(self.database, [batch_id])
        return counts[batch_id].gets_runs(self.clock())

    async def _rows(self, batch_id: str, name_by: str | None) -> list[WantedRun]:
        """The runs of a batch, row by row, and rows without one."""
        batch = await batches.get(self.database, batch_id)
        if batch is None:
            raise TrackerError(f"batch {batch_id} is not known: `tracker batches list` shows all")
        states = await kept_rows(self.database, batch)
        technique = await techniques.get(self.database, batch.technique_id)
        outputs = () if technique is None else ports(technique.outputs or ())
        numbers = row_numbers(states)
        names = [None] * len(states) if name_by is None else row_names(batch, states, name_by)
        return [
            WantedRun(
                record=record,
                row=row,
                name=name,
                is_further=record is not None and record.run.run_id != state.run_ids[0],
                ports=outputs,
                status=state.status if record is None else record.shown_status,
                is_to_start=batch.finished_at is None and state.status in _NOT_STARTED,
            )
            for state, row, name in zip(states, numbers, names, strict=True)
            for record in state.records or (None,)
        ]

    async def settled(
        self, *, technique_id: str | None, watch: bool, notify: Notify | None = None
    ) -> AsyncIterator[WantedRun]:
        """All settled runs, newest first; with `watch` then each run that settles, forever.

        Some come more than once.
        """
        reached = await self.changes.reached() if watch else 0
        cursor: str | None = None
        while True:
            page, cursor = await runs.list_runs(
                self.database,
                tracking=Tracking.SETTLED,
                technique_id=technique_id,
                cursor=cursor,
                limit=100,
            )
            for record in page:
                yield WantedRun(record=record)
            if cursor is None:
                break
        if watch:
            wanted = RunFilter(technique_id=technique_id)
            async with aclosing(self.changes.follow(wanted, reached, notify)) as changes:
                async for change in changes:
                    if change.record.tracking is Tracking.SETTLED:
                        yield WantedRun(record=change.record)

    async def alongside(
        self,
        running: Coroutine[Any, Any, T],
        batch_id: str,
        options: DownloadOptions,
        report: DownloadReport,
        *,
        begun: asyncio.Event,
        name_by: str | None = None,
        on_result: OnResult | None = None,
    ) -> T:
        """Download the outputs of a batch while `running` starts and follows it; its result.

        Each row is downloaded as its run settles, from when the batch is `begun`. At the end what
        is missing is tried once more; `report` has the result for every output, or why the
        directory cannot be used any more, with the results until then: what was paid for is
        reported all the same.
        """

        meanwhile = DownloadReport()

        async def follow() -> None:
            await begun.wait()
            source = self.batch(batch_id, watch=True, name_by=name_by)
            await self.download(source, options, meanwhile, on_result=on_result)

        following = asyncio.create_task(follow(), name="batch-download")
        try:
            result = await running
            batch = await batches.get(self.database, batch_id)
            if batch is not None and batch.finished_at is not None:
                await asyncio.wait([following])
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        source = self.batch(batch_id, watch=False, name_by=name_by)
        try:
            await self.download(source, options, report, on_result=on_result)
        except DownloadDirectoryError as error:
            report.failure = str(error)
            report.results = list(meanwhile.results)
            source = self.batch(batch_id, watch=False, name_by=name_by)
            report.absent = [one async for wanted in source if (one := _absent(wanted))]
        fetched = {one.job.key: one for one in meanwhile.of(DownloadOutcome.FETCHED)}
        report.results = [
            fetched.get(one.job.key, one) if one.outcome is DownloadOutcome.PRESENT else one
            for one in report.results
        ]
        return result

    def _renewed_links(self) -> RenewedLink:
        """Finds the new links of outputs for one download: FLORA is asked once for each run, until
        that has brought none for many runs in a row."""
        fruitless, read = 0, set[str]()
        reading = defaultdict[str, asyncio.Lock](asyncio.Lock)

        async def renewed_link(job: DownloadJob) -> str | None:
            nonlocal fruitless
            async with reading[job.run_id]:
                with suppress(StoreError):
                    record = await runs.get_run(self.database, job.run_id)
                    link = _link_of(job, record)
                    if (
                        record is not None
                        and link == job.output.url
                        and job.run_id not in read
                        and fruitless < FRUITLESS_READS
                    ):
                        read.add(job.run_id)
                        link = _link_of(job, await self.poller.read_again(record))
                        fruitless = fruitless + 1 if link in (None, job.output.url) else 0
                    return None if link == job.output.url else link
            return None

        return renewed_link

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

        The caller passes the report in, to have it after an interruption; at the end its results
        are in the order of runs and outputs. A run that comes again is skipped. Raises
        `DownloadDirectoryError`, and whatever `source` raises.
        """
        queue: asyncio.Queue[DownloadJob | None] = asyncio.Queue(QUEUED)
        order: dict[object, int] = {}

        async def find_jobs() -> None:
            seen: dict[tuple[str | None, str | None], RunWithoutOutputs | None] = {}
            async for wanted in source:
                key = (wanted.row, wanted.run_id)
                if (before := seen.get(key)) is not None and before.awaited:
                    report.absent.remove(before)
                elif key in seen:
                    continue
                seen[key] = absent = _absent(wanted)
                if absent is not None:
                    report.absent.append(absent)
                for job in jobs_of(wanted):
                    order[job.key] = len(order)
                    await queue.put(job)
            for _ in range(options.concurrency):
                await queue.put(None)

        async def save_all(saver: OutputSaver) -> None:
            while (job := await queue.get()) is not None:
                result = await saver.save(job, on_bytes)
                report.results.append(result)
                if on_result is not None:
                    on_result(result)

        with DownloadDirectory(options.to) as directory:
            fetcher = Fetcher(allow_private=options.allow_private, max_bytes=options.max_bytes)
            saver = OutputSaver(directory, fetcher, self.clock, self._renewed_links())
            saving = [save_all(saver) for _ in range(options.concurrency)]
            await run_all([find_jobs(), *saving])
        report.results.sort(key=lambda one: order.get(one.job.key, -1))


def _link_of(job: DownloadJob, record: Record | None) -> str | None:
    """The link that the run has for the job's output."""
    outputs = (record and record.run.outputs) or ()
    some = outputs[job.position : job.position + 1]
    return next((one.url for one in some if one.output_id == job.output.output_id), None)


def _absent(wanted: WantedRun) -> RunWithoutOutputs | None:
    """Why a run has nothing to fetch; `None` if it has outputs."""
    record, awaited = wanted.record, False
    if record is None:
        status, harmless = wanted.status, wanted.status == "refused"
    else:
        status, is_settled = record.shown_status, record.tracking is Tracking.SETTLED
        if is_settled and record.run.outputs:
            return None
        awaited = is_settled and record.run.lacks_outputs and record.recheck_at is not None
        harmless = is_settled and not awaited
    return RunWithoutOutputs(
        run_id=wanted.run_id, row=wanted.row, status=status, harmless=harmless, awaited=awaited
    )


class _Pipe:
    """A file that `zipfile` writes to and that is read at the same time; it cannot seek."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """There is nothing behind it."""

    def take(self) -> bytes:
        """What was written since the last call."""
        data, self._parts = b"".join(self._parts), []
        return data


async def batch_archive(
    downloader: Downloader, batch_id: str, *, name_by: str | None, allow_private: bool
) -> AsyncGenerator[bytes]:
    """The ZIP of a batch's outputs, named like the files of `batch --download`.

    Raises what `Downloader.batch` raises. What cannot be fetched is listed in `MISSING`.
    """
    missing: list[str] = []
    pipe = _Pipe()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flora-zip-")))
        fetcher = Fetcher(
            allow_private=allow_private, max_bytes=ZIP_FILE_BYTES, attempts=ZIP_ATTEMPTS
        )
        archive = zipfile.ZipFile(cast(IO[bytes], pipe), "w")

        async def jobs() -> AsyncIterator[DownloadJob]:
            async for row in downloader.batch(batch_id, watch=False, name_by=name_by):
                found = list(jobs_of(row))
                if not found:
                    missing.append(f"row {row.row}: {_why(row)}")
                for job in found:
                    yield job

        fetched = await stack.enter_async_context(aclosing(_fetch_all(fetcher, jobs(), folder)))
        async for job, found in fetched:
            match found:
                case str():
                    missing.append(f"row {job.row}, run {job.run_id}, {job.name}: {found}")
                case bytes():
                    archive.writestr(f"{job.name}.txt", found)
                    yield pipe.take()
                case Path():
                    with found.open("rb") as file, archive.open(found.name, "w") as entry:
                        while data := await asyncio.to_thread(file.read, _BLOCK):
                            entry.write(data)
                            yield pipe.take()
                    found.unlink()
                    yield pipe.take()
        if missing:
            archive.writestr(MISSING, "\n".join([*missing, ""]))
        archive.close()
        yield pipe.take()


async def _fetch_all(
    fetcher: Fetcher, jobs: AsyncIterator[DownloadJob], folder: Path
) -> AsyncGenerator[tuple[DownloadJob, _Fetched], None]:
    """The outputs, in order; those that come next are fetched meanwhile."""
    ahead: deque[tuple[DownloadJob, asyncio.Task[_Fetched]]] = deque()
    try:
        async for job in jobs:
            ahead.append((job, asyncio.create_task(_fetch(fetcher, job, folder))))
            if len(ahead) > ZIP_AHEAD:
                first, task = ahead.popleft()
                yield first, await task
        while ahead:
            first, task = ahead.popleft()
            yield first, await task
    finally:
        for _, task in ahead:
            task.cancel()
        await asyncio.gather(*(task for _, task in ahead), return_exceptions=True)


async def _fetch(fetcher: Fetcher, job: DownloadJob, folder: Path) -> _Fetched:
    if job.output.type == "text":
        return job.output.url.encode(errors="replace")
    try:
        found = await fetcher.fetch(job.output.url, folder, job.name, output_type=job.output.type)
    except (MediaError, OSError) as error:
        return str(error)
    return found.path


def _why(row: WantedRun) -> str:
    """Why a row has no outputs."""
    if row.record is None:
        return row.status.replace("_", " ")
    error = row.record.run.error
    state = "no outputs" if row.status == "completed" else row.status
    return f"{state}{f' ({error.code})' if error and error.code else ''}"
