"""A record as a row of `runs`, and back.

What `merge` decides can be read back from the row alone: a test compares each row with the merge of
its events.
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from operator import attrgetter
from typing import Any, Final

from sqlalchemy import Connection, Row, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import (
    Details,
    Output,
    Precedence,
    Precedences,
    Run,
    RunError,
    RunStatus,
    known,
)
from tracker.core.schedule import NextPoll, PollReason
from tracker.store.engine import Database
from tracker.store.schema import is_any_of, run_outputs, runs

_DERIVED: Final = (
    *("retry_advice", "output_count", "status", "created_at_known", "precedence", "details"),
    *("precedences", "source", "ended_via", "tracking", "next_check_at", "next_check_reason"),
    *("created_at", "error_code", "error_message", "tags"),
)
"""The columns whose value is not simply the attribute of that name; the first two are not read."""
_PLAIN: Final = {*runs.c.keys()} - {*_DERIVED}
_RUN: Final = [each.name for each in fields(Run) if each.name in _PLAIN]
_RECORD: Final = [each.name for each in fields(Record) if each.name in _PLAIN]
RUN_COLUMNS: Final = tuple(runs.c[name] for name in (*_RUN, *_RECORD, *_DERIVED))
"""The columns of `runs`, in the order of `run_row`."""
_of_run: Final = attrgetter(*_RUN)
_of_record: Final = attrgetter(*_RECORD)
_END: Final = len(_RUN) + len(_RECORD) + 2
_precedence: Final = lru_cache(64)(Precedence)  # a third of the time of a call
_details: Final = lru_cache(64)(Details)
_STATUSES: Final = frozenset(map(str, RunStatus))
_REASONS: Final = {str(reason): reason for reason in PollReason}


# Of all runs together there are few different values.
@lru_cache(1024)
def _packed(precedences: Precedences) -> int:
    """The precedences in one number for one column: three bits for each field, in order."""
    return sum(each << 3 * position for position, each in enumerate(precedences))


@lru_cache(1024)
def _unpacked(packed: int) -> Precedences:
    return Precedences(
        *(packed >> 3 * position & 7 for position in range(len(Precedences._fields)))
    )


def run_row(record: Record) -> tuple[Any, ...]:
    """The record's row, without its outputs, in the order of `RUN_COLUMNS`."""
    run, error = record.run, record.run.error
    ended_via = record.ended_via
    return (
        *_of_run(run),
        *_of_record(record),
        run.retry_advice,
        0 if run.outputs is None else len(run.outputs),
        str(run.status),
        run.created_at is not None,
        int(run.precedence),
        int(run.details),
        _packed(run.precedences),
        str(record.source),
        None if ended_via is None else str(ended_via),
        record.tracking.value,
        *(record.next_poll or (None, None)),
        record.created_at,
        (error.code if error else "") or None,
        (error.message if error else "") or None,
        record.tags or None,
    )


def record_of(row: tuple[Any, ...], outputs: tuple[Output, ...] | None) -> Record:
    """The record of a row with all of `RUN_COLUMNS`, and its outputs (`None` for none)."""
    run: dict[str, Any] = dict(zip(_RUN, row, strict=False))
    record: dict[str, Any] = dict(zip(_RECORD, row[len(_RUN) :], strict=False))
    status, is_dated, precedence, details, packed, source, via = row[_END : _END + 7]
    tracking, due, why, created_at, code, message, tags = row[_END + 7 :]
    run["precedence"], run["details"] = _precedence(precedence), _details(details)
    run["unknown_status"] = None if status in _STATUSES else status
    run["created_at"] = created_at if is_dated else None
    run["error"] = RunError(code or "", message or "") if code or message else None
    run["outputs"], run["precedences"] = outputs, _unpacked(packed)
    if run["charged_cost"] is not None and run["precedences"].charged_cost < Precedence.FAILED:
        # A version before 0010 wrote it: what was shown before the end is a quote.
        run["quoted_cost"], run["charged_cost"] = run["charged_cost"], None
    record["run"], record["source"], record["tags"] = Run(**run), known(Source, source), tags
    record["ended_via"] = None if via is None else known(Source, via)
    record["next_poll"] = None if due is None else NextPoll(due, _REASONS.get(why))
    record["lost"] = tracking == "lost"
    return Record(**record)


_OUTPUTS: Final = (
    select(*(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url")))
    .where(is_any_of(run_outputs.c.run_id, "run_ids"))
    .order_by(run_outputs.c.run_id, run_outputs.c.position)
)


def records(connection: Connection, rows: Sequence[Row[Any]]) -> list[Record]:
    """The records of these rows, in order; one more query if any of them has outputs.

    In one with a lock of the runs, outputs would be those at the time when it began to wait.
    """
    outputs: dict[str, list[Output]] = {}
    if having := [row.run_id for row in rows if row.output_count]:
        for run_id, *output in connection.execute(_OUTPUTS, {"run_ids": having}):
            outputs.setdefault(run_id, []).append(Output(*output))
    return [
        record_of(tuple(row), tuple(outputs[row.run_id]) if row.run_id in outputs else None)
        for row in rows
    ]


async def read_records(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Record]:
    """As `records`, over an asynchronous connection."""
    return await connection.run_sync(records, rows)


async def fetch_records(db: Database, query: Select[Any]) -> list[Record]:
    """The records of a query of `RUN_COLUMNS`, with their outputs in the same snapshot."""
    async with db.read() as connection:
        return await read_records(connection, (await connection.execute(query)).all())
