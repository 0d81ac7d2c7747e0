"""Files for their owner alone: partial files, the download directory and its manifest.

Others may write to the directory, so a link, pipe or second name in place of one of our files is
replaced or refused, never followed.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Final, Self

from tracker.core.errors import DownloadDirectoryError

MANIFEST: Final = "manifest.jsonl"
PARTIAL_ENDING: Final = ".part"
_PARTIAL: Final = (PARTIAL_ENDING, f"{PARTIAL_ENDING}.json")
_PRIVATE: Final = 0o600
_BLOCK: Final = 1024 * 1024

FileKey = tuple[str, int, str]
"""What a file belongs to: run, position and output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """One line of the manifest. `size` is in bytes, `sha256` in hex, `at` ISO 8601 in UTC."""

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
    def key(self) -> FileKey:
        return (self.run_id, self.position, self.output_id)


class DownloadDirectory:
    """A directory of downloaded files. Used as `with DownloadDirectory(folder) as directory`.

    The manifest has one line of JSON for each complete file, added right before the file gets its
    name: after a crash at most a file that has a line is missing.

    Raises `DownloadDirectoryError` if the directory cannot be created or written, or if another
    process is using it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[FileKey, ManifestEntry] = {}
        self._owners: dict[str, FileKey | None] = {}
        self._manifest: io.FileIO | None = None
        self._adding = Lock()

    def __enter__(self) -> Self:
        path = self.folder / MANIFEST
        try:
            _make_private_folder(self.folder)
            descriptor = _open_own(path) if os.path.lexists(path) else _create(path)
            # Unbuffered: what a full disk does not take must not be written again at the end.
            manifest = io.FileIO(descriptor, "a+b")
        except OSError as exc:
            raise self._unwritable(exc) from exc
        try:
            fcntl.flock(manifest.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            manifest.close()
            raise DownloadDirectoryError(
                f"another process is downloading to {self.folder}: wait for it, or give another "
                "folder"
            ) from exc
        except OSError:
            pass  # the file system has no locks
        try:
            self._read(manifest)
        except OSError as exc:
            manifest.close()
            raise self._unwritable(exc) from exc
        self._manifest = manifest
        return self

    def __exit__(self, *_: object) -> None:
        if self._manifest is not None:
            self._manifest.close()

    def _unwritable(self, error: OSError) -> DownloadDirectoryError:
        why = error.strerror or error
        return DownloadDirectoryError(f"{self.folder} cannot be written to: {why}")

    def find(self, key: FileKey) -> ManifestEntry | None:
        """The entry of a complete file; `None` if the file is missing or has another size."""
        entry = self._entries.get(key)
        if entry is not None and _size_of(self.folder / entry.file) == entry.size:
            return entry
        return None

    def reserve(self, key: FileKey, stem: str) -> str:
        """A name without ending for a new file: `stem`, or with six more characters if that is the
        name of another file, in any case."""
        if self._owners.setdefault(stem.casefold(), key) != key:
            stem = f"{stem}_{hashlib.sha256(repr(key).encode()).hexdigest()[:6]}"
            self._owners[stem.casefold()] = key
        return stem

    def rename(self, entry: ManifestEntry, stem: str) -> ManifestEntry:
        """Give a complete file another name, unless it has that. Raises `OSError`."""
        renamed = replace(entry, file=f"{self.reserve(entry.key, stem)}{Path(entry.file).suffix}")
        if renamed != entry:
            self.add(renamed)
            (self.folder / entry.file).rename(self.folder / renamed.file)
        return renamed

    def add(self, entry: ManifestEntry) -> None:
        """Append the entry of a file that is complete and gets its name next. Raises `OSError`,
        and appends nothing, if the disk does not take it."""
        if self._manifest is None:
            raise DownloadDirectoryError("the folder is not open")
        line = f"{json.dumps(asdict(entry), separators=(',', ':'))}\n".encode()
        with self._adding:  # texts are written by threads
            end = self._manifest.seek(0, os.SEEK_END)
            try:
                if self._manifest.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._manifest.fileno())
            except OSError:
                with suppress(OSError):
                    self._manifest.truncate(end)
                raise
            self._entries[entry.key] = entry

    def _read(self, manifest: io.FileIO) -> None:
        manifest.seek(0)
        text = manifest.readall()
        if text and not text.endswith(b"\n"):
            manifest.write(b"\n")  # a crash tore the last line
        for line in text.splitlines():
            entry = _parse_entry(line)
            if entry is not None:
                self._entries[entry.key] = entry
        for found in os.scandir(self.folder):
            if not found.name.endswith(_PARTIAL):
                self._owners[Path(found.name).stem.casefold()] = None
        for key, entry in self._entries.items():
            self._owners[Path(entry.file).stem.casefold()] = key


def _parse_entry(line: bytes) -> ManifestEntry | None:
    """The entry of a line, which others may have changed; `None` if it is not valid."""
    try:
        values: Any = json.loads(line)
        if not isinstance(values, Mapping):
            return None
        entry = ManifestEntry(**{name: values[name] for name in ManifestEntry.__dataclass_fields__})
        hash(entry.key)
    except (ValueError, KeyError, TypeError):
        return None
    file: object = entry.file
    in_folder = isinstance(file, str) and file not in ("", ".", "..")
    return entry if in_folder and not {"/", "\0"} & set(entry.file) else None


@dataclass(frozen=True, slots=True)
class ResumeKey:
    """What a partial file is part of: the link without its query (which may be signed anew) and
    the validator (a strong ETag, or a Last-Modified that is old enough)."""

    link: str
    validator: str


class PartialFile:
    """A file that is still being written: `NAME.part`, with its `ResumeKey` in `NAME.part.json`.

    Gets its final name by a rename, when it is complete and on disk. Methods block.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._path = folder / f"{stem}{PARTIAL_ENDING}"
        self._key_path = folder / f"{stem}{PARTIAL_ENDING}.json"
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """The digest of what is written, in hex."""
        return self._digest.hexdigest()

    def resumable(self) -> tuple[ResumeKey, int] | None:
        """What an earlier attempt left that can be resumed, and its size in bytes."""
        self.close()  # flushes, so that an attempt of this process counts too
        try:
            with os.fdopen(_open_own(self._key_path), "rb") as file:
                kept = json.loads(file.read())
            key = ResumeKey(link=str(kept["link"]), validator=str(kept["validator"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        size = _size_of(self._path)
        return (key, size) if size else None

    def start(self, key: ResumeKey | None) -> None:
        """Write from the start; without a key it cannot be resumed."""
        self.close()
        self._key_path.unlink(missing_ok=True)
        self._file = os.fdopen(_create(self._path), "wb")
        self._digest = hashlib.sha256()
        self.size = 0
        if key is not None:
            with os.fdopen(_create(self._key_path), "w") as file:
                json.dump(asdict(key), file)

    def resume(self) -> None:
        """Append to what is there. Raises `OSError` if that is not a file of our own."""
        self.close()
        self._digest = hashlib.sha256()
        self.size = 0
        self._file = os.fdopen(_open_own(self._path), "r+b")
        while block := self._file.read(_BLOCK):
            self._digest.update(block)
            self.size += len(block)

    def write(self, data: bytes) -> None:
        if self._file is None:
            raise ValueError("the partial file is not open")
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self, target: Path) -> None:
        """Bring all of it to disk and rename it, replacing any file of that name."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()
        self._path.replace(target)
        self._key_path.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)
        self._key_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; what is written stays."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def write_whole(path: Path, text: str) -> None:
    """Replace a file that the user named, completely or not at all. Raises `OSError`.

    A link is followed, a device or a pipe is written to, and an existing file keeps its mode.
    """
    if is_special(path):
        with path.open("w", encoding="utf-8", newline="") as special:
            special.write(text)
        return
    target = path.resolve()
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else _PRIVATE
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with os.fdopen(_create(unfinished, mode), "w", encoding="utf-8", newline="") as file:
            file.write(text)
        unfinished.replace(target)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or the like, which is written to and never replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents, for the owner alone, whatever the umask."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        one.chmod(0o700)


def _create(path: Path, mode: int = _PRIVATE) -> int:
    """Create a file in place of any file or link of that name; its mode ignores the umask."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    os.fchmod(descriptor, mode)
    return descriptor


def _open_own(path: Path) -> int:
    """Open an existing regular file that has no other name, for reading and appending.

    Raises `OSError` for anything else: writing could change a file elsewhere.
    """
    # Not blocking: a pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(f"{path} is no regular file of its own")
    return descriptor


def _size_of(path: Path) -> int | None:
    """The size of a regular file in bytes; `None` for a link or a missing file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
