"""Records with their outputs, by any statement that selects whole rows of `runs`."""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.record import Record
from tracker.store.rows import ids_with_outputs, outputs_by_run, with_outputs
from tracker.store.tables import run_outputs

_OUTPUTS: Final = (
    select(*(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url")))
    .where(run_outputs.c.run_id.in_(bindparam("run_ids", expanding=True)))
    .order_by(run_outputs.c.run_id, run_outputs.c.position)
)


def records(connection: Connection, rows: Sequence[Row[Any]]) -> list[Record]:
    """The records of these rows, in order; one more query where any of them has outputs."""
    made = ids_with_outputs(rows)
    found = connection.execute(_OUTPUTS, {"run_ids": made}) if made else ()
    return with_outputs(rows, outputs_by_run(found))


async def read_records(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Record]:
    """As `records`, over an asynchronous connection."""
    return await connection.run_sync(records, rows)
