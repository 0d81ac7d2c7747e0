"""A database into which a newer version of the tracker has written words that this one does not
know, in every table: as while a new version is rolled out, or after it was taken back."""

import json
import re
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import insert, text, update

from tests.web.callbacks import event
from tracker.store.engine import migration_engine
from tracker.store.schema import (
    audit,
    batch_rows,
    batches,
    deliveries,
    endpoints,
    history_coverage,
    leases,
    message_attempts,
    messages,
    outbox,
    retention,
    run_events,
    run_outputs,
    run_tallies,
    run_tally_changes,
    runs,
    starts,
    sweeps,
    techniques,
)
from tracker.store.url import DatabaseUrl

NEW: Final = "nextyear"
"""What stands wherever a word is expected."""
RUNS: Final = ("run_ended", "run_open", "run_failed")
NOW: Final = datetime.now(UTC).replace(microsecond=0)
_LONG_AGO: Final = NOW - timedelta(days=8)
_OUTPUT: Final = ["out_1", NEW, "https://cdn.example/1", "a fourth value"]


def _run(run_id: str, **more: Any) -> dict[str, Any]:
    ended = run_id != "run_open"
    return {
        "run_id": run_id,
        "run_type": NEW,
        "workspace_id": "ws_1",
        "technique_id": "tech_1",
        "status": NEW,
        "progress": 100,
        "created_at": _LONG_AGO,
        "created_at_known": True,
        "completed_at": NOW if ended else None,
        "cost_final": False,
        "retry_advice": NEW,
        "output_count": 1,
        "precedence": 7 if ended else 1,
        "details": 3 if ended else 0,
        "precedences": 0,
        "conflict": True,
        "source": NEW,
        "first_seen_at": _LONG_AGO,
        "callback_expected": True,
        "ended_via": NEW if ended else None,
        "end_seen_at": NOW if ended else None,
        "tracking": NEW,
        "settled_at": NOW if ended else None,
        "next_check_at": None if ended else _LONG_AGO,
        "next_check_reason": None if ended else NEW,
        "polls": 1,
        "checks": 1,
        "missing": 0,
        **more,
    }


def _event(run_id: str, status: str, **shown: Any) -> dict[str, Any]:
    detail = {"run_id": run_id, "source": NEW, "at": NOW.isoformat(), "status": status, NEW: 1}
    return {
        "run_id": run_id,
        "at": NOW,
        "source": NEW,
        "status": status,
        "detail": detail | {"sent_at": NOW.isoformat()} | shown,
    }


def _start(key: str, **more: Any) -> dict[str, Any]:
    return {
        "workspace_slot": "ws_1",
        "idempotency_key": key,
        "technique_id": "tech_1",
        "fingerprint": "",
        "inputs": [{"id": "prompt", "type": NEW, "value": "x"}],
        "state": NEW,
        "created_at": _LONG_AGO,
        "error": {"code": NEW, NEW: {}},
        **more,
    }


def _endpoint(endpoint_id: str, **more: Any) -> dict[str, Any]:
    return {
        "endpoint_id": endpoint_id,
        "url": "https://hooks.example/",
        "events": [NEW, "run.settled"],
        "filters": {},
        "since": _LONG_AGO,
        "configured_at": NOW,
        "state": "enabled",
        **more,
    }


def _counted(**key: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("workspace_id", "technique_id", "status"), "")
    return empty | {"since": _LONG_AGO, "word": NEW, "bucket": 10_000, "runs": 1, "amount": 1} | key


_MEASURES: Final = (NEW, "state", "end", "callback", "seen", "settled", "cost", "spent")
_ENDED: Final = {"error": {"code": "x", "message": "y", NEW: "z"}, "outputs": [_OUTPUT]}
_CONTACT: Final = {"trouble": NEW, "since": _LONG_AGO.isoformat(), "reason": "a reason", NEW: 1}
ROWS: Final[dict[Any, list[dict[str, Any]]]] = {
    runs: [
        _run("run_ended"),
        _run("run_open"),
        _run("run_failed", status="failed", error_code=NEW, error_message="m"),
    ],
    run_outputs: [
        {
            "run_id": run_id,
            "position": 0,
            "output_id": "out_1",
            "type": NEW,
            "url": "http://127.0.0.1:9/1",
        }
        for run_id in RUNS
    ],
    run_events: [
        _event("run_ended", "failed", completed_at=NOW.isoformat(), **_ENDED),
        _event("run_ended", "completed", completed_at=NOW.isoformat(), **_ENDED),
        _event("run_open", NEW),
        _event("run_failed", "failed", completed_at=NOW.isoformat(), **_ENDED),
    ],
    deliveries: [
        {
            "delivery_id": "whd_1",
            "run_id": "run_ended",
            "event_type": NEW,
            "received_at": _LONG_AGO,
            "last_received_at": NOW,
            "receipts": 1,
            "outcome": NEW,
            "reason": NEW,
            "body": event("run_ended", id="whd_1"),
        }
    ],
    starts: [
        _start("row-new"),
        _start("row-ended", run_id="run_ended"),
        _start("row-failed", state="started", run_id="run_failed"),
    ],
    sweeps: [
        {
            "workspace_id": "ws_1",
            "started_at": _LONG_AGO,
            "finished_at": NOW,
            **dict.fromkeys(("pages", "items", "discovered", "repaired", "unreadable"), 1),
        }
    ],
    history_coverage: [
        {
            "workspace_id": "ws_1",
            "run_type": NEW,
            "from_at": _LONG_AGO,
            "to_at": NOW,
            "read_at": NOW,
            "failures": 0,
        }
    ],
    techniques: [
        {
            "technique_id": "tech_1",
            "name": "A technique",
            "inputs": [{"id": "prompt", "name": "Prompt", "type": NEW, "required": True, NEW: 1}],
            "outputs": [{"id": "image", "name": "Image", "type": NEW}],
            "synced_at": NOW,
            "defined_at": NOW,
        }
    ],
    batches: [
        {
            "batch_id": "bat_1",
            "workspace_slot": "ws_1",
            "technique_id": "tech_1",
            "name": "sheet.csv",
            "created_at": _LONG_AGO,
            "mapping": [["prompt", "Prompt", NEW]],
            "source": NEW,
            "columns": ["Prompt"],
            "launch": {NEW: 1},
            "stopped": NEW,
        }
    ],
    batch_rows: [
        {
            "batch_id": "bat_1",
            "position": position,
            "line": position + 1,
            "row_digest": digest,
            "generation": 0,
            "attempt": 0,
            "idempotency_key": f"row-{digest}",
            "inputs": [{"id": "prompt", "type": NEW, "value": "x"}],
        }
        for position, digest in enumerate(("new", "ended", "failed", "none"), 1)
    ],
    audit: [{"at": NOW, "actor": "someone", "action": NEW, "detail": {NEW: [1]}, "count": 1}],
    leases: [
        {"name": "contact:default", "holder": json.dumps(_CONTACT), "until": NOW},
        {"name": "contact:other", "holder": "neither JSON nor a process", "until": NOW},
        {"name": "contact:third", "holder": "[1]", "until": NOW},
        {"name": "clock", "holder": NEW, "until": NOW},
        {"name": NEW, "holder": NEW, "until": NOW + timedelta(minutes=1)},
    ],
    retention: [{"what": NEW, "workspace_id": "ws_1", "through": _LONG_AGO}],
    outbox: [{"event_id": "evt_1", "event": NEW, "run_id": "run_ended", "at": NOW}],
    endpoints: [
        _endpoint("hook"),
        _endpoint("paused", state=NEW, filters={"tag": "a=b", "technique_id": "tech_1"}),
    ],
    messages: [
        {
            "message_id": "msg_1",
            "endpoint_id": "hook",
            "event_id": "evt_0",
            "event": NEW,
            "run_id": "run_ended",
            "body": json.dumps({"type": NEW, "timestamp": NOW.isoformat(), "data": {}}),
            "event_at": _LONG_AGO,
            "created_at": _LONG_AGO,
            "state": NEW,
            "attempts": 1,
        }
    ],
    message_attempts: [
        {"message_id": "msg_1", "number": 1, "at": NOW, "seconds": 0.1, "status": 999}
    ],
    run_tallies: [_counted(measure=measure) for measure in _MEASURES],
    run_tally_changes: [_counted(measure=measure) for measure in _MEASURES],
}


async def fill(url: str) -> None:
    """Put the rows into a database, without its checks, which the newer version has widened."""
    parsed = DatabaseUrl.parse(url)
    if parsed.dialect == "sqlite":
        _drop_checks(url.removeprefix("sqlite:///"))
    engine = migration_engine(parsed)
    async with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            found = await connection.execute(
                text(
                    "SELECT conrelid::regclass AS name, conname FROM pg_constraint"
                    " WHERE contype = 'c' AND connamespace = current_schema()::regnamespace"
                )
            )
            for name, check in found.all():
                await connection.execute(text(f'ALTER TABLE {name} DROP CONSTRAINT "{check}"'))
        for table, rows in ROWS.items():
            for row in rows:
                await connection.execute(insert(table), row)
        # FLORA was asked just now, however long ago this module was imported.
        contacts = update(leases).where(leases.c.name.startswith("contact:"))
        await connection.execute(contacts.values(until=datetime.now(UTC)))
    await engine.dispose()


def _drop_checks(path: str) -> None:
    """Let every CHECK of the tables hold."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA writable_schema = ON")
    tables = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'table'")
    for name, made in tables.fetchall():
        connection.execute(
            "UPDATE sqlite_schema SET sql = ? WHERE name = ? AND type = 'table'",
            (_without_checks(made), name),
        )
    connection.execute("PRAGMA writable_schema = RESET")
    connection.close()


def _without_checks(made: str) -> str:
    parts, position = [], 0
    for found in re.finditer(r"\bCHECK\s*\(", made):
        if found.start() < position:
            continue
        parts.append(made[position : found.end()] + "1)")
        position, depth = found.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(made[position], 0)
            position += 1
    return "".join([*parts, made[position:]])
