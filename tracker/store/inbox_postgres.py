"""Storing a group of deliveries on PostgreSQL: one statement, which is a transaction by itself.

Rows travel as one array for each column, so that the statement's text does not depend on how many
there are. It goes to the driver directly: see `Database.send`.
"""

from collections.abc import Sequence
from typing import Final

from tracker.store.engine import Database
from tracker.store.inbox import Known, Receipt

# Rows come sorted by id, so that no two processes wait for each other in a circle. A body that
# retention has removed cannot be compared: what comes under its id is taken for a repetition.
STORE: Final = """
INSERT INTO deliveries (
    delivery_id, run_id, event_type, api_version, workspace_id, created_at, received_at,
    last_received_at, receipts, outcome, body, callback_token
)
SELECT *
FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
    $7::timestamptz[], $8::timestamptz[], $9::integer[], $10::text[], $11::bytea[],
    $12::text[]
)
ON CONFLICT (delivery_id) DO UPDATE SET
    receipts = deliveries.receipts + excluded.receipts,
    last_received_at = greatest(deliveries.last_received_at, excluded.last_received_at)
WHERE deliveries.body = excluded.body OR deliveries.body_removed_at IS NOT NULL
RETURNING delivery_id, receipts, outcome
"""


async def store(db: Database, receipts: Sequence[Receipt]) -> dict[str, Known]:
    """See `tracker.store.inbox.Stores`."""
    came = [receipt.delivery for receipt in receipts]
    rows = await db.send(
        STORE,
        (
            [one.delivery_id for one in came],
            [one.run_id for one in came],
            [one.event_type for one in came],
            [one.api_version for one in came],
            [one.workspace_id for one in came],
            [one.created_at for one in came],
            [one.received_at for one in came],
            [receipt.last_received_at for receipt in receipts],
            [receipt.count for receipt in receipts],
            ["waiting"] * len(came),
            [one.body for one in came],
            [one.callback_token for one in came],
        ),
    )
    return {delivery_id: Known(count, outcome) for delivery_id, count, outcome in rows}
