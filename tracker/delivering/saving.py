"""One output of a run becomes one file, unless that is there already."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from tracker.core.clock import Clock
from tracker.core.inputs import Port
from tracker.core.record import Record
from tracker.core.run import Output, Tracking
from tracker.delivering.addresses import MediaError
from tracker.delivering.fetch import FetchedFile, Fetcher
from tracker.delivering.files import DownloadDirectory, FileKey, ManifestEntry, PartialFile
from tracker.delivering.names import file_stem, output_names


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRun:
    """A run whose outputs are wanted.

    `row` is its row in a batch, `name` the row's name for files, and `ports` are the outputs of the
    technique's definition. A row may have no run (`record`): `status` says why.
    """

    record: Record | None
    row: str | None = None
    name: str | None = None
    ports: Sequence[Port] = ()
    status: str = ""

    @property
    def run_id(self) -> str | None:
        """The id of its run, if it has one."""
        return None if self.record is None else self.record.run.run_id


class DownloadOutcome(StrEnum):
    """What happened to one output."""

    FETCHED = "fetched"
    PRESENT = "present"
    """It was downloaded before."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadJob:
    """One output to save as a file. `name` is the file's name without its ending; if it was `asked`
    for, a file that is there already gets it, too."""

    run_id: str
    position: int
    output: Output
    row: str | None
    name: str
    asked: bool = False

    @property
    def key(self) -> FileKey:
        """Identifies the file in the manifest."""
        return (self.run_id, self.position, self.output.output_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadResult:
    """The result for one output: its entry in the manifest, or the error."""

    job: DownloadJob
    outcome: DownloadOutcome
    entry: ManifestEntry | None = None
    error: str | None = None


OnJobBytes = Callable[[DownloadJob, int, int | None], None]
"""Called with the bytes received so far for a file and its total, if known."""


def jobs_of(wanted: WantedRun) -> Iterator[DownloadJob]:
    """A job for each output of a settled run."""
    record = wanted.record
    if record is None or record.tracking is not Tracking.SETTLED:
        return
    run_id, outputs = record.run.run_id, record.run.outputs or ()
    names = output_names(outputs, wanted.ports)
    ids = [output.output_id for output in outputs]
    for position, output in enumerate(outputs):
        if wanted.row is not None:
            name = f"{wanted.name or wanted.row}_{names[position]}"
        else:
            again = not output.output_id or ids.count(output.output_id) > 1
            name = file_stem(run_id, output.output_id, *([str(position)] if again else []))
        yield DownloadJob(
            run_id=run_id,
            position=position,
            output=output,
            row=wanted.row,
            name=name,
            asked=wanted.name is not None,
        )


class OutputSaver:
    """Saves single outputs in the download directory."""

    def __init__(self, directory: DownloadDirectory, fetcher: Fetcher, clock: Clock) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._clock = clock

    async def save(self, job: DownloadJob, on_bytes: OnJobBytes | None) -> DownloadResult:
        """Fetch the output unless its file is complete; a failure is a result, too."""
        try:
            entry = self._directory.find(job.key)
            if job.output.type == "text":
                text = job.output.url.encode(errors="replace")
                if entry is not None and entry.sha256 != hashlib.sha256(text).hexdigest():
                    entry = None
            if entry is not None:
                if job.asked:
                    entry = self._directory.rename(entry, job.name)
                return DownloadResult(job=job, outcome=DownloadOutcome.PRESENT, entry=entry)
            name = self._directory.reserve(job.key, job.name)
            if job.output.type == "text":
                entry = await asyncio.to_thread(self._write_text, job, name, text)
            else:
                added: list[ManifestEntry] = []
                await self._fetcher.fetch(
                    job.output.url,
                    self._directory.folder,
                    name,
                    output_type=job.output.type,
                    on_bytes=None if on_bytes is None else partial(on_bytes, job),
                    on_complete=lambda file: added.append(self._add(job, file)),
                )
                (entry,) = added
        except (MediaError, OSError) as error:
            if isinstance(error, OSError):
                message = f"the file cannot be written: {error.strerror or error}"
            else:
                message = str(error)
            return DownloadResult(job=job, outcome=DownloadOutcome.FAILED, error=message)
        return DownloadResult(job=job, outcome=DownloadOutcome.FETCHED, entry=entry)

    def _write_text(self, job: DownloadJob, name: str, text: bytes) -> ManifestEntry:
        """Save a text, which FLORA shows in place of a link."""
        part = PartialFile(self._directory.folder, name)
        try:
            part.start(None)
            part.write(text)
            file = FetchedFile(
                path=self._directory.folder / f"{name}.txt",
                size=part.size,
                sha256=part.sha256,
                content_type="text/plain; charset=utf-8",
            )
            entry = self._add(job, file)
            part.finish(file.path)
        finally:
            part.close()
        return entry

    def _add(self, job: DownloadJob, file: FetchedFile) -> ManifestEntry:
        """Add a file to the manifest, before it gets its name."""
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
