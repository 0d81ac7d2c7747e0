"""Installs a receiver into a directory, from whatever registry this machine is set up with.

The releases are exact and their hashes are checked; nothing that they bring runs meanwhile.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
SECONDS: Final = 180.0
_TOOLS: Final = HERE.parents[1] / ".tools" / "bin"
"""Where `make install` leaves uv."""


class NotInstalled(Exception):
    """Why a receiver is not there to be compared."""


def from_python(requirements: Path, into: Path) -> None:
    """Install what a requirements file with hashes names."""
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    _run([*_installer(), *options, "--target", str(into), "--requirement", str(requirements)])


def from_npm(package: Path, into: Path) -> None:
    """Install what the `package-lock.json` in one directory says into another."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise NotInstalled("node and npm are not here")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(package / name, into)
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    patience = ["--fetch-retries=1", "--fetch-timeout=30000"]
    _run([npm, "ci", "--prefix", str(into), *options, *patience])


def _installer() -> list[str]:
    """uv, or else pip: a virtual environment that uv has made is without pip."""
    if uv := shutil.which("uv") or shutil.which("uv", path=_TOOLS):
        return [uv, "pip", "install", "--python", sys.executable]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    raise NotInstalled("neither uv nor pip is here")


def _run(command: Sequence[str]) -> None:
    # This machine's certificates are trusted, as pip does and the Makefile tells uv to.
    env = {"UV_SYSTEM_CERTS": "1", "UV_PYTHON_DOWNLOADS": "never"} | os.environ
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{Path(command[0]).name} took over {SECONDS:.0f} s") from None
    if done.returncode:
        raise NotInstalled(f"{Path(command[0]).name} said:\n{done.stderr.strip()[:600]}")
