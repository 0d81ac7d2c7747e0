"""JSON views of rows, shared by the API and the command line.

Times are ISO 8601 in UTC with `Z`, to the microsecond, so that they sort as text. Costs are numbers
in USD.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from tracker.core.events import EventType
from tracker.core.inputs import obstacle
from tracker.core.record import Record
from tracker.core.run import Output
from tracker.flora.technique import ports
from tracker.store.text import dump_json

if TYPE_CHECKING:  # commands that show runs load nothing of the others
    from tracker.explaining.explainer import Explanation
    from tracker.starting.batch_rows import RowState
    from tracker.store.queries.audit import AuditRow
    from tracker.store.queries.batches import BatchCounts, BatchRow, ErrorGroup
    from tracker.store.queries.endpoints import Backlog, Delays, EndpointRow
    from tracker.store.queries.messages import AttemptRow, MessageRow
    from tracker.store.queries.runs import DeliveryRow, Event
    from tracker.store.queries.spending import Spending, Usage
    from tracker.store.queries.starts import StartRow
    from tracker.store.queries.techniques import TechniqueRow

_ENDPOINT_FILTERS: Final = ("workspace_id", "technique_id", "status", "tag")


def time_json(at: datetime) -> str:
    """A time as ISO 8601 in UTC."""
    return f"{at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def run_json(record: Record) -> dict[str, Any]:
    """A run: the columns of the table `runs`, and `outputs`."""
    run = record.run
    return {
        "run_id": run.run_id,
        "run_type": run.run_type,
        "workspace_id": run.workspace_id,
        "project_id": run.project_id,
        "technique_id": run.technique_id,
        "technique_name": run.technique_name,
        "status": str(run.status),
        "progress": number_json(run.progress),
        "created_at": time_json(record.created_at),
        "started_at": _time(run.started_at),
        "completed_at": _time(run.completed_at),
        "quoted_cost": number_json(run.quoted_cost),
        "charged_cost": number_json(run.charged_cost),
        "cost_read_at": _time(run.cost_read_at),
        "cost_final": record.cost_final,
        "error_code": (run.error.code if run.error else "") or None,
        "error_message": (run.error.message if run.error else "") or None,
        "retry_advice": run.retry_advice and run.retry_advice.value,
        "poll_url": run.poll_url,
        "source": record.source.value,
        "first_seen_at": time_json(record.first_seen_at),
        "callback_at": _time(record.callback_at),
        "ended_via": record.ended_via and record.ended_via.value,
        "tracking": record.tracking.value,
        "settled_at": _time(record.settled_at),
        "conflict": run.conflict,
        "inputs": record.inputs,
        "tags": record.tags or {},
        "reserved_at": _time(record.reserved_at),
        "reserved_cost": number_json(record.reserved_cost),
        "next_check_at": _time(record.next_check_at),
        "checks": record.checks,
        "last_error": record.last_error,
        "outputs": [_output(position, output) for position, output in enumerate(run.outputs or ())],
    }


def event_json(event: "Event") -> dict[str, Any]:
    """An event: the columns of the table `run_events`."""
    return {
        "id": event.id,
        "run_id": event.run_id,
        "at": time_json(event.at),
        "source": str(event.source),
        "status": str(event.status),
        "progress": number_json(event.progress),
        "detail": dict(event.detail),
    }


def delivery_json(row: "DeliveryRow") -> dict[str, Any]:
    """A delivery: the columns of the table `deliveries`.

    `body` is included if it was read, as text, or as `body_base64` if it is not UTF-8.
    """
    shown: dict[str, Any] = {
        "delivery_id": row.delivery_id,
        "run_id": row.run_id,
        "event_type": row.event_type,
        "api_version": row.api_version,
        "workspace_id": row.workspace_id,
        "created_at": _time(row.created_at),
        "received_at": time_json(row.received_at),
        "last_received_at": time_json(row.last_received_at),
        "receipts": row.receipts,
        "outcome": row.outcome.value,
        "reason": row.reason,
        "applied_at": _time(row.applied_at),
        "body_removed_at": _time(row.body_removed_at),
        "acknowledged_at": _time(row.acknowledged_at),
    }
    if row.body is not None:
        try:
            shown["body"] = row.body.decode()
        except UnicodeDecodeError:
            shown["body_base64"] = base64.b64encode(row.body).decode()
    return shown


def endpoint_json(row: "EndpointRow", backlog: "Backlog", delays: "Delays") -> dict[str, Any]:
    """An endpoint without its secrets, what waits for it, and its delays in seconds."""
    return {
        "endpoint_id": row.endpoint_id,
        "url": row.url,
        "state": row.state,
        "events": list(row.events),
        **{name: row.filters.get(name) for name in _ENDPOINT_FILTERS},
        "since": time_json(row.since),
        "configured_at": time_json(row.configured_at),
        "pending": backlog.pending,
        "oldest_pending_at": _time(backlog.oldest_at),
        "failed": backlog.failed,
        "delay_p50": delays.p50 if delays.count else None,
        "delay_p95": delays.p95 if delays.count else None,
        "failing_since": _time(row.failing_since),
        "last_success_at": _time(row.last_success_at),
        "last_error_at": _time(row.last_error_at),
        "last_error": row.last_error,
        "disabled_at": _time(row.disabled_at),
        "disabled_reason": row.disabled_reason,
    }


def message_body(event: EventType, at: datetime, run: Record) -> str:
    """What endpoints receive, as JSON: the run as the API shows it."""
    return dump_json({"type": event.value, "timestamp": time_json(at), "data": run_json(run)})


def message_json(
    row: "MessageRow", attempts: "Iterable[AttemptRow] | None" = None
) -> dict[str, Any]:
    """A message: the columns of the table `messages`; with `attempts` also its body, and each
    attempt."""
    shown: dict[str, Any] = {
        "message_id": row.message_id,
        "endpoint_id": row.endpoint_id,
        "event": row.event.value,
        "run_id": row.run_id,
        "event_at": time_json(row.event_at),
        "created_at": time_json(row.created_at),
        "state": row.state.value,
        "attempts": row.attempts,
        "last_attempt_at": _time(row.last_attempt_at),
        "next_attempt_at": _time(row.next_attempt_at),
        "delivered_at": _time(row.delivered_at),
        "last_status": row.last_status,
        "last_error": row.last_error,
    }
    if attempts is not None:
        shown["body"] = json.loads(row.body or "null")
        shown["attempt_log"] = [
            {
                "number": one.number,
                "at": time_json(one.at),
                "seconds": number_json(one.seconds),
                "status": one.status,
                "answer": one.answer,
                "error": one.error,
            }
            for one in attempts
        ]
    return shown


def usage_json(usage: "Usage") -> dict[str, Any]:
    """The use of a budget, in USD."""
    budget = usage.budget
    scope = {"workspace_id": None, "technique_id": None, "tag": None} | budget.scope
    parts = ("charged", "quoted", "reserved", "used", "left")
    return {
        "budget": budget.name,
        "usd": number_json(budget.usd),
        "period": budget.period.value,
        **scope,
        "since": _time(usage.since),
        "renews_at": _time(usage.renews_at),
        **{part: number_json(getattr(usage, part)) for part in parts},
        "used_share": usage.share,
    }


def spending_json(
    by: str,
    since: datetime,
    rows: "Iterable[Spending]",
    total: "Spending",
    usages: "Iterable[Usage]",
) -> dict[str, Any]:
    """Spending by day, technique or tag, and the budgets, in USD."""

    def sum_json(row: "Spending") -> dict[str, Any]:
        return {
            "of": f"{row.of:%Y-%m-%d}" if isinstance(row.of, datetime) else row.of,
            "name": row.name,
            "runs": row.runs,
            "charged": number_json(row.charged),
            "quoted": number_json(row.quoted),
            "unpriced": row.unpriced,
        }

    return {
        "by": by,
        "since": f"{since.astimezone(UTC):%Y-%m-%d}",
        "spending": [sum_json(row) for row in rows],
        "total": sum_json(total),
        "budgets": [usage_json(usage) for usage in usages],
    }


def start_json(row: "StartRow") -> dict[str, Any]:
    """A start, without its callback address, which is a secret."""
    return {
        "idempotency_key": row.idempotency_key,
        "workspace_id": row.workspace_slot,
        "technique_id": row.technique_id,
        "state": row.state.value,
        "run_id": row.run_id,
        "created_at": time_json(row.created_at),
        "first_sent_at": _time(row.in_use_since),
        "sent_at": _time(row.sent_at),
        "started_by": row.started_by,
        "tags": row.tags or {},
        "reserved_at": _time(row.reserved_at),
        "reserved_cost": number_json(row.reserved_cost),
        "inputs": row.inputs,
        "error": None if row.error is None else {**row.error},
    }


def batch_json(batch: "BatchRow", counts: "BatchCounts") -> dict[str, Any]:
    """A batch, with the number of its rows in each state; costs in USD."""
    return {
        "batch_id": batch.batch_id,
        "workspace_id": batch.workspace_slot,
        "technique_id": batch.technique_id,
        "name": batch.name,
        "source": batch.source,
        "created_at": time_json(batch.created_at),
        "finished_at": _time(counts.finished_at(batch)),
        "launching": batch.launch_at is not None,
        "stopped": batch.stopped,
        "columns": batch.columns or [],
        "rows": counts.rows,
        "started": counts.started,
        "completed": counts.completed,
        "failed": counts.failed,
        "active": counts.active,
        "lost": counts.lost,
        "refused": counts.refused,
        "unresolved": counts.unresolved,
        "in_doubt": counts.doubt,
        "cost": number_json(counts.cost),
        "cost_final": counts.cost_final,
        "quoted": number_json(counts.quoted),
    }


def error_group_json(group: "ErrorGroup") -> dict[str, Any]:
    """Rows of a batch that failed for the same reason."""
    return {
        "code": group.code,
        "message": group.message,
        "retry_advice": group.advice and group.advice.value,
        "count": group.count,
        "retryable": group.retryable,
    }


def row_json(row: "RowState") -> dict[str, Any]:
    """A row of a batch; costs in USD."""
    run = None if row.record is None else row.record.run
    return {
        "row": row.entry.position,
        "line": row.entry.line,
        "key": row.entry.key,
        "carried": row.entry.carried,
        "run_id": None if row.start is None else row.start.run_id,
        "status": row.status,
        "cost": None if run is None else number_json(run.charged_cost),
        "cost_final": row.record is not None and row.record.cost_final,
        "quoted_cost": None if run is None else number_json(run.quoted_cost),
        "retry_advice": row.advice and row.advice.value,
        "error": row.why,
        "inputs": row.inputs,
        "tags": row.entry.tags,
        "outputs": [
            {"output_id": one.output_id, "type": one.type, "url": one.url}
            for one in (run.outputs if run is not None else None) or ()
        ],
    }


def audit_json(row: "AuditRow") -> dict[str, Any]:
    """An entry of the audit log: the columns of the table `audit`."""
    return {
        "id": row.id,
        "at": time_json(row.at),
        "actor": row.actor,
        "action": row.action,
        "detail": row.detail,
        "count": row.count,
        "address": row.address,
        "request_id": row.request_id,
    }


def audit_facts(detail: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The detail of an entry as labels and values for people."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name.replace('_', ' ')} {one}" for name, one in value.items())
        return str(value)

    return [(name.replace("_", " "), text(value)) for name, value in detail.items() if value]


def explanation_json(explanation: "Explanation") -> dict[str, Any]:
    """An explained run: its sentences, and the next poll for a program. Waits are seconds."""
    poll = explanation.next
    known = poll.durations
    return {
        "run_id": explanation.run_id,
        "story": [
            {
                "at": _time(sentence.at),
                "kind": sentence.kind.value,
                "source": sentence.source and sentence.source.value,
                "text": sentence.text,
            }
            for sentence in explanation.sentences
        ],
        "next_poll": {
            "at": _time(poll.at),
            "why": poll.why.value,
            "since": _time(poll.since),
            "wait": None if poll.wait is None else poll.wait.total_seconds(),
            "polls": poll.number,
            "jitter": None if poll.jitter is None else poll.jitter.total_seconds(),
            "learned": None
            if known is None
            else {"runs": known.count, "p50": known.p50, "p95": known.p95},
        },
    }


def technique_json(row: "TechniqueRow") -> dict[str, Any]:
    """A technique: the columns of the table `techniques`, and why it cannot be started, if so."""
    return {
        "technique_id": row.technique_id,
        "slug": row.slug,
        "name": row.name,
        "description": row.description,
        "run_cost": number_json(row.run_cost),
        "inputs": list(row.inputs),
        "outputs": list(row.outputs),
        "obstacle": obstacle(ports(row.inputs)),
        "synced_at": _time(row.synced_at),
        "defined_at": _time(row.defined_at),
        "gone_at": _time(row.gone_at),
    }


def number_json(value: float | Decimal | None) -> float | int | None:
    """A JSON number; whole numbers without a fraction."""
    if value is None:
        return None
    number = float(value)
    # Beyond 2**53 a float has no fraction anyway, and an integer would feign digits.
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _output(position: int, output: Output) -> dict[str, Any]:
    return {
        "position": position,
        "output_id": output.output_id,
        "type": output.type,
        "url": output.url,
    }


def _time(at: datetime | None) -> str | None:
    return None if at is None else time_json(at)
