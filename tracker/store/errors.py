"""Errors of drivers and of SQLAlchemy become the tracker's own here, and nowhere else.

The code of the database (SQLSTATE, SQLite's result code) distinguishes them, never the wording,
except where SQLite has one code for several errors.
"""

import sqlite3
from functools import cache
from typing import Final

from sqlalchemy.exc import DBAPIError, InterfaceError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tracker.core.errors import SchemaOutdated, StoreError, StoreUnavailable


class StoreBusy(StoreUnavailable):
    """A lock was held for too long, or a statement took too long: one item of a group causes it."""


class StoreClosed(StoreUnavailable):
    """This process has closed the database: trying again is in vain."""


class StoreRefused(StoreError):
    """The database refuses the data."""


class WriteConflict(Exception):
    """Another transaction came in between: roll back and run it again."""


_BUSY: Final = frozenset({"55P03", "57014"})  # lock time-out, statement time-out
_CONFLICTS: Final = frozenset({"40001", "40P01"})  # serialization failure, deadlock
_UNAVAILABLE_CLASSES: Final = (
    "08",  # connection exception
    "28",  # invalid authorization
    "53",  # out of disk, memory or connections
    "57",  # shutdown, crash recovery, time-out
    "58",  # input and output of the server
)
_STANDBY: Final = "25006"  # a transaction that cannot write
_UNAVAILABLE: Final = frozenset(
    {
        _STANDBY,
        "25P03",  # idle in transaction for too long
        "25P04",  # transaction time-out
        "3D000",  # no such database
        "42501",  # this role lacks a privilege, as after a restore by another one
        "XX001",  # a damaged page
        "XX002",
    }
)
_DATA_CLASSES: Final = ("22", "23", "54")  # data exception, constraint, program limit exceeded
_OUTDATED: Final = frozenset({"42P01", "42703", "3F000"})  # no such table, column, schema

_SQLITE_DATA: Final = frozenset(
    {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH}
)
_SQLITE_UNAVAILABLE: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOTADB,
    }
)
_SQLITE_ACCESS: Final = frozenset(
    {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}
)

FOREIGN: Final = (SQLAlchemyError, sqlite3.Error, OSError, TimeoutError)
"""What a database call may raise; anything else is a fault of the tracker."""


@cache
def postgres_errors() -> tuple[type[BaseException], ...]:
    """What a call may raise where asyncpg is called directly."""
    import asyncpg  # noqa: PLC0415 - not loaded for SQLite

    own = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
    return (*FOREIGN, *own)


OUTDATED_ADVICE: Final = (
    "the database's schema is older than this version: run `tracker db upgrade`"
)


def is_conflict(error: BaseException) -> bool:
    """Whether the transaction is likely to succeed if it is run again at once."""
    return isinstance(error, WriteConflict) or _sqlstate(error) in _CONFLICTS


def is_standby(error: BaseException) -> bool:
    """Whether the connection leads to a standby, which takes no writes."""
    return _sqlstate(error) == _STANDBY


def is_refusal(error: BaseException) -> bool:
    """Whether the server refused a statement and is ready for the next one."""
    state = _sqlstate(error)
    if state is None or state in _UNAVAILABLE:
        return False
    return not state.startswith(_UNAVAILABLE_CLASSES)


def translate(error: BaseException) -> StoreError:
    """The tracker's error for a foreign one, to be raised `from` it."""
    what = _first_line(error)
    if isinstance(error, PoolTimeout):
        return StoreUnavailable("the database is too busy: no connection became free in time")
    if isinstance(error, TimeoutError):
        return StoreUnavailable("the database does not answer in time")
    if isinstance(error, OSError):
        return StoreUnavailable(f"the database cannot be reached: {what}")
    state = _sqlstate(error)
    if state is not None:
        if state in _OUTDATED:
            return SchemaOutdated(f"{OUTDATED_ADVICE} ({what})")
        if state in _BUSY:
            return StoreBusy(f"the database is too busy: {what}")
        if state in _UNAVAILABLE or state in _CONFLICTS or state.startswith(_UNAVAILABLE_CLASSES):
            return StoreUnavailable(f"the database is not available: {what}")
        refused = StoreRefused if state.startswith(_DATA_CLASSES) else StoreError
        return refused(f"the database refuses this: {what}")
    code = _sqlite_code(error)
    if code is not None:
        if code & 0xFF in _SQLITE_ACCESS:  # as after a command of another user
            what += "; its file and folder must be writable for the user that runs the tracker"
        if code & 0xFF in _SQLITE_UNAVAILABLE:
            return StoreUnavailable(f"the database is not available: {what}")
        if what.startswith(("no such table", "no such column")) or "has no column named" in what:
            return SchemaOutdated(f"{OUTDATED_ADVICE} ({what})")
        refused = StoreRefused if code & 0xFF in _SQLITE_DATA else StoreError
        return refused(f"the database refuses this: {what}")
    # No code: the driver itself failed, on a lost connection.
    driver = type(_driver_error(error))
    is_drivers = isinstance(error, InterfaceError) or driver.__module__.startswith("asyncpg.")
    if is_drivers or getattr(error, "connection_invalidated", False):
        return StoreUnavailable(f"the connection to the database is lost: {what}")
    if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
        return StoreRefused(f"the database cannot take this: {what}")  # it was not sent
    return StoreError(f"the database cannot do this: {what}")


def _driver_error(error: BaseException) -> BaseException | None:
    """The driver's own error, inside SQLAlchemy's wrapper and asyncpg's adapter."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    return getattr(error, "driver_exception", None) or error


def _sqlstate(error: BaseException) -> str | None:
    state = getattr(_driver_error(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def _sqlite_code(error: BaseException) -> int | None:
    code = getattr(_driver_error(error), "sqlite_errorcode", None)
    return code if isinstance(code, int) else None


def _first_line(error: BaseException) -> str:
    """The first line of the driver's message: the rest may show rows."""
    lines = str(_driver_error(error)).splitlines()
    return lines[0] if lines else type(error).__name__
