"""Endpoints and messages as the database holds them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert

from tracker.store.engine import Database
from tracker.store.schema import endpoints, message_attempts, messages

NOW = datetime(2026, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)


async def add_endpoint(db: Database, endpoint_id: str, **columns: Any) -> None:
    """An enabled endpoint."""
    row = {
        "endpoint_id": endpoint_id,
        "url": f"https://{endpoint_id}.example.com/hook",
        "events": ["run.settled"],
        "filters": {},
        "since": NOW - timedelta(days=30),
        "configured_at": datetime.now(UTC),
        "state": "enabled",
    }
    await db.write(lambda connection: connection.execute(insert(endpoints), [row | columns]))


async def add_message(
    db: Database,
    message_id: str,
    endpoint_id: str,
    *statuses: int | None,
    answer: str = "<b>an answer</b>",
    **columns: Any,
) -> None:
    """A message, after attempts that had these answers (`None`: none at all). The last one decides
    whether it is delivered; else it is pending."""
    last = statuses[-1] if statuses else None
    delivered = last is not None and last < 300
    row = {
        "message_id": message_id,
        "endpoint_id": endpoint_id,
        "event_id": f"event of {message_id}",
        "event": "run.settled",
        "run_id": "run_1",
        "body": '{"type":"run.settled","data":{"run_id":"run_1"}}',
        "event_at": NOW,
        "created_at": NOW,
        "state": "delivered" if delivered else "pending",
        "attempts": len(statuses),
        "last_attempt_at": NOW if statuses else None,
        "next_attempt_at": None if delivered else NOW + timedelta(minutes=5),
        "delivered_at": NOW + timedelta(seconds=2) if delivered else None,
        "last_status": last,
        "last_error": _error(last) if statuses else None,
    } | columns
    if row["state"] == "failed":
        row["next_attempt_at"] = None
    attempts = [
        {
            "message_id": message_id,
            "number": number,
            "at": NOW + timedelta(seconds=number),
            "seconds": 0.25,
            "status": status,
            "answer": None if status is None else answer,
            "error": _error(status),
        }
        for number, status in enumerate(statuses, start=1)
    ]

    def write(connection: Any) -> None:
        connection.execute(insert(messages), [row])
        if attempts:
            connection.execute(insert(message_attempts), attempts)

    await db.write(write)


def _error(status: int | None) -> str | None:
    if status is None:
        return "no answer: the connection was refused"
    return None if status < 300 else f"status {status}"
