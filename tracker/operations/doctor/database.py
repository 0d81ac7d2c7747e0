"""The database: whether it answers and takes rows, its schema, and whether its notices arrive."""

import sqlite3
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from tracker.core.clock import Clock
from tracker.core.errors import StoreError
from tracker.operations.doctor.finding import Finding, failed, ok, warning
from tracker.store import migrate
from tracker.store.condition import (
    PostgresCondition,
    SqliteCondition,
    look_at_postgres,
    look_at_sqlite,
)
from tracker.store.url import TLS_ADVICE, DatabaseUrl

OLDEST_POSTGRES: Final = 13
"""The first that knows all storage parameters of our tables."""
CROWDED: Final = 0.8
"""The share of a server's connections from which on a process may find none left."""
EACH_PROCESS: Final = 13
"""How many connections a process of the tracker takes at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseState:
    """What was found, and what the other looks may build upon.

    `readable` and `writable` say what can be done with this version's tables. `clock_ahead` is the
    server's clock minus this machine's, `size` what the database takes on the server's disk; both
    are `None` for SQLite and where nothing is known.
    """

    findings: tuple[Finding, ...]
    readable: bool = False
    writable: bool = False
    clock_ahead: timedelta | None = None
    size: int | None = None


async def look(url: DatabaseUrl, *, clock: Clock) -> DatabaseState:
    """Look at the database, and change nothing in it."""
    try:
        if url.dialect == "sqlite":
            return _sqlite(await look_at_sqlite(url))
        return judge_postgres(url, await look_at_postgres(url, clock=clock))
    except StoreError as error:
        return DatabaseState(findings=(_unread(url, error),))


def _sqlite(seen: SqliteCondition) -> DatabaseState:
    name: Final = "database"
    if not seen.exists and not seen.directory_writable:
        return DatabaseState(
            findings=(
                failed(
                    name,
                    f"There is no {seen.path}, and its folder is missing or cannot be written.",
                    "Make the folder and give it to the user that runs the tracker, or let "
                    "TRACKER_DATABASE_URL name another (sqlite:////…, with four slashes, is an "
                    "absolute path).",
                ),
            )
        )
    if not seen.exists:
        return DatabaseState(
            findings=(
                failed(
                    name,
                    f"There is no {seen.path}.",
                    "Start `tracker serve`, which makes it. Where it is running already, it keeps "
                    "its file elsewhere: run the doctor in the same folder and with the same "
                    "TRACKER_DATABASE_URL, best an absolute path (sqlite:////…).",
                ),
            )
        )
    schema, readable = _schema(seen.revision, by_itself=True)
    if seen.refuses_writes is not None:
        first = failed(
            name,
            f"{seen.path} takes no rows: {seen.refuses_writes}.",
            _sqlite_advice(seen.refuses_writes, seen.path),
        )
    elif seen.revision is not None and seen.journal_mode != "wal":
        first = warning(
            name,
            f"{seen.path} takes rows, but is in journal mode {seen.journal_mode}: readers and the "
            "writer wait for each other.",
            "Restart `tracker serve`, which sets WAL. Where that does not last, the file is on a "
            "network file system: move it to a local disk, or use PostgreSQL.",
        )
    else:
        first = ok(name, f"{seen.path} (SQLite {sqlite3.sqlite_version}) takes rows.")
    return DatabaseState(
        findings=(first, schema),
        readable=readable,
        writable=seen.revision is not None and seen.refuses_writes is None,
    )


def _sqlite_advice(why: str, path: Path) -> str:
    """What to do where SQLite itself says why it does not read or write."""
    if "locked" in why or "busy" in why:
        return (
            f"Something holds the file for seconds on end: `fuser {path}` names it. One long-"
            "running tracker is enough, and a backup is made with sqlite3's `.backup`, not under "
            "a lock."
        )
    if "readonly" in why or "unable to open" in why:
        return (
            f"Give {path} and its folder to the user that runs the tracker, and run the doctor as "
            "that user; see whether the file system is mounted read-only."
        )
    if "full" in why or "I/O" in why:
        return f"See to the disk of {path} (`df -h`, `dmesg`), and make room there."
    return (
        f"See whether it is the right file, and whether it is whole: `sqlite3 {path} 'PRAGMA "
        "quick_check'`. A damaged one is replaced by its backup; the next sweep finds what it "
        "lacks."
    )


def judge_postgres(url: DatabaseUrl, seen: PostgresCondition) -> DatabaseState:
    """What is to be said of a server."""
    schema, readable = _schema(seen.revision, by_itself=False)
    findings = [_server(url, seen), *_tls(url), schema]
    if not seen.standby:
        findings.append(_notices(seen))
    return DatabaseState(
        findings=tuple(findings),
        readable=readable and not seen.lacking,
        writable=seen.revision is not None and seen.refuses_writes is None and not seen.lacking,
        clock_ahead=seen.clock_ahead,
        size=seen.size,
    )


def _server(url: DatabaseUrl, seen: PostgresCondition) -> Finding:
    name: Final = "database"
    which = f"{url} (PostgreSQL {seen.version})"
    if seen.standby:
        return failed(
            name,
            f"{which} is a standby, which takes no rows.",
            "Point TRACKER_DATABASE_URL to the primary. Where they change places, name them all: "
            "postgresql://…@one,two/tracker?target_session_attrs=read-write.",
        )
    if seen.major < OLDEST_POSTGRES:
        return failed(
            name,
            f"{which} is too old.",
            f"Move to PostgreSQL {OLDEST_POSTGRES} or newer.",
        )
    if seen.lacking:
        return failed(
            name,
            f"{which} does not let this role use {', '.join(seen.lacking)}.",
            "As the tables' owner: GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "
            "public TO that role; or let it own them, by running `tracker db upgrade` itself.",
        )
    if seen.refuses_writes is not None:
        return failed(
            name,
            f"{which} takes no rows: {seen.refuses_writes}.",
            "Mend that at the server: room on its disk, locks that somebody holds "
            "(pg_stat_activity), default_transaction_read_only.",
        )
    in_use = f"{seen.connections} of {seen.most_connections} connections are in use"
    if seen.connections >= CROWDED * seen.most_connections:
        return warning(
            name,
            f"{which} takes rows, but {in_use}, {seen.own} of them by the tracker.",
            f"Raise max_connections, or let others use fewer; each process of the tracker takes up "
            f"to {EACH_PROCESS}.",
        )
    return ok(name, f"{which} takes rows; {in_use}.")


def _tls(url: DatabaseUrl) -> list[Finding]:
    """What is to be said of the way to a server on another machine."""
    if not url.is_remote:
        return []
    if url.tls_trouble is None:
        return [ok("database TLS", f"The server is verified (sslmode={url.sslmode}).")]
    bad = warning if url.sslmode == "disable" else failed  # disable is someone's decision
    return [bad("database TLS", f"{url.tls_trouble}.", TLS_ADVICE)]


def _schema(revision: str | None, *, by_itself: bool) -> tuple[Finding, bool]:
    """What is to be said of the schema, and whether this version can read it.

    `by_itself` is true where a process that starts brings it up to date.
    """
    name: Final = "migrations"
    try:
        head = migrate.head()
        known = revision is not None and migrate.is_known(revision)
    except StoreError as error:
        return failed(name, f"{error}.".capitalize(), "Install the tracker again."), False
    if revision is None:
        return failed(
            name,
            "The database has no tables of the tracker's.",
            "Start `tracker serve`, which makes them, or run `tracker db upgrade`."
            if by_itself
            else "Run `tracker db upgrade`.",
        ), False
    if revision == head:
        return ok(name, f"The database is at {head}, the newest that this version knows."), True
    if not known:
        return warning(
            name,
            f"The database is at {revision}, later than this version, whose newest is {head}.",
            "That works while a new version is rolled out. Install the new version here too, and "
            "restart what still runs the old one.",
        ), True
    restart = ", or restart `tracker serve`, which does it" if by_itself else ""
    return failed(
        name,
        f"The database is at {revision}, and this version needs {head}.",
        f"Run `tracker db upgrade`{restart}. What is running meanwhile goes on.",
    ), False


def _notices(seen: PostgresCondition) -> Finding:
    name: Final = "notifications"
    if seen.hears:
        return ok(name, "What one connection notifies, another hears.")
    return warning(
        name,
        "What one connection notifies, another does not hear: something between here and the "
        "server shares its connections.",
        "Connect to PostgreSQL itself, or let the pooler keep a connection for a session (in "
        "PgBouncer: pool_mode = session). Until then workers notice new work up to 15 s late, and "
        "live pages lag.",
    )


def _unread(url: DatabaseUrl, error: StoreError) -> Finding:
    said = str(error)
    return failed("database", f"{url}: {said}.", _advice(url, error.__cause__))


def _advice(url: DatabaseUrl, cause: BaseException | None) -> str:
    """What to do about what the driver raised."""
    state = str(getattr(cause, "sqlstate", None) or "")
    if url.dialect == "sqlite":
        return _sqlite_advice(str(cause), Path(url.path))
    if state.startswith("28"):
        return (
            "Mend the user or the password in TRACKER_DATABASE_URL (characters such as @ and / "
            "are written %40 and %2F there), or let the server take them (pg_hba.conf)."
        )
    if state == "3D000":
        return "Mend the database's name in TRACKER_DATABASE_URL, or make it with `createdb`."
    if state.startswith("53"):
        return (
            "Raise max_connections, or let others use fewer; each process of the tracker takes up "
            f"to {EACH_PROCESS}."
        )
    if state == "08P01":
        return (
            "That is what a pooler answers. Connect to PostgreSQL itself, or let the pooler pass "
            "these on (in PgBouncer: ignore_startup_parameters = statement_timeout, lock_timeout, "
            "idle_in_transaction_session_timeout, jit; pool_mode = session)."
        )
    if state == "42501":
        return (
            "Let the role in TRACKER_DATABASE_URL read and write the tracker's tables (GRANT), or "
            "own them by letting it run `tracker db upgrade`."
        )
    if state.startswith("57"):
        return "Wait until the server is up again; the tracker goes on by itself then."
    return (
        "See whether the server is up, whether host and port in TRACKER_DATABASE_URL are right, "
        "and whether a firewall lets this machine through: `pg_isready -d` with that URL tells."
    )
