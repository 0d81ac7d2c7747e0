"""Files for their owner alone, which no link that was put in their place can lead elsewhere."""

import os
import stat
from pathlib import Path
from typing import Final

PRIVATE: Final = 0o600
_NO_LINK: Final = os.O_NOFOLLOW


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for the owner alone (0700)."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        one.chmod(0o700)


def create(path: Path, mode: int = PRIVATE) -> int:
    """Create a file, in place of any file or link of that name, and return its descriptor.

    Its mode is `mode`, whatever the umask. Raises `OSError`.
    """
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, mode)
    os.fchmod(descriptor, mode)
    return descriptor


def extend(path: Path) -> int:
    """Open an existing file for reading, and for writing at its end.

    Raises `OSError` where there is none, and where it is a link, no regular file, or has a second
    name: then what is written would change a file somewhere else.
    """
    # Not blocking: a pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | _NO_LINK)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(f"{path} is no regular file of its own")
    return descriptor


def size_of(path: Path) -> int | None:
    """The size of a regular file in bytes; `None` for a link, and where there is no file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or the like, which is written to and never replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def write_whole(path: Path, text: str) -> None:
    """Write `text` where a user wants it: a file is whole, or as it was before.

    A link is followed, for the user named it; a device or a pipe is written to. An existing file
    keeps its mode. Raises `OSError`.
    """
    if is_special(path):
        with path.open("w", encoding="utf-8", newline="") as special:
            special.write(text)
        return
    target = path.resolve()
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else PRIVATE
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with os.fdopen(create(unfinished, mode), "w", encoding="utf-8", newline="") as file:
            file.write(text)
        unfinished.replace(target)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
