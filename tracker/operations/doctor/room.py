"""The disk under the database, and how much room is left on it."""

import os
from asyncio import to_thread
from pathlib import Path
from typing import Final

from tracker.operations.doctor.finding import Finding, failed, ok, warning
from tracker.store.url import DatabaseUrl

MIB: Final = 1024 * 1024
FAILS_BELOW: Final = 64 * MIB
"""A burst of callbacks and the write-ahead log between two checkpoints need about so much."""
WARNS_BELOW: Final = 512 * MIB
FEW_FILES: Final = 100


async def look(url: DatabaseUrl, *, size: int | None) -> Finding:
    """Look at the disk; `size` is what a database takes that lies elsewhere, if it is known."""
    if url.dialect == "postgresql":
        taken = "" if size is None else f" The database takes {amount(size)}."
        return ok("disk", f"Nothing is kept here; the server's disk is not seen from here.{taken}")
    return await to_thread(_local, url.path)


def _local(file: str) -> Finding:
    name: Final = "disk"
    path = Path(file).resolve()
    folder = path.parent
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return failed(name, f"{folder}: {error.strerror}.", "See to that folder and its disk.")
    free = disk.f_bavail * disk.f_frsize
    taken = sum(map(_size, (path, path.with_name(f"{path.name}-wal"))))
    told = f"{amount(free)} are free in {folder}; the database takes {amount(taken)}."
    advice = (
        "Make room there, or move the database. `tracker db prune --older-than 90d` removes old "
        "runs, whose place in the file is used again."
    )
    if free < FAILS_BELOW:
        return failed(name, told, advice)
    if disk.f_files and disk.f_favail < FEW_FILES:
        return failed(
            name,
            f"{folder} takes {disk.f_favail} more files: its disk is out of inodes.",
            "Remove files there that nobody needs (`df -i` shows the count).",
        )
    if free < max(WARNS_BELOW, taken):
        return warning(name, f"{told} A migration or a VACUUM may need as much again.", advice)
    return ok(name, told)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def amount(size: float) -> str:
    """A number of bytes, as a person reads it."""
    units = iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and (larger := next(units, None)) is not None:
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
