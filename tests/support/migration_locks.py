"""What a migration would hold up: its statements as they were sent, judged before anybody waits.

squawk knows what PostgreSQL locks and rewrites, and what the running version would miss. A few
rules of our own say what it does not: commands that keep a whole table from everybody or go through
all of it, data changed by the table, work that goes on while a lock on a table in use is held, what
cannot be interrupted, and what does not say what it does. Tables that a revision makes itself are
nobody's yet.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, event
from sqlalchemy.engine import Engine

SQUAWK = Path(sys.executable).with_name("squawk")
OLDEST_POSTGRES = "14"
_ASKS = re.compile(
    r"\s*SELECT (?:set_config|current_setting|pg_(?:try_)?advisory_\w+|pg_catalog\."
    r"|alembic_version\.version_num\b)",
    re.I,
)
# Taste, the time-outs, which migrations/env.py sets for all, and what a rule of ours says better.
OF_NO_CONCERN = (
    "prefer-bigint-over-int",
    "prefer-bigint-over-smallint",
    "prefer-identity",
    "prefer-robust-stmts",
    "prefer-text-field",
    "require-lock-timeout",
    "require-statement-timeout",
)


class Fault(NamedTuple):
    """A rule, and the statement that breaks it."""

    rule: str
    statement: str


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What is sent to any PostgreSQL within the block, with the transactions' beginnings and ends.

    What only asks the catalogue, or how far the database is, is left out.
    """
    sent: list[str] = []

    def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not _ASKS.match(statement):
            sent.append(statement.strip())

    def marks(word: str) -> Any:
        def mark(connection: Connection) -> None:
            if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
                sent.append(word)

        return mark

    listeners = {"begin": marks("BEGIN"), "commit": marks("COMMIT"), "rollback": marks("ROLLBACK")}
    listeners["before_cursor_execute"] = executed
    for name, listener in listeners.items():
        event.listen(Engine, name, listener)
    try:
        yield sent
    finally:
        for name, listener in listeners.items():
            event.remove(Engine, name, listener)


def faults(statements: Iterable[str]) -> list[Fault]:
    """What is wrong with a revision that sends these statements."""
    given = list(statements)
    return [*_by_squawk(given), *_by_us(given)]


def _by_squawk(statements: list[str]) -> list[Fault]:
    script = ";\n".join([*statements, ""])
    told = subprocess.run(
        [
            *(SQUAWK, "--reporter", "json", "--pg-version", OLDEST_POSTGRES),
            *(f"--exclude={rule}" for rule in OF_NO_CONCERN),
        ],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode not in (0, 1):
        raise RuntimeError(f"squawk failed: {told.stderr}")
    lines = script.splitlines()
    return [Fault(one["rule_name"], lines[one["line"]].strip()) for one in json.loads(told.stdout)]


_TABLE = r'(?:IF (?:NOT )?EXISTS )?(?:ONLY )?(?:public\.)?"?(\w+)'
_MAKES = re.compile(rf"CREATE (?:UNLOGGED )?TABLE {_TABLE}", re.I)
_LOCKS = re.compile(
    rf"ALTER TABLE {_TABLE}\b(?! VALIDATE| SET \()|CREATE (?:UNIQUE )?INDEX \S+ ON {_TABLE}"
    rf"|(?:CREATE|DROP) (?:\w+ )*?TRIGGER .*? ON {_TABLE}",
    re.I,
)
# Anyone who refers to a table keeps out all who write to that one too, until the transaction ends.
_REFERS = re.compile(r'\bREFERENCES (?:public\.)?"?(\w+)', re.I)
_CHANGES = re.compile(rf"(?:WITH .*?\b)?(?:UPDATE|DELETE FROM|MERGE INTO) {_TABLE}", re.I)
_WORKS = re.compile(
    r"(?:UPDATE|DELETE|MERGE|COPY|SELECT|WITH|ANALYZE)\b|INSERT .*\bSELECT\b|CREATE .*TABLE .* AS\b"
    r"|CREATE MATERIALIZED VIEW|ALTER TABLE .*\bVALIDATE\b",
    re.I,
)
_GOES_THROUGH = re.compile(
    rf"ALTER TABLE {_TABLE}.*? ADD COLUMN (?:(?!, ADD ).)*\b(?:CHECK|(?:small|big)?serial)\b", re.I
)
_HIDES = re.compile(r"(?:DO|CALL|EXECUTE)\b", re.I)
# One that was interrupted leaves an index that is not valid, and IF NOT EXISTS is content with it.
_DROPS_BESIDE = re.compile(r'DROP INDEX CONCURRENTLY IF EXISTS "?(\w+)', re.I)
_MAKES_BESIDE = re.compile(
    r'CREATE (?:UNIQUE )?INDEX CONCURRENTLY (?:IF NOT EXISTS )?"?(\w+)', re.I
)
_KEEPS_ALL_OUT = re.compile(
    rf"(?:VACUUM|CLUSTER|TRUNCATE|LOCK)(?: FULL| \(.*?\b[Ff][Uu][Ll][Ll]\b.*?\)| TABLE)* {_TABLE}"
    r"|REFRESH MATERIALIZED VIEW (?!CONCURRENTLY)(\w+)"
    rf"|ALTER TABLE {_TABLE}.* SET (?:LOGGED|UNLOGGED|TABLESPACE)\b",
    re.I | re.S,
)


def _by_us(statements: list[str]) -> Iterator[Fault]:
    ours = {"alembic_version"}
    held = False
    dropped: set[str] = set()
    for statement in (" ".join(each.split()) for each in statements):
        if statement in ("COMMIT", "ROLLBACK"):
            held = False
        ours |= _tables(_MAKES, statement)
        if _tables(_KEEPS_ALL_OUT, statement) - ours:
            yield Fault("keeps-all-out", statement)
        if _tables(_CHANGES, statement) - ours:
            yield Fault("changes-a-table-at-once", statement)
        if held and _WORKS.match(statement) and not _tables(_CHANGES, statement) & ours:
            yield Fault("works-while-it-locks", statement)
        if _tables(_GOES_THROUGH, statement) - ours:
            yield Fault("goes-through-the-table", statement)
        if _HIDES.match(statement):
            yield Fault("hides-what-it-does", statement)
        dropped |= _tables(_DROPS_BESIDE, statement)
        if _tables(_MAKES_BESIDE, statement) - dropped:
            yield Fault("stays-invalid-if-interrupted", statement)
        locked = _tables(_LOCKS, statement) | set(_REFERS.findall(statement))
        held = held or bool(locked - ours)


def _tables(pattern: re.Pattern[str], statement: str) -> set[str]:
    """The table (or index) that the statement is about, where it is one of the pattern's."""
    found = pattern.match(statement)
    return set() if found is None else {name for name in found.groups() if name}
