"""The database itself refuses rows that cannot be true, whoever writes them."""

from typing import Any

from sqlalchemy import insert

from tests.store.making import NOW, TestWriter, callback, seen
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.run import RunStatus
from tracker.store.engine import Database
from tracker.store.schema import (
    deliveries,
    endpoints,
    message_attempts,
    messages,
    outbox,
    run_events,
    run_outputs,
    runs,
    starts,
)

RUN = {
    "run_id": "run_1",
    "status": "completed",
    "progress": 100,
    "created_at": NOW,
    "created_at_known": True,
    "output_count": 0,
    "precedence": 5,
    "details": 2,
    "precedences": 0,
    "conflict": False,
    "source": "start",
    "first_seen_at": NOW,
    "callback_expected": False,
    "ended_via": "poll",
    "tracking": "settled",
    "settled_at": NOW,
    "polls": 0,
    "checks": 1,
    "missing": 0,
}
DELIVERY = {
    "delivery_id": "whd_1",
    "received_at": NOW,
    "last_received_at": NOW,
    "receipts": 1,
    "outcome": "applied",
    "body": b"",
}
START = {
    "workspace_slot": "default",
    "idempotency_key": "key",
    "technique_id": "tech_1",
    "fingerprint": "",
    "inputs": [],
    "state": "stored",
    "created_at": NOW,
}
OUTBOX = {"event_id": "evt_1", "event": "run.settled", "run_id": "run_1", "at": NOW}
ENDPOINT = {
    "endpoint_id": "shop",
    "url": "https://shop.example",
    "events": [],
    "filters": {},
    "since": NOW,
    "configured_at": NOW,
    "state": "enabled",
}
MESSAGE = {
    "message_id": "msg_1",
    "endpoint_id": "shop",
    "event_id": "evt_1",
    "event": "run.settled",
    "run_id": "run_1",
    "body": "{}",
    "event_at": NOW,
    "created_at": NOW,
    "state": "pending",
    "attempts": 0,
    "next_attempt_at": NOW,
}
NEW_MESSAGE = MESSAGE | {"message_id": "msg_2", "event_id": "evt_2"}
ATTEMPT = {"message_id": "msg_1", "number": 1, "at": NOW, "seconds": 0.1}
EVENT = {"run_id": "run_1", "at": NOW, "source": "poll", "status": "running", "detail": {}}
OUTPUT = {"run_id": "run_1", "position": 0, "output_id": "o", "type": "text", "url": "x"}


async def add(db: Database, table: Any, row: dict[str, Any]) -> None:
    """Insert a row past the writer."""
    await db.write(lambda connection: connection.execute(insert(table).values(**row)).rowcount)


async def test_true_rows_are_taken(db: Database) -> None:
    """The rows that the other tests spoil are good as they stand; a status that FLORA does not
    document is taken where it stands as running or as an end, and a lost run may be due."""
    true = {"tracking": "active", "settled_at": None, "next_check_at": NOW}
    new = {"run_id": "run_2", "status": "cancelled", "precedence": 4}
    queued = {"run_id": "run_3", "status": "queued", "precedence": 1}
    lost = {"run_id": "run_4", "tracking": "lost"}
    for more in (
        new,
        true | queued,
        true | lost,
        true | lost | {"run_id": "run_5", "next_check_at": None},
    ):
        await add(db, runs, RUN | more)
    rows = [(runs, RUN), (deliveries, DELIVERY), (starts, START), (run_events, EVENT)]
    rows += [(outbox, OUTBOX), (endpoints, ENDPOINT), (messages, MESSAGE)]
    rows += [(message_attempts, ATTEMPT)]
    for table, row in (*rows, (run_outputs, OUTPUT)):
        await add(db, table, row)


LIES: list[dict[str, Any]] = [
    {"status": "cancelled", "precedence": 5},
    {"status": "cancelled", "precedence": 3},
    {"status": "queued", "precedence": 1},
    {"status": "", "precedence": 4},
    {"tracking": "forgotten"},
    {"source": "rumour"},
    {"ended_via": "rumour"},
    {"progress": 101},
    {"progress": -0.1},
    {"precedence": 6},
    {"details": 3},
    {"settled_at": None},
    {"status": "running", "precedence": 1},
    {"status": "running"},
    {"precedence": 0},
    {"tracking": "active", "settled_at": None},
    {"tracking": "active", "next_check_at": NOW},
    {"next_check_at": NOW},
    {"lease_holder": "someone"},
    {"lease_until": NOW},
    {"created_at": None},
]
OTHER_LIES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (deliveries, DELIVERY, {"receipts": 0}),
    (deliveries, DELIVERY, {"outcome": "ignored"}),
    (deliveries, DELIVERY, {"body": None}),
    (starts, START, {"state": "gone"}),
    (starts, START, {"state": "started"}),
    (starts, START, {"run_id": "run_1"}),
    (starts, START, {"lease_holder": "someone"}),
    (run_events, EVENT, {"source": "rumour"}),
    (run_events, EVENT, {"run_id": "run_2"}),
    (run_outputs, OUTPUT, {"run_id": "run_2"}),
    (outbox, OUTBOX, {"event": "run.ended"}),
    (endpoints, ENDPOINT, {"state": "off"}),
    (endpoints, ENDPOINT, {"state": "disabled"}),
    (endpoints, ENDPOINT, {"disabled_at": NOW}),
    (endpoints, ENDPOINT, {"catch_up_from": NOW}),
    (messages, NEW_MESSAGE, {"event": "run.ended"}),
    (messages, NEW_MESSAGE, {"state": "sent"}),
    (messages, NEW_MESSAGE, {"state": "delivered", "next_attempt_at": None}),
    (messages, NEW_MESSAGE, {"state": "failed"}),
    (messages, NEW_MESSAGE, {"next_attempt_at": None}),
    (messages, NEW_MESSAGE, {"delivered_at": NOW}),
    (messages, NEW_MESSAGE, {"attempts": -1}),
    (messages, NEW_MESSAGE, {"lease_holder": "someone"}),
    (messages, MESSAGE, {"message_id": "msg_3"}),
    (message_attempts, ATTEMPT, {"number": 0}),
    (message_attempts, ATTEMPT, {"message_id": "msg_0"}),
]


async def is_refused(db: Database, table: Any, row: dict[str, Any]) -> bool:
    """Whether the database itself, being there, takes no such row."""
    try:
        await add(db, table, row)
    except StoreError as error:
        return not isinstance(error, StoreUnavailable)
    return False


async def test_runs_that_cannot_be_are_refused(db: Database) -> None:
    """A run's row keeps to FLORA's states, and settled, active and leased mean what they say."""
    taken = [lie for lie in LIES if not await is_refused(db, runs, RUN | lie)]
    assert taken == []


async def test_other_rows_that_cannot_be_are_refused(db: Database) -> None:
    """So do callbacks, starts, events, outputs and messages; an event has one message for each
    endpoint."""
    await add(db, runs, RUN)
    await add(db, messages, MESSAGE)
    taken = [lie for table, row, lie in OTHER_LIES if not await is_refused(db, table, row | lie)]
    assert taken == []


async def test_what_belongs_to_a_run_goes_with_it(writer: TestWriter, db: Database) -> None:
    """Deleting a run deletes its outputs and its timeline; its callbacks stay."""
    await writer.submit(callback("run_1"))
    await writer.submit(seen("run_1", RunStatus.COMPLETED))
    await add(db, run_outputs, OUTPUT)
    await db.write(lambda connection: connection.execute(runs.delete()).rowcount)
    async with db.read() as connection:
        left = [
            len((await connection.execute(each.select())).all())
            for each in (run_events, run_outputs, deliveries)
        ]
    assert left == [0, 0, 1]
