"""A disk that can be full: a file system of its own, of a few megabytes, in memory.

Only root can mount one. Elsewhere `SmallDisk` raises `CannotMount`, and whoever asked does without.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Self

BLOCK = 64 * 1024


class CannotMount(Exception):
    """This user may not mount a file system here."""


class SmallDisk:
    """A mounted file system of `megabytes`; `path` is where, while the `with` block lasts."""

    def __init__(self, megabytes: int) -> None:
        self._size = f"size={megabytes}m"
        self.path = Path(tempfile.mkdtemp(prefix="tracker-disk-", dir="/tmp"))
        self._ballast = self.path / "ballast"

    def __enter__(self) -> Self:
        try:
            _run("mount", "-t", "tmpfs", "-o", f"{self._size},mode=0755", "tmpfs", self.path)
        except CannotMount:
            self.path.rmdir()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _run("umount", "--lazy", self.path)
        self.path.rmdir()

    def fill(self) -> None:
        """Use up all the room that is left."""
        file = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (BLOCK, 512, 1):  # the last bytes too
                while _wrote(file, b"\0" * size):
                    pass
        finally:
            os.close(file)

    def clear(self) -> None:
        """Give back what `fill` took."""
        self._ballast.unlink(missing_ok=True)

    def read_only(self, wanted: bool) -> None:
        """Let nobody write, or everybody again; nothing on it may be open for writing."""
        _run("mount", "-o", f"remount,{'ro' if wanted else 'rw'}", self.path)


def _wrote(file: int, block: bytes) -> bool:
    try:
        return os.write(file, block) > 0
    except OSError:
        return False


def _run(*command: str | Path) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise CannotMount(said.decode(errors="replace").strip()) from error
