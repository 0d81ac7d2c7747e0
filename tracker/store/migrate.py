"""Migrate a database to this version's schema, and check whether it has it.

Alembic takes a fifth of a short command's time to load, and most commands find the schema up to
date. So it is loaded only for a migration, and the revisions are read from the names of their
files: in `migrations/`, at the top of a checkout or inside the package in a wheel.
"""

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Text, column, inspect, select, table

from tracker.core.errors import SchemaOutdated, StoreError
from tracker.store.engine import Database, migration_engine
from tracker.store.errors import FOREIGN, translate
from tracker.store.sqlite import join_stopped
from tracker.store.url import DatabaseUrl

T = TypeVar("T")

PATIENCE_SECONDS: Final = 60.0
"""How long a migration waits for its locks."""

ENCODING_ADVICE: Final = (
    "what FLORA sends needs UTF8, so create another one with "
    "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
)

_ALEMBIC: Final = threading.Lock()
_VERSION: Final = table("alembic_version", column("version_num", Text))
_FILE: Final = re.compile(r"(\d{4})_\w+\.py")


def head() -> str:
    """The newest revision that this version knows."""
    return known()[-1]


def is_known(revision: str) -> bool:
    """Whether a revision is one of this version, not of a later one."""
    return revision in known()


@cache
def known() -> tuple[str, ...]:
    """All revisions, oldest first."""
    names = (each.name for each in (directory() / "versions").iterdir())
    return tuple(sorted(match[1] for match in map(_FILE.fullmatch, names) if match))


def directory() -> Path:
    """The directory of Alembic's environment: in a wheel inside the package, else beside it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


async def upgrade(
    url: str,
    revision: str = "head",
    *,
    patience: float = PATIENCE_SECONDS,
    history_since: timedelta = timedelta(days=7),
) -> None:
    """Migrate the database at `url` to the newest schema; a newer or equal one stays.

    A missing SQLite file is created. Several processes may do this at the same time, and others may
    use the database: on PostgreSQL their locks are waited for, `patience` seconds in all.
    `history_since` is how far back a migration lets the history be read again. Raises
    `StoreUnavailable` if the database does not answer, `StoreError` for the rest, as for an empty
    database that cannot hold every text of FLORA.
    """

    def work(connection: Connection) -> None:
        found = _revision(connection)
        if found is None:
            _check_encoding(connection)
        connection.rollback()
        if found is None or (is_known(found) and found != head()):
            _migrate(connection, revision, patience=patience, history_since=history_since)

    # Alembic has module globals: one migration at a time in a process, in whichever event loop.
    while not _ALEMBIC.acquire(blocking=False):  # noqa: ASYNC110 - no event reaches across loops
        await asyncio.sleep(0.02)
    try:
        await connected(url, work)
    finally:
        _ALEMBIC.release()


@asynccontextmanager
async def open_database(url: str, *, history_since: timedelta) -> AsyncIterator[Database]:
    """The database at `url`, at this version's schema, until the block ends.

    A SQLite file is migrated first; a PostgreSQL database that is too old raises `SchemaOutdated`.
    Raises `StoreUnavailable` if the database does not answer.
    """
    if DatabaseUrl.parse(url).missing:
        await upgrade(url, history_since=history_since)
    async with await Database.open(url) as database:
        try:
            await check(database)
        except SchemaOutdated:
            if database.dialect != "sqlite":
                raise
            await upgrade(url, history_since=history_since)
            await check(database)
        yield database


async def current(url: str) -> str | None:
    """The revision of the database at `url`; `None` for one without the tracker's tables."""
    if DatabaseUrl.parse(url).missing:
        return None  # checking must not create it
    return await connected(url, _revision)


async def revision(db: Database) -> str | None:
    """The revision of an open database; `None` for one without the tracker's tables."""
    try:
        return await db.fetchval(select(_VERSION.c.version_num))
    except SchemaOutdated:
        return None


async def check(db: Database) -> None:
    """Return if the database has this version's schema or a later one.

    Otherwise raises `SchemaOutdated`, with what to do.
    """
    found = await revision(db)
    if found is None:
        raise SchemaOutdated("the database has no tables yet: run `tracker db upgrade`")
    if found != head() and is_known(found):
        raise SchemaOutdated(
            f"the database is at revision {found}, and this version needs {head()}: "
            "run `tracker db upgrade`"
        )


def run_from_command_line(migrate: Callable[[Connection], None]) -> None:
    """For Alembic's own command line: run `migrate` over the database of TRACKER_DATABASE_URL."""
    url = os.environ.get("TRACKER_DATABASE_URL", "sqlite:///tracker.db")
    asyncio.run(connected(url, migrate))


async def connected(url: str, work: Callable[[Connection], T]) -> T:
    """Run `work` over a connection of its own, without time-outs. Raises as `upgrade` does."""
    place = DatabaseUrl.parse(url)
    engine = migration_engine(place)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(work)
    except FOREIGN as exc:
        raise translate(exc) from exc
    finally:
        await engine.dispose()
        await join_stopped(place.times.busy)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(_VERSION.name):
        return None
    return connection.execute(select(_VERSION.c.version_num)).scalar()


def _check_encoding(connection: Connection) -> None:
    """Raise `StoreError` unless the encoding is UTF-8: it cannot be changed later."""
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding != "UTF8":
        raise StoreError(f"the database has the encoding {encoding}: {ENCODING_ADVICE}")


def _migrate(connection: Connection, revision: str, **attributes: Any) -> None:
    from alembic import command  # noqa: PLC0415 - slow to load
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    # Alembic reads its options with interpolation.
    config.set_main_option("script_location", str(directory()).replace("%", "%%"))
    config.attributes |= {"connection": connection, **attributes}
    command.upgrade(config, revision)
