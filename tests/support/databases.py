"""Databases for single tests: each is a copy of one that was migrated once.

Migrating takes far longer than copying, so a template is migrated by the tracker's own migrations
when the first test asks for it; every test then gets a database to itself. On PostgreSQL copying
takes longer than emptying, so a database whose schema a test left alone is emptied and used again.
"""

import asyncio
import itertools
import secrets
import sqlite3
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg

T = TypeVar("T")

_END_OTHERS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
# Everything of its own that a test could leave behind beside rows: definitions (a changed row of a
# catalogue has another xmin), statistics, privileges and settings.
_SCHEMA_STATE = (
    "SELECT concat_ws('/', "
    + ", ".join(
        f"(SELECT count(*) || ' ' || sum(xmin::text::int8) FROM {catalogue} WHERE {key} >= 16384)"
        for catalogue, key in (
            ("pg_attrdef", "oid"),
            ("pg_attribute", "attrelid"),
            ("pg_constraint", "oid"),
            ("pg_index", "indexrelid"),
            ("pg_namespace", "oid"),
            ("pg_proc", "oid"),
            ("pg_rewrite", "oid"),
            ("pg_statistic", "starelid"),
            ("pg_trigger", "oid"),
            ("pg_type", "oid"),
        )
    )
    + """,
    (SELECT string_agg(concat_ws(' ', relname, relkind, relnatts, reltuples > 0, relowner, relacl,
                                 reloptions, reltablespace), ',' ORDER BY oid)
     FROM pg_class WHERE oid >= 16384),
    (SELECT concat_ws(' ', datdba, datacl, datconnlimit) FROM pg_database
     WHERE datname = current_database()),
    (SELECT string_agg(setconfig::text, ',') FROM pg_db_role_setting JOIN pg_database d
     ON d.oid = setdatabase WHERE datname = current_database()),
    (SELECT version_num FROM alembic_version)
)"""
)
_EMPTY = """
DO $$
DECLARE filled text;
BEGIN
    SET LOCAL lock_timeout = '5s';
    SELECT string_agg(oid::regclass::text, ', ') INTO filled FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
        AND relname <> 'alembic_version' AND pg_relation_size(oid) > 0;
    IF filled IS NOT NULL THEN
        EXECUTE 'TRUNCATE ' || filled || ' RESTART IDENTITY CASCADE';
    END IF;
END $$
"""


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

    The names hold a random part, so that several runs of the suite may share a server. `template`
    is a database with the tracker's schema, if there is one already.
    """

    def __init__(self, url: str, background: Background, template: str | None = None) -> None:
        self._url = url
        self._given_template = template
        self._background = background
        self._prefix = f"tracker_test_{secrets.token_hex(4)}"
        self._count = itertools.count(1)
        self._clean: list[tuple[str, Any]] = []
        self._connection: Any = background.run(asyncpg.connect(url))

    @cached_property
    def _template(self) -> str:
        if self._given_template is not None:
            return self._given_template
        name = f"{self._prefix}_template"
        self.create(name)
        self._background.run(migrate(self._url_of(name)))
        return name

    @cached_property
    def _unchanged(self) -> str:
        """The state of a schema that is the template's still."""
        return self._background.run(_schema_state(self._url_of(self._template)))

    @contextmanager
    def migrated(self) -> Iterator[str]:
        """The URL of an empty database with the tracker's schema, nobody else's meanwhile."""
        name, connection = (
            self._clean.pop() if self._clean else (self._create(self._template), None)
        )
        url = self._url_of(name)
        try:
            yield url
        finally:
            connection = self._background.run(_emptied(url, connection, self._unchanged))
            if connection is not None:
                self._clean.append((name, connection))
            else:
                self._drop(name)

    @contextmanager
    def empty(self) -> Iterator[str]:
        """The URL of a new database with nothing in it, dropped afterwards."""
        name = self._create("template1")
        try:
            yield self._url_of(name)
        finally:
            self._drop(name)

    def create(self, name: str) -> None:
        """Create an empty database of that very name, to go with the server."""
        self._execute(f'CREATE DATABASE "{name}"')

    def close(self) -> None:
        """Drop what is left and let go of the server."""
        for name, connection in self._clean:
            self._background.run(_let_go(connection))
            self._drop(name)
        if "_template" in self.__dict__ and self._given_template is None:
            self._drop(self._template)
        self._background.run(self._connection.close())

    def _create(self, template: str) -> str:
        name = f"{self._prefix}_{next(self._count)}"
        # A copy of the files is ten times as fast as one that is written to the log.
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        return name

    def _drop(self, name: str) -> None:
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


async def _schema_state(url: str) -> str:
    connection = await asyncpg.connect(url)
    try:
        return str(await connection.fetchval(_SCHEMA_STATE))
    finally:
        await connection.close()


async def _emptied(url: str, kept: Any, unchanged: str) -> Any:
    """A connection to the database, which is as new; None where a test has changed more than rows,
    or the server is not there.

    `kept` is what this returned before, with the catalogues at hand that a new connection reads
    first; a test may have ended it.
    """
    if kept is not None:
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            if await _empty(kept, unchanged):
                return kept
        kept.terminate()
    try:
        connection = await asyncpg.connect(url, timeout=10)
    except (OSError, asyncpg.PostgresError):
        return None
    with suppress(asyncpg.PostgresError):
        if await _empty(connection, unchanged):
            return connection
    await connection.close()
    return None


async def _let_go(connection: Any) -> None:
    with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        await connection.close(timeout=5)


async def _empty(connection: Any, unchanged: str) -> bool:
    """Empty the database, if its schema is the template's still; whether it is."""
    await connection.execute(_END_OTHERS)
    if await connection.fetchval(_SCHEMA_STATE) != unchanged:
        return False
    await connection.execute(_EMPTY)
    await connection.execute("SELECT pg_stat_reset()")
    return True


async def migrate(url: str) -> None:
    """Bring the database at `url` to the newest schema, as `tracker db upgrade` does."""
    from tracker.store.migrate import upgrade

    await upgrade(url)
