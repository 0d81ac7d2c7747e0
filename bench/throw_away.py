"""Databases for a benchmark: empty, on a real disk, and gone afterwards."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support.databases import Background, PostgresDatabases, sqlite_url_of
from tests.support.postgres import PostgresServer

KINDS: Final = ("sqlite", "postgresql")


@contextlib.contextmanager
def throw_away(kind: str) -> Iterator[str]:
    """The URL of an empty database; a PostgreSQL is started for it, with `fsync` on."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as directory:
            yield sqlite_url_of(Path(directory) / "tracker.db")
        return
    with PostgresServer(fsync=True) as server:
        background = Background()
        databases = PostgresDatabases(server.url(), background)
        databases.create("tracker")
        databases.close()
        background.close()
        yield server.url("tracker")


def chosen(database: str) -> tuple[str, ...]:
    """The kinds that `--database sqlite|postgresql|both` means."""
    return KINDS if database == "both" else (database,)
