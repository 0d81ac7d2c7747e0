"""Storing a group of deliveries on PostgreSQL: one statement, which is a transaction by itself.

Rows travel as one array for each column, so that the statement's text does not depend on how many
there are. It goes to the driver directly: see `Database.send`.
"""

from collections.abc import Sequence
from typing import Final

from tracker.store.engine import Database
from tracker.store.inbox import Receipt

# Rows come sorted by id, so that no two processes wait for each other in a circle. A body that
# retention has removed cannot be compared: what comes under its id is taken for a repetition. Of
# what is new, which is nearly all, nothing is sent back, so that nothing has to be read.
STORE: Final = """
WITH came AS (
    SELECT *
    FROM unnest(
        $1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
        $7::timestamptz[], $8::timestamptz[], $9::integer[], $10::bytea[], $11::text[]
    ) AS came (
        delivery_id, run_id, event_type, api_version, workspace_id, created_at,
        received_at, last_received_at, receipts, body, callback_token
    )
), stored AS (
    INSERT INTO deliveries (
        delivery_id, run_id, event_type, api_version, workspace_id, created_at,
        received_at, last_received_at, receipts, body, callback_token, outcome
    )
    SELECT
        delivery_id, run_id, event_type, api_version, workspace_id, created_at,
        received_at, coalesce(last_received_at, received_at), receipts, body, callback_token,
        'waiting'
    FROM came
    ON CONFLICT (delivery_id) DO UPDATE SET
        receipts = deliveries.receipts + excluded.receipts,
        last_received_at = greatest(deliveries.last_received_at, excluded.last_received_at)
    WHERE deliveries.body = excluded.body OR deliveries.body_removed_at IS NOT NULL
    RETURNING delivery_id, receipts, outcome
)
SELECT delivery_id, stored.outcome
FROM came LEFT JOIN stored USING (delivery_id)
WHERE stored.receipts IS DISTINCT FROM came.receipts
"""


async def store(db: Database, receipts: Sequence[Receipt]) -> dict[str, str | None]:
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
            [receipt.last_received_at if receipt.count > 1 else None for receipt in receipts],
            [receipt.count for receipt in receipts],
            [one.body for one in came],
            [one.callback_token for one in came],
        ),
    )
    return {row[0]: row[1] for row in rows}
