"""The revisions of this version's schema, by the names of their files.

Alembic knows them too, but takes a fifth of a short command's time to load, and most commands find
the schema as it should be. The files lie in `migrations/`: at the top of a checkout, inside the
package in a wheel.
"""

import re
from functools import cache
from pathlib import Path
from typing import Final

from tracker.core.errors import StoreError

_FILE: Final = re.compile(r"(\d{4})_\w+\.py")


def head() -> str:
    """The newest revision that this version knows."""
    return known()[-1]


def is_known(revision: str) -> bool:
    """Whether a revision is one of this version's, and not a later version's."""
    return revision in known()


@cache
def known() -> tuple[str, ...]:
    """All of them, oldest first. Raises `StoreError` where the installation lacks them."""
    names = (each.name for each in (directory() / "versions").iterdir())
    found = sorted(match[1] for match in map(_FILE.fullmatch, names) if match)
    if not found:
        raise _missing()
    return tuple(found)


def directory() -> Path:
    """Where Alembic's environment lies. Raises `StoreError` as `known` does."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "migrations", package.parent / "migrations"):
        if (candidate / "env.py").is_file():
            return candidate
    raise _missing()


def _missing() -> StoreError:
    return StoreError("the tracker's migrations are missing from this installation")
