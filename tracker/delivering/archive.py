"""The outputs of a batch as one ZIP, written while its files are fetched.

A few files at a time are fetched into a temporary folder, in the order of the sheet, and deleted
once they are in the archive: neither memory nor disk grows with the batch. Pictures and videos are
compressed already, so files are stored as they are.
"""

import asyncio
import tempfile
import zipfile
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import IO, Final, cast

from tracker.delivering.addresses import MediaError
from tracker.delivering.downloads import Downloader
from tracker.delivering.fetch import Fetcher
from tracker.delivering.saving import DownloadJob, WantedRun, jobs_of

AHEAD: Final = 6
"""Files that are fetched at the same time."""
MAX_FILE_BYTES: Final = 512 * 1024**2
ATTEMPTS: Final = 2
"""Attempts for each file without progress: someone waits for the archive."""
MISSING: Final = "MISSING.txt"
"""Lists the outputs that could not be fetched and the rows without outputs, if there are any."""
_BLOCK: Final = 256 * 1024

_Fetched = Path | bytes | str
"""A file, a text, or why it could not be fetched."""


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
        fetcher = await stack.enter_async_context(
            Fetcher(allow_private=allow_private, max_bytes=MAX_FILE_BYTES, attempts=ATTEMPTS)
        )
        archive = zipfile.ZipFile(cast(IO[bytes], pipe), "w")
        ahead: deque[tuple[DownloadJob, asyncio.Task[_Fetched]]] = deque()
        try:
            async for row in downloader.batch(batch_id, watch=False, name_by=name_by):
                jobs = list(jobs_of(row))
                if not jobs:
                    missing.append(f"row {row.row}: {_why(row)}")
                for job in jobs:
                    ahead.append((job, asyncio.create_task(_fetch(fetcher, job, folder))))
                    if len(ahead) > AHEAD:
                        async for data in _add(archive, pipe, *ahead.popleft(), missing):
                            yield data
            while ahead:
                async for data in _add(archive, pipe, *ahead.popleft(), missing):
                    yield data
        finally:
            for _, task in ahead:
                task.cancel()
            await asyncio.gather(*(task for _, task in ahead), return_exceptions=True)
        if missing:
            archive.writestr(MISSING, "\n".join([*missing, ""]))
        archive.close()
        yield pipe.take()


async def _fetch(fetcher: Fetcher, job: DownloadJob, folder: Path) -> _Fetched:
    if job.output.type == "text":
        return job.output.url.encode(errors="replace")
    try:
        found = await fetcher.fetch(job.output.url, folder, job.name, output_type=job.output.type)
    except (MediaError, OSError) as error:
        return str(error)
    return found.path


async def _add(
    archive: zipfile.ZipFile,
    pipe: _Pipe,
    job: DownloadJob,
    task: asyncio.Task[_Fetched],
    missing: list[str],
) -> AsyncIterator[bytes]:
    """Add one output to the archive; yields what was written."""
    found = await task
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


def _why(row: WantedRun) -> str:
    """Why a row has no outputs."""
    if row.record is None:
        return row.status.replace("_", " ")
    error = row.record.run.error
    state = "no outputs" if row.status == "completed" else row.status
    return f"{state}{f' ({error.code})' if error and error.code else ''}"
