"""Bring a database to this version's schema, and tell whether it is there.

The revisions lie in `migrations/`: at the top of a checkout, inside the package in a wheel.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, column, select, table

from tracker.core.errors import SchemaOutdated, StoreError
from tracker.store.engine import Database, migration_engine
from tracker.store.faults import FOREIGN, translate
from tracker.store.url import DatabaseUrl

T = TypeVar("T")

_ALEMBIC: Final = threading.Lock()
_VERSION: Final = table("alembic_version", column("version_num"))


async def upgrade(url: str) -> None:
    """Bring the database at `url` to the newest schema; one that is there, or later, stays.

    A SQLite file is created where it is missing. Several processes may do this at the same time.
    Raises `StoreUnavailable` where the database does not answer, `StoreError` for the rest.
    """

    def work(connection: Connection) -> None:
        found = MigrationContext.configure(connection).get_current_revision()
        connection.rollback()
        if found is None or found in _revisions():
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    # Alembic keeps what it works on in module globals: within a process, one after the other,
    # whichever event loop it is.
    while not _ALEMBIC.acquire(blocking=False):  # noqa: ASYNC110 - no event reaches across loops
        await asyncio.sleep(0.02)
    try:
        await _connected(url, work)
    finally:
        _ALEMBIC.release()


async def current(url: str) -> str | None:
    """The revision of the database at `url`; `None` for one without the tracker's tables."""
    if DatabaseUrl.parse(url).missing:
        return None  # to look must not create it
    return await _connected(
        url, lambda connection: MigrationContext.configure(connection).get_current_revision()
    )


@cache
def head() -> str:
    """The newest revision that this version knows."""
    found = ScriptDirectory.from_config(_config()).get_current_head()
    if found is None:
        raise StoreError("the tracker's migrations are missing from this installation")
    return found


async def check(db: Database) -> None:
    """Return where the database has this version's schema, or a later version's.

    Raises `SchemaOutdated`, saying what to do, where it has not.
    """
    try:
        async with db.read() as connection:
            found = (await connection.execute(select(_VERSION.c.version_num))).scalar()
    except SchemaOutdated:
        found = None
    if found is None:
        raise SchemaOutdated("the database has no tables yet: run `tracker db upgrade`")
    if found != head() and found in _revisions():
        raise SchemaOutdated(
            f"the database is at revision {found}, and this version needs {head()}: "
            "run `tracker db upgrade`"
        )


def run_from_command_line(migrate: Callable[[Connection], None]) -> None:
    """For Alembic's own command line: run `migrate` over the database of TRACKER_DATABASE_URL."""
    url = os.environ.get("TRACKER_DATABASE_URL", "sqlite:///tracker.db")
    asyncio.run(_connected(url, migrate))


async def _connected(url: str, work: Callable[[Connection], T]) -> T:
    engine = migration_engine(DatabaseUrl.parse(url))
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(work)
    except FOREIGN as exc:
        raise translate(exc) from exc
    finally:
        await engine.dispose()


@cache
def _revisions() -> frozenset[str]:
    script = ScriptDirectory.from_config(_config())
    return frozenset(revision.revision for revision in script.walk_revisions())


def _config() -> Config:
    config = Config()
    # Alembic reads its options with interpolation.
    config.set_main_option("script_location", str(_directory()).replace("%", "%%"))
    return config


def _directory() -> Path:
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "migrations", package.parent / "migrations"):
        if (candidate / "env.py").is_file():
            return candidate
    raise StoreError("the tracker's migrations are missing from this installation")
