"""One output of a run becomes one file, unless that is there already: its name, and saving it.

Names are safe on every file system, stable on repetition, and in the order of the sheet. The
outputs of a batch are named by the row's number, or its cell of a column, and the output:
`001_icon_1`, `SKU-0001_icon_1`. If a row has several runs, the identifier of each after the first
is added: `001_run_7f3a_icon_1`. A number would change as more of them become known. The outputs of
single runs are named by the identifiers of both.
"""

import asyncio
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import InvalidRequest
from tracker.core.record import Record
from tracker.core.run import OUTPUT_KINDS, Output, Tracking
from tracker.core.starts import Port, fits
from tracker.delivering.addresses import MediaError
from tracker.delivering.fetch import FetchedFile, Fetcher, LinkExpired
from tracker.delivering.files import DownloadDirectory, FileKey, ManifestEntry, PartialFile
from tracker.starting.rows import RowState
from tracker.store.queries.batches import BatchRow

LONGEST_PART: Final = 60
"""Characters. With four parts, an ending and `.part.json` a file name stays below 255 bytes."""
LONGEST_RUN: Final = 24
"""Characters of a run in the name of a row's file, so that this is as short."""
_LONGEST_READABLE: Final = 100
"""Bytes of a cell, or of the name of an output."""
_HARMLESS: Final = re.compile(r"[A-Za-z0-9_-]+")
_OTHER: Final = re.compile(r"[^A-Za-z0-9_-]+")
_UNREADABLE: Final = re.compile(r"[^\w.-]+")
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\.", re.IGNORECASE | re.ASCII)
"""Begins a name that Windows takes for a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRun:
    """A run whose outputs are wanted.

    `row` is its row in a batch, `name` the row's name for files, `is_further` is true for each of
    the row's runs but the first, and `ports` are the outputs of the technique's definition. A row
    may have no run (`record`): `status` says why, `is_to_start` whether it is still to get one.
    """

    record: Record | None
    row: str | None = None
    name: str | None = None
    is_further: bool = False
    ports: Sequence[Port] = ()
    status: str = ""
    is_to_start: bool = False

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
            run = f"_{_name_part(run_id, LONGEST_RUN)}" if wanted.is_further else ""
            name = f"{wanted.name or wanted.row}{run}_{names[position]}"
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


RenewedLink = Callable[[DownloadJob], Awaitable[str | None]]
"""The link of an output as FLORA shows it now; `None` if there is no other one."""


class OutputSaver:
    """Saves single outputs in the download directory."""

    def __init__(
        self,
        directory: DownloadDirectory,
        fetcher: Fetcher,
        clock: Clock,
        renewed_link: RenewedLink,
    ) -> None:
        self._directory = directory
        self._fetcher = fetcher
        self._clock = clock
        self._renewed_link = renewed_link

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
                fetch = partial(
                    self._fetcher.fetch,
                    folder=self._directory.folder,
                    stem=name,
                    output_type=job.output.type,
                    on_bytes=None if on_bytes is None else partial(on_bytes, job),
                    on_complete=lambda file: added.append(self._add(job, file)),
                )
                try:
                    await fetch(job.output.url)
                except LinkExpired:
                    link = await self._renewed_link(job)
                    if link is None:
                        raise
                    await fetch(link)
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


# Names


def row_numbers(rows: Sequence[RowState]) -> list[str]:
    """The number of each row in the sheet, with leading zeros, so that they sort."""
    width = max(3, len(str(max((row.entry.position for row in rows), default=0))))
    return [f"{row.entry.position:0{width}}" for row in rows]


def row_names(batch: BatchRow, rows: Sequence[RowState], name_by: str) -> list[str]:
    """A different name for each row of a batch: its cell in the column `name_by`.

    A row whose cell is empty or repeated gets its number, too. Raises `InvalidRequest` for an
    unknown column.
    """
    column, input_id = naming_column(batch, name_by)
    numbers = row_numbers(rows)
    parts = []
    for row in rows:
        values = [one["value"] for one in row.inputs or () if one["id"] == input_id]
        parts.append(_readable("_".join(values) if input_id else row.entry.carried.get(column, "")))
    counts = Counter(map(str.casefold, parts))
    taken = {part for part, count in counts.items() if count == 1}
    names = []
    for part, number in zip(parts, numbers, strict=True):
        if not part or counts[part.casefold()] > 1:
            part = f"{part}_{number}".strip("_")
            while part.casefold() in taken:
                part += f"_{number}"
            taken.add(part.casefold())
        names.append(part)
    return names


def naming_column(batch: BatchRow, name_by: str) -> tuple[str, str | None]:
    """The column of that name, in any case, and the input that it is, if any.

    Raises `InvalidRequest` for an unknown one.
    """
    columns: dict[str, str | None] = dict.fromkeys(batch.columns or ())
    columns |= {column: input_id for input_id, column, _ in batch.mapping or ()}
    found = [one for one in columns if one.casefold() == name_by.casefold()]
    column = name_by if name_by in columns else found[0] if len(found) == 1 else None
    if column is None:
        raise InvalidRequest(
            f"the sheet has no column {name_by!r} to name files by; it has {', '.join(columns)}"
        )
    return column, columns[column]


def output_names(outputs: Sequence[Output], ports: Sequence[Port]) -> list[str]:
    """A name for each output of a run: what it is, and its number in FLORA's order: `icon_1`.

    What it is comes from the technique's definition (`ports`) where that has an output for each,
    else from the type.
    """
    width = len(str(len(outputs)))
    words = [_word(port) for port in ports] if fits(ports, outputs) else [""] * len(outputs)
    return [
        f"{word or OUTPUT_KINDS.get(one.type, 'output')}_{number:0{width}}"
        for number, (word, one) in enumerate(zip(words, outputs, strict=True), start=1)
    ]


def _word(port: Port) -> str:
    """The id of an output without its number, or else its name; an id that has digits within is
    not made for people."""
    for text in (port.id, port.name):
        word = _readable(text.rstrip("0123456789"))
        if word and not any(map(str.isdigit, word)):
            return word
    return ""


def _readable(text: str) -> str:
    """`text` as part of a name, with letters of any script; empty if nothing can be kept."""
    kept = _UNREADABLE.sub("_", unicodedata.normalize("NFC", text)).strip("._-")
    if _DEVICE.match(kept):
        kept = kept.replace(".", "_", 1)
    return kept.encode()[:_LONGEST_READABLE].decode(errors="ignore").rstrip("._-")


def file_stem(*identifiers: str) -> str:
    """A file name without its ending: safe, readable, and different for different identifiers.

    Where characters are replaced or cut off, a piece of the identifier's digest is added.
    """
    return ".".join(map(_name_part, identifiers))


def _name_part(text: str, longest: int = LONGEST_PART) -> str:
    """`text` as one part of a name: never empty, without dots, slashes or a leading dash."""
    if len(text) <= longest and _HARMLESS.fullmatch(text) and not text.startswith("-"):
        return text
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    kept = _OTHER.sub("_", text).strip("_-")[: longest - len(digest) - 1]
    return f"{kept}-{digest}" if kept else digest
