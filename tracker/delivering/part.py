"""A file that is still being written: `NAME.part`, and beside it what it is a part of.

`NAME.part.json` keeps the link and the validator (a strong ETag, or a Last-Modified that is old
enough) under which the bytes came, so that a later process knows what it may go on with. The file
gets its own name by a rename, when it is whole and on disk. Both are for their owner alone, and a
link in their place is removed or refused: others may write to the folder.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final

from tracker.delivering.files import create, extend, size_of

_BLOCK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Mark:
    """What a part is a part of: the link without its query, which may be signed anew, and the
    validator."""

    link: str
    validator: str


class Part:
    """One part. Its methods block: those that take long are called in a thread."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._path = folder / f"{stem}.part"
        self._mark_path = folder / f"{stem}.part.json"
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """The digest of what is written, in hex."""
        return self._digest.hexdigest()

    def mark(self) -> tuple[Mark, int] | None:
        """What an earlier attempt left: what it is a part of, and how many bytes there are."""
        self.close()  # what an attempt of our own has written is counted too
        try:
            with os.fdopen(extend(self._mark_path), "rb") as file:
                kept = json.loads(file.read())
            mark = Mark(link=str(kept["link"]), validator=str(kept["validator"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        size = size_of(self._path)
        return (mark, size) if size else None

    def begin(self, mark: Mark | None) -> None:
        """Write from the start, whatever was there; without a mark nobody goes on with it."""
        self.close()
        self._mark_path.unlink(missing_ok=True)
        self._file = os.fdopen(create(self._path), "wb")
        self._digest = hashlib.sha256()
        self.size = 0
        if mark is not None:
            with os.fdopen(create(self._mark_path), "w") as file:
                json.dump(asdict(mark), file)

    def go_on(self) -> None:
        """Write on after what is there. Raises `OSError` where that is not a file of our own."""
        self.close()
        self._digest = hashlib.sha256()
        self.size = 0
        self._file = os.fdopen(extend(self._path), "r+b")
        while block := self._file.read(_BLOCK):
            self._digest.update(block)
            self.size += len(block)

    def write(self, data: bytes) -> None:
        """Add bytes."""
        if self._file is None:
            raise ValueError("the part is not open")
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self, target: Path) -> None:
        """Bring all of it to disk, and give the file its name, in place of any other of that
        name."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()
        self._path.replace(target)
        self._mark_path.unlink(missing_ok=True)
        sync_folder(target.parent)

    def discard(self) -> None:
        """Forget it."""
        self.close()
        self._path.unlink(missing_ok=True)
        self._mark_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file; what is written stays."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
