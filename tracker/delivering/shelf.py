"""The folder that files are put into, and its manifest: a line of JSON for each file that is whole.

One process at a time puts files there. A file gets its name when it is whole, so one whose line is
missing (a crash came in between) needs only its line.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from tracker.core.errors import TrackerError
from tracker.delivering.files import create, extend, make_folder, size_of

MANIFEST: Final = "manifest.jsonl"
_UNDONE: Final = (".part", ".part.json")


class ShelfError(TrackerError):
    """The folder cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the manifest. `size` is in bytes, `sha256` in hex, `at` ISO 8601 in UTC."""

    file: str
    row: str | None
    run_id: str
    position: int
    output_id: str
    type: str
    size: int
    sha256: str
    content_type: str | None
    at: str

    @property
    def key(self) -> "Key":
        """What the file is of."""
        return (self.row, self.run_id, self.position, self.output_id)


Key = tuple[str | None, str, int, str]
"""Row, run, position and output: what a file is of."""


class Shelf:
    """A folder, open. Used as `with Shelf(folder) as shelf`.

    Raises `ShelfError` where it cannot be made or written, or where another process is at it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[Key, Entry] = {}
        self._unlisted: dict[str, str] = {}
        self._manifest: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            make_folder(self.folder)
            path = self.folder / MANIFEST
            manifest = os.fdopen(extend(path) if os.path.lexists(path) else create(path), "a+b")
        except OSError as exc:
            why = exc.strerror or exc
            raise ShelfError(f"{self.folder} cannot be written to: {why}") from exc
        try:
            fcntl.flock(manifest.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            manifest.close()
            raise ShelfError(
                f"another process is downloading to {self.folder}: wait for it, or give another "
                "folder"
            ) from exc
        except OSError:
            pass  # a file system without locks: then nobody can be told
        self._manifest = manifest
        self._read(manifest)
        return self

    def __exit__(self, *_: object) -> None:
        if self._manifest is not None:
            self._manifest.close()

    def find(self, key: Key) -> Entry | None:
        """The entry of a file that is there whole; `None` where it is not."""
        entry = self._entries.get(key)
        if entry is not None and size_of(self.folder / entry.file) == entry.size:
            return entry
        return None

    def unlisted(self, stem: str) -> Path | None:
        """A whole file of that name whose line is missing."""
        name = self._unlisted.get(stem)
        return None if name is None else self.folder / name

    def add(self, entry: Entry) -> None:
        """Keep the entry of a file that is now there."""
        if self._manifest is None:
            raise ShelfError("the folder is not open")
        line = json.dumps(asdict(entry), separators=(",", ":"))
        self._manifest.write(f"{line}\n".encode())
        self._manifest.flush()
        self._entries[entry.key] = entry

    def _read(self, manifest: IO[bytes]) -> None:
        manifest.seek(0)
        text = manifest.read()
        if text and not text.endswith(b"\n"):
            manifest.write(b"\n")  # a crash tore the last line
        for line in text.splitlines():
            entry = _entry(line)
            if entry is not None:
                self._entries[entry.key] = entry
        listed = {entry.file for entry in self._entries.values()} | {MANIFEST}
        for found in os.scandir(self.folder):
            undone = found.name.endswith(_UNDONE) or found.name in listed
            if not undone and found.is_file(follow_symlinks=False):
                self._unlisted[found.name.rpartition(".")[0]] = found.name


def digest_of(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file. Blocks while it is read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def _entry(line: bytes) -> Entry | None:
    """The entry of a line; `None` where it is none of ours."""
    try:
        values: Any = json.loads(line)
        if not isinstance(values, Mapping):
            return None
        entry = Entry(**{name: values[name] for name in Entry.__dataclass_fields__})
        hash(entry.key)
    except (ValueError, KeyError, TypeError):
        return None
    # A line is text that anybody may have changed: it names files of this folder only.
    name: object = entry.file
    inside = isinstance(name, str) and name not in ("", ".", "..")
    return entry if inside and not {"/", "\0"} & set(entry.file) else None
