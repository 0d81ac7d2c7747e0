"""A record as a row of `runs`, and back.

What `merge` decides can be read back from the row alone: a test compares each row with the merge of
its events. Both functions name each column, because a call for each field would double their time.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Connection, Row, Select, bindparam, select
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
from tracker.store.schema import run_outputs, runs

RUN_COLUMNS: Final = tuple(runs.columns)
"""The columns of `runs`, in the order of `run_row`."""
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
    run = record.run
    error = run.error
    outputs = run.outputs
    ended_via = record.ended_via
    return (
        run.run_id,
        run.run_type,
        run.workspace_id,
        run.project_id,
        run.technique_id,
        run.technique_name,
        str(run.status),
        run.progress,
        record.created_at,
        run.created_at is not None,
        run.started_at,
        run.completed_at,
        run.quoted_cost,
        run.charged_cost,
        run.cost_read_at,
        record.cost_final,
        (error.code if error else "") or None,
        (error.message if error else "") or None,
        run.retry_advice,
        0 if outputs is None else len(outputs),
        run.outputs_read_at,
        run.poll_url,
        int(run.precedence),
        int(run.details),
        _packed(run.precedences),
        run.conflict,
        str(record.source),
        record.first_seen_at,
        record.callback_at,
        record.callback_expected,
        None if ended_via is None else str(ended_via),
        record.end_seen_at,
        record.tracking.value,
        record.settled_at,
        record.inputs,
        record.tags or None,
        record.reserved_at,
        record.reserved_cost,
        *(record.next_poll or (None, None)),
        record.recheck_at,
        record.polls,
        record.checks,
        record.missing,
        record.missing_since,
        record.last_error,
        record.lease_until,
        record.lease_holder,
    )


def record_of(row: Sequence[Any], outputs: tuple[Output, ...] | None) -> Record:
    """The record of a row with all of `RUN_COLUMNS`, and its outputs (`None` for none)."""
    (
        run_id,
        run_type,
        workspace_id,
        project_id,
        technique_id,
        technique_name,
        status,
        progress,
        created_at,
        created_at_known,
        started_at,
        completed_at,
        quoted_cost,
        charged_cost,
        cost_read_at,
        cost_final,
        error_code,
        error_message,
        _retry_advice,
        _output_count,
        outputs_read_at,
        poll_url,
        precedence,
        details,
        precedences,
        conflict,
        source,
        first_seen_at,
        callback_at,
        callback_expected,
        ended_via,
        end_seen_at,
        tracking,
        settled_at,
        inputs,
        tags,
        reserved_at,
        reserved_cost,
        next_check_at,
        next_check_reason,
        recheck_at,
        polls,
        checks,
        missing,
        missing_since,
        last_error,
        lease_until,
        lease_holder,
    ) = row
    precedences = _unpacked(precedences)
    if charged_cost is not None and precedences.charged_cost < Precedence.FAILED:
        # A version before 0010 wrote it: what was shown before the end is a quote.
        quoted_cost, charged_cost = charged_cost, None
    return Record(
        run=Run(
            run_id=run_id,
            precedence=Precedence(precedence),
            unknown_status=None if status in _STATUSES else status,
            details=Details(details),
            progress=progress,
            conflict=conflict,
            run_type=run_type,
            workspace_id=workspace_id,
            project_id=project_id,
            technique_id=technique_id,
            technique_name=technique_name,
            poll_url=poll_url,
            created_at=created_at if created_at_known else None,
            started_at=started_at,
            completed_at=completed_at,
            quoted_cost=quoted_cost,
            charged_cost=charged_cost,
            cost_read_at=cost_read_at,
            error=RunError(error_code or "", error_message or "")
            if error_code or error_message
            else None,
            outputs=outputs,
            outputs_read_at=outputs_read_at,
            precedences=precedences,
        ),
        source=known(Source, source),
        first_seen_at=first_seen_at,
        callback_at=callback_at,
        callback_expected=callback_expected,
        ended_via=None if ended_via is None else known(Source, ended_via),
        end_seen_at=end_seen_at,
        settled_at=settled_at,
        cost_final=cost_final,
        recheck_at=recheck_at,
        inputs=inputs,
        tags=tags,
        reserved_at=reserved_at,
        reserved_cost=reserved_cost,
        next_poll=None
        if next_check_at is None
        else NextPoll(next_check_at, _REASONS.get(next_check_reason)),
        polls=polls,
        checks=checks,
        missing=missing,
        missing_since=missing_since,
        lost=tracking == "lost",
        last_error=last_error,
        lease_until=lease_until,
        lease_holder=lease_holder,
    )


OUTPUTS: Final = select(
    *(run_outputs.c[name] for name in ("run_id", "output_id", "type", "url"))
).order_by(run_outputs.c.run_id, run_outputs.c.position)
_OF_RUNS: Final = OUTPUTS.where(run_outputs.c.run_id.in_(bindparam("run_ids", expanding=True)))


def records(
    connection: Connection,
    rows: Sequence[Row[Any]],
    outputs_of: Select[Any] = _OF_RUNS,
    as_list: Callable[[list[str]], Any] = list,
) -> list[Record]:
    """The records of these rows, in order; one more query if any of them has outputs.

    `outputs_of` is `OUTPUTS` of the runs in its parameter `run_ids`, which `as_list` makes.
    """
    outputs: dict[str, list[Output]] = {}
    if having := [row.run_id for row in rows if row.output_count]:
        for run_id, *output in connection.execute(outputs_of, {"run_ids": as_list(having)}):
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
