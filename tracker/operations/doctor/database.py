"""The database: whether it answers and accepts writes, its schema, notifications, and its disk."""

import asyncio
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.core.formatting import size
from tracker.operations.doctor import Finding, failed, ok, warning
from tracker.store import migrate
from tracker.store.inspection import (
    PATIENCE,
    PostgresInspection,
    SqliteInspection,
    inspect_postgres,
    inspect_sqlite,
)
from tracker.store.url import TLS_ADVICE, DatabaseUrl

OLDEST_POSTGRES: Final = 13
"""The first version that knows all storage parameters of our tables."""
CROWDED: Final = 0.8
"""Share of a server's connections from which on new processes may get none."""
_MORE_CONNECTIONS: Final = (
    "Raise max_connections, or the CONNECTION LIMIT of the role or database, or let others use "
    "fewer; a tracker process uses up to 15."
)
_MIB: Final = 1024 * 1024
DISK_FAILS: Final = 64 * _MIB
"""About what a burst of callbacks and the write-ahead log between two checkpoints need."""
DISK_WARNS: Final = 512 * _MIB
_FREE_SPACE: Final = (
    "Pruning writes too: first free 64 MiB there by other files, because SQLite's log (-wal) may "
    "take half of that. Then `tracker db prune --older-than 90d` deletes old runs, whose space in "
    "the file is reused."
)
FEW_FILES: Final = 100


@dataclass(frozen=True, slots=True)
class DatabaseState:
    """What was found, for the report and for other checks.

    `readable` and `writable`: what can be done with this version's tables. `clock_ahead` is the
    server's clock minus this machine's, `size` the bytes of the database on the server; both are
    `None` for SQLite and if unknown.
    """

    findings: Sequence[Finding]
    readable: bool = False
    writable: bool = False
    clock_ahead: timedelta | None = None
    size: int | None = None


async def check(url: DatabaseUrl, *, clock: Clock, patience: float = PATIENCE) -> DatabaseState:
    """Check the database without changing it."""
    try:
        if url.dialect == "sqlite":
            return _sqlite(await inspect_sqlite(url, patience=patience))
        return judge_postgres(url, await inspect_postgres(url, clock=clock, patience=patience))
    except StoreError as error:
        return DatabaseState([failed("database", f"{url}: {error}.", _error_advice(url, error))])


def _sqlite(found: SqliteInspection) -> DatabaseState:
    if not found.exists:
        return DatabaseState([_missing_file(found)])
    schema, readable = _schema(found.revision, migrates_at_start=True)
    if found.refuses_writes is not None:
        first = failed(
            "database",
            f"{found.path} does not accept writes: {found.refuses_writes}.",
            _sqlite_advice(found.refuses_writes, found.path),
        )
    elif found.revision is not None and found.journal_mode != "wal":
        first = warning(
            "database",
            f"{found.path} accepts writes, but is in journal mode {found.journal_mode}: readers "
            "and the writer block each other.",
            "Restart `tracker serve`, which sets WAL. If that does not last, the file is on a "
            "network file system: move it to a local disk, or use PostgreSQL.",
        )
    else:
        first = ok("database", f"{found.path} (SQLite {sqlite3.sqlite_version}) accepts writes.")
    return DatabaseState(
        [first, schema],
        readable=readable,
        writable=found.revision is not None and found.refuses_writes is None,
    )


def _missing_file(found: SqliteInspection) -> Finding:
    if not found.directory_writable:
        return failed(
            "database",
            f"There is no {found.path}, and its folder is missing or not writable.",
            "Create the folder and give it to the user that runs the tracker, or name another in "
            "TRACKER_DATABASE_URL (sqlite:////…, with four slashes, is an absolute path).",
        )
    return failed(
        "database",
        f"There is no {found.path}.",
        "Start `tracker serve`, which creates it. If it is running already, its file is elsewhere: "
        "run the doctor in the same folder with the same TRACKER_DATABASE_URL, preferably an "
        "absolute path (sqlite:////…).",
    )


def _sqlite_advice(why: str, path: Path) -> str:
    if "locked" in why or "busy" in why:
        return (
            f"Something holds the file for seconds: `fuser {path}` names it. Run one long-running "
            "tracker only, and make backups with sqlite3's `.backup`, not under a lock."
        )
    if "readonly" in why or "unable to open" in why:
        return (
            f"Give {path} and its folder to the user that runs the tracker, and run the doctor as "
            "that user; check whether the file system is mounted read-only."
        )
    if "full" in why or "I/O" in why:
        return f"Check the disk of {path} (`df -h`, `dmesg`). {_FREE_SPACE}"
    return (
        f"Check that it is the right file, and intact: `sqlite3 {path} 'PRAGMA quick_check'`. "
        "Replace a damaged one by its backup; the next sweep finds what it lacks."
    )


def judge_postgres(url: DatabaseUrl, found: PostgresInspection) -> DatabaseState:
    """The findings for a PostgreSQL server in this condition."""
    schema, readable = _schema(found.revision, migrates_at_start=False)
    findings = [_server(url, found), *_tls(url), schema]
    if not found.standby:
        findings.append(_notifications(found))
    writable = found.revision is not None and found.refuses_writes is None and not found.lacking
    return DatabaseState(
        findings,
        readable=readable and not found.lacking,
        writable=writable,
        clock_ahead=found.clock_ahead,
        size=found.size,
    )


def _server(url: DatabaseUrl, found: PostgresInspection) -> Finding:
    server = f"{url} (PostgreSQL {found.version})"
    if found.standby:
        return failed(
            "database",
            f"{server} is a standby, which accepts no writes.",
            "Point TRACKER_DATABASE_URL to the primary. If they switch roles, name them all: "
            "postgresql://…@one,two/tracker?target_session_attrs=read-write.",
        )
    if found.major < OLDEST_POSTGRES:
        return failed(
            "database",
            f"{server} is too old.",
            f"Upgrade to PostgreSQL {OLDEST_POSTGRES} or newer.",
        )
    if found.lacking:
        return failed(
            "database",
            f"{server} does not let this role use {', '.join(found.lacking)}.",
            "As the owner of the tables: GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN "
            "SCHEMA public TO that role; or let it run `tracker db upgrade` and own them.",
        )
    if found.refuses_writes is not None:
        return failed(
            "database",
            f"{server} does not accept writes: {found.refuses_writes}.",
            "Fix that at the server: disk space, locks (pg_stat_activity), "
            "default_transaction_read_only.",
        )
    if found.encoding != "UTF8":
        return failed(
            "database",
            f"{server} has the encoding {found.encoding}, in which texts of FLORA may be refused "
            "or damaged.",
            "Create another database with ENCODING 'UTF8' TEMPLATE template0, and carry the data "
            "over with `tracker db copy --to`.",
        )
    in_use = f"{found.connections} of {found.most_connections} connections are in use"
    if found.connections >= CROWDED * found.most_connections:
        return warning(
            "database",
            f"{server} accepts writes, but {in_use}, {found.own} of them by the tracker.",
            _MORE_CONNECTIONS,
        )
    return ok("database", f"{server} accepts writes; {in_use}.")


def _tls(url: DatabaseUrl) -> list[Finding]:
    if not url.is_remote:
        return []
    if url.tls_trouble is None:
        return [ok("database TLS", f"The server is verified (sslmode={url.sslmode}).")]
    say = warning if url.sslmode == "disable" else failed  # disable is a deliberate choice
    return [say("database TLS", f"{url.tls_trouble}.", TLS_ADVICE)]


def _schema(revision: str | None, *, migrates_at_start: bool) -> tuple[Finding, bool]:
    """The finding for the schema, and whether this version can read it.

    `migrates_at_start`: whether a process that starts upgrades the schema.
    """
    head = migrate.head()
    if revision is None:
        start = "Start `tracker serve`, which creates them, or run" if migrates_at_start else "Run"
        return failed(
            "migrations", "The database has no tracker tables.", f"{start} `tracker db upgrade`."
        ), False
    if revision == head:
        return ok("migrations", f"The database is at {head}, the newest known revision."), True
    if not migrate.is_known(revision):
        return warning(
            "migrations",
            f"The database is at {revision}, later than this version, whose newest is {head}.",
            "That works during a rollout. Install the new version here too, and restart what "
            "still runs the old one.",
        ), True
    restart = ", or restart `tracker serve`, which does it" if migrates_at_start else ""
    return failed(
        "migrations",
        f"The database is at {revision}, and this version needs {head}.",
        f"Run `tracker db upgrade`{restart}. Running processes are not interrupted.",
    ), False


def _notifications(found: PostgresInspection) -> Finding:
    if found.notifies:
        return ok("notifications", "Notifications (LISTEN/NOTIFY) arrive.")
    return warning(
        "notifications",
        "Notifications (LISTEN/NOTIFY) do not arrive: a connection pooler shares connections.",
        "Connect to PostgreSQL directly, or let the pooler keep a connection per session (in "
        "PgBouncer: pool_mode = session). Until then workers notice new work up to 15 s late, and "
        "live pages lag.",
    )


_SQLSTATE_ADVICE: Final = {
    "28": "Fix the user or the password in TRACKER_DATABASE_URL (write @ and / as %40 and %2F), or "
    "let the server accept them (pg_hba.conf).",
    "3D000": "Fix the database's name in TRACKER_DATABASE_URL, or create it with `createdb`.",
    "53": _MORE_CONNECTIONS,
    "08P01": "A connection pooler answers that. Connect to PostgreSQL directly, or let the pooler "
    "pass these on (in PgBouncer: ignore_startup_parameters = statement_timeout, lock_timeout, "
    "idle_in_transaction_session_timeout, jit; pool_mode = session).",
    "42501": "Let the role in TRACKER_DATABASE_URL read and write the tracker's tables (GRANT), or "
    "let it run `tracker db upgrade` and own them.",
    "57": "Wait until the server is up again; the tracker then continues by itself.",
}
"""By the beginning of PostgreSQL's error code."""


def _error_advice(url: DatabaseUrl, error: StoreError) -> str:
    cause = error.__cause__
    if url.dialect == "sqlite":
        return _sqlite_advice(str(cause), Path(url.path))
    state = str(getattr(cause, "sqlstate", None) or "")
    for code, advice in _SQLSTATE_ADVICE.items():
        if state.startswith(code):
            return advice
    return (
        "Check that the server is up, that host and port in TRACKER_DATABASE_URL are right, and "
        "that no firewall is in between: `pg_isready -d` with that URL shows it."
    )


async def check_disk(url: DatabaseUrl, server_size: int | None) -> list[Finding]:
    """Check the disk. `server_size`: bytes of a database on a server, if known."""
    if url.dialect == "sqlite":
        return [await asyncio.to_thread(_local_disk, url.path)]
    taken = "" if server_size is None else f" The database takes {size(server_size)}."
    return [ok("disk", f"The database server's disk is not visible from here.{taken}")]


def _local_disk(file: str) -> Finding:
    path = Path(file).resolve()
    folder = path.parent
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return failed("disk", f"{folder}: {error.strerror}.", "Check that folder and its disk.")
    free = disk.f_bavail * disk.f_frsize
    taken = sum(map(_size_of, (path, path.with_name(f"{path.name}-wal"))))
    seen = f"{size(free)} are free in {folder}; the database takes {size(taken)}."
    advice = (
        "Free space there, or move the database. `tracker db prune --older-than 90d` deletes old "
        "runs; their space in the file is reused."
    )
    if free < DISK_FAILS:
        return failed("disk", seen, f"{_FREE_SPACE} Or move the database.")
    if disk.f_files and disk.f_favail < FEW_FILES:
        return failed(
            "disk",
            f"{folder} has room for {disk.f_favail} more files: its disk is out of inodes.",
            "Delete files there that are not needed (`df -i` shows the count).",
        )
    if free < max(DISK_WARNS, taken):
        return warning("disk", f"{seen} A migration or a VACUUM may need as much again.", advice)
    return ok("disk", seen)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
