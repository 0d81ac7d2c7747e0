"""Errors of drivers and of SQLAlchemy become the tracker's own here, and nowhere else.

The code of the database (SQLSTATE, SQLite's result code) distinguishes them, never the wording,
except where SQLite has one code for several errors.
"""

import sqlite3
from collections.abc import Mapping
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


_CONFLICTS: Final = ("40001", "40P01")  # serialization failure, deadlock
_STANDBY: Final = "25006"  # a transaction that cannot write
_BY_SQLSTATE: Final[Mapping[str, type[StoreError]]] = {
    "08": StoreUnavailable,  # connection exception
    "22": StoreRefused,  # data exception
    "23": StoreRefused,  # constraint violation
    _STANDBY: StoreUnavailable,
    "25P03": StoreUnavailable,  # idle in transaction for too long
    "25P04": StoreUnavailable,  # transaction time-out
    "28": StoreUnavailable,  # invalid authorization
    "3D000": StoreUnavailable,  # no such database
    "3F000": SchemaOutdated,  # no such schema
    **dict.fromkeys(_CONFLICTS, StoreUnavailable),
    "42501": StoreUnavailable,  # this role lacks a privilege, as after a restore by another one
    "42703": SchemaOutdated,  # no such column
    "42P01": SchemaOutdated,  # no such table
    "53": StoreUnavailable,  # out of disk, memory or connections
    "54": StoreRefused,  # program limit exceeded
    "55P03": StoreBusy,  # lock time-out
    "57": StoreUnavailable,  # shutdown, crash recovery
    "57014": StoreBusy,  # statement time-out
    "58": StoreUnavailable,  # input and output of the server
    "XX001": StoreUnavailable,  # a damaged page
    "XX002": StoreUnavailable,  # a damaged index
}
"""The error for a code, or for all codes that begin with these two characters."""

_BY_SQLITE_CODE: Final[Mapping[int, type[StoreError]]] = {
    sqlite3.SQLITE_CONSTRAINT: StoreRefused,
    sqlite3.SQLITE_TOOBIG: StoreRefused,
    sqlite3.SQLITE_MISMATCH: StoreRefused,
    sqlite3.SQLITE_BUSY: StoreUnavailable,
    sqlite3.SQLITE_LOCKED: StoreUnavailable,
    sqlite3.SQLITE_NOMEM: StoreUnavailable,
    sqlite3.SQLITE_READONLY: StoreUnavailable,
    sqlite3.SQLITE_INTERRUPT: StoreUnavailable,
    sqlite3.SQLITE_IOERR: StoreUnavailable,
    sqlite3.SQLITE_CORRUPT: StoreUnavailable,
    sqlite3.SQLITE_FULL: StoreUnavailable,
    sqlite3.SQLITE_CANTOPEN: StoreUnavailable,
    sqlite3.SQLITE_PROTOCOL: StoreUnavailable,
    sqlite3.SQLITE_PERM: StoreUnavailable,
    sqlite3.SQLITE_AUTH: StoreUnavailable,
    sqlite3.SQLITE_NOTADB: StoreUnavailable,
}
_SQLITE_ACCESS: Final = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY)

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
    return state in _CONFLICTS or (state is not None and _kind_of(state) is not StoreUnavailable)


def translate(error: BaseException) -> StoreError:
    """The tracker's error for a foreign one, to be raised `from` it."""
    what = _first_line(error)
    if isinstance(error, PoolTimeout):
        return StoreUnavailable("the database is too busy: no connection became free in time")
    if isinstance(error, TimeoutError):
        return StoreUnavailable("the database does not answer in time")
    if isinstance(error, OSError):
        return StoreUnavailable(f"the database cannot be reached: {what}")
    if (state := _sqlstate(error)) is not None:
        kind = _kind_of(state)
    elif (code := _sqlite_code(error)) is not None:
        kind = _BY_SQLITE_CODE.get(code, StoreError)
        if code in _SQLITE_ACCESS:  # as after a command of another user
            what += "; its file and folder must be writable for the user that runs the tracker"
        elif what.startswith(("no such table", "no such column")) or "has no column named" in what:
            kind = SchemaOutdated
    else:
        return _without_code(error, what)
    if kind is SchemaOutdated:
        return SchemaOutdated(f"{OUTDATED_ADVICE} ({what})")
    return kind(f"{_MEANING.get(kind, 'the database refuses this')}: {what}")


_MEANING: Final[Mapping[type[StoreError], str]] = {
    StoreBusy: "the database is too busy",
    StoreUnavailable: "the database is not available",
}


def _kind_of(state: str) -> type[StoreError]:
    return _BY_SQLSTATE.get(state) or _BY_SQLSTATE.get(state[:2], StoreError)


def _without_code(error: BaseException, what: str) -> StoreError:
    """The error for one that SQLAlchemy or the driver itself raised."""
    driver = type(_driver_error(error))
    is_drivers = isinstance(error, InterfaceError) or driver.__module__.startswith("asyncpg.")
    if driver.__name__ == "InternalClientError":  # about asyncpg's own states
        return StoreUnavailable("the connection to the database is lost")
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
    """SQLite's primary result code."""
    code = getattr(_driver_error(error), "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else None


def _first_line(error: BaseException) -> str:
    """The first line of the driver's message: the rest may show rows."""
    lines = str(_driver_error(error)).splitlines()
    return lines[0] if lines else type(error).__name__
