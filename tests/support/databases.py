"""Databases for single tests: each is a copy of one that was migrated once.

Migrating takes far longer than copying, so a template is migrated by the tracker's own migrations
when the first test asks for it; every test then gets a database to itself.
"""

import asyncio
import itertools
import secrets
import sqlite3
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg

T = TypeVar("T")


class Background:
    """An event loop in a thread of its own: fixtures use it without touching the test's loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fixtures")
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there and return what it returns."""
        return self._thread.submit(self._runner.run, work).result()

    def close(self) -> None:
        """End the loop and the thread."""
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()


class PostgresDatabases:
    """Makes and drops databases on one server, `url` being any database of it for administration.

    The names hold a random part, so that several runs of the suite may share a server.
    """

    def __init__(self, url: str, background: Background) -> None:
        self._url = url
        self._background = background
        self._prefix = f"tracker_test_{secrets.token_hex(4)}"
        self._count = itertools.count(1)
        self._connection: Any = background.run(asyncpg.connect(url))

    @cached_property
    def _template(self) -> str:
        name = f"{self._prefix}_template"
        self._execute(f'CREATE DATABASE "{name}"')
        self._background.run(migrate(self._url_of(name)))
        return name

    @contextmanager
    def migrated(self) -> Iterator[str]:
        """The URL of a new database with the tracker's schema, dropped afterwards."""
        with self._database(self._template) as url:
            yield url

    @contextmanager
    def empty(self) -> Iterator[str]:
        """The URL of a new database with nothing in it, dropped afterwards."""
        with self._database("template1") as url:
            yield url

    def create(self, name: str) -> None:
        """Create an empty database of that very name, to go with the server."""
        self._execute(f'CREATE DATABASE "{name}"')

    def close(self) -> None:
        """Drop the template and let go of the server."""
        if "_template" in self.__dict__:
            self._execute(f'DROP DATABASE "{self._template}" WITH (FORCE)')
        self._background.run(self._connection.close())

    @contextmanager
    def _database(self, template: str) -> Iterator[str]:
        name = f"{self._prefix}_{next(self._count)}"
        # A copy of the files is ten times as fast as one that is written to the log.
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        try:
            yield self._url_of(name)
        finally:
            self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        self._background.run(self._connection.execute(statement))

    def _url_of(self, name: str) -> str:
        return urlsplit(self._url)._replace(path=f"/{name}").geturl()


def sqlite_url_of(path: Path) -> str:
    """The tracker's URL of a SQLite file."""
    return f"sqlite:///{path.resolve()}"


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a SQLite file together with what still stands in its write-ahead log."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


async def migrate(url: str) -> None:
    """Bring the database at `url` to the newest schema, as `tracker db upgrade` does."""
    from tracker.store.migrate import upgrade

    await upgrade(url)
