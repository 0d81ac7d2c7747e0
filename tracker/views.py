"""Views: rows as JSON, for the API and the command line, and outputs as pages and notebooks show
them.

In JSON, times are ISO 8601 in UTC with `Z`, to the microsecond, so that they sort as text. Costs
are numbers in USD.

Outputs are other people's text. Only `http` and `https` addresses become links, and only what the
content security policy allows is loaded into a page; everything else stays text.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from tracker.core.events import EventType
from tracker.core.formatting import iso_time, unturned
from tracker.core.record import Record
from tracker.core.run import OUTPUT_KINDS, Output, RunError
from tracker.core.starts import fits, obstacle
from tracker.flora.parse import ports

if TYPE_CHECKING:  # commands that show runs load nothing of the others
    from tracker.core.schedule import Durations
    from tracker.explainer import Explanation
    from tracker.starting.rows import BatchPlan, RowState
    from tracker.store.queries.audit import AuditRow
    from tracker.store.queries.batches import BatchCounts, BatchRow
    from tracker.store.queries.deliveries import DeliveryRow
    from tracker.store.queries.endpoints import AttemptRow, Backlog, EndpointRow, MessageRow
    from tracker.store.queries.runs import EventLine, TimelineEvent
    from tracker.store.queries.sheet_rows import ErrorGroup
    from tracker.store.queries.spending import Spending, Usage
    from tracker.store.queries.starts import StartRow
    from tracker.store.queries.techniques import TechniqueRow

MAX_LINK: Final = 8192
_ENDPOINT_FILTERS: Final = ("workspace_id", "technique_id", "status", "tag")
_BATCH: Final = ("batch_id", "workspace_id", "technique_id", "name", "source", "created_at")
_BATCH_COUNTS: Final = (
    *("rows", "started", "completed", "failed", "active", "lost", "refused", "unresolved"),
)


def values_of(row: object, *names: str) -> dict[str, Any]:
    """These attributes of a row as JSON values, by name."""
    return {name: _value(getattr(row, name)) for name in names}


def _value(value: Any) -> Any:
    convert = _CONVERT.get(type(value))
    if convert is not None:
        return convert(value)
    return value.value if isinstance(value, Enum) else value


RUN: Final = (
    *("run_id", "run_type", "workspace_id", "project_id", "technique_id", "technique_name"),
    *("status", "progress", "created_at", "started_at", "completed_at"),
    *("quoted_cost", "charged_cost", "cost_read_at", "cost_final"),
    *("error_code", "error_message", "retry_advice", "poll_url"),
    *("source", "first_seen_at", "callback_at", "ended_via", "tracking", "settled_at", "conflict"),
    *("inputs", "idempotency_key", "tags", "reserved_at", "reserved_cost"),
    *("next_check_at", "checks", "last_error", "outputs"),
)
"""The public columns of the table `runs`, and `outputs`, as JSON shows them."""
_SPECIAL: Final = {"error_code": "run.error", "error_message": "run.error"}
_read_columns: Final = attrgetter(
    *(_SPECIAL.get(name, name if hasattr(Record, name) else f"run.{name}") for name in RUN)
)


def run_columns(record: Record) -> dict[str, Any]:
    """The values of `RUN`, by name."""
    values = dict(zip(RUN, _read_columns(record), strict=True))
    error = record.run.error or RunError()
    values["error_code"], values["error_message"] = error.code or None, error.message or None
    values["tags"], values["outputs"] = record.tags or {}, record.run.outputs or ()
    return values


def run_json(record: Record) -> dict[str, Any]:
    """A run: the columns of the table `runs`, and `outputs`."""
    values = run_columns(record)
    outputs = values.pop("outputs")
    shown = {name: _value(value) for name, value in values.items()}
    shown["outputs"] = [
        {"position": position, **output_json(output)} for position, output in enumerate(outputs)
    ]
    return shown


def output_json(output: Output) -> dict[str, str]:
    """An output of a run."""
    return {"output_id": output.output_id, "type": output.type, "url": output.url}


def event_json(event: "TimelineEvent | EventLine") -> dict[str, Any]:
    """An event: the columns of the table `run_events`, as far as they were read."""
    return values_of(event, *event._fields)


def delivery_json(row: "DeliveryRow") -> dict[str, Any]:
    """A delivery: the columns of the table `deliveries`.

    `body` is included if it was read, as text, or as `body_base64` if it is not UTF-8.
    """
    shown = values_of(row, *(one.name for one in fields(row) if one.name != "body"))
    if row.body is not None:
        try:
            shown["body"] = row.body.decode()
        except UnicodeDecodeError:
            shown["body_base64"] = base64.b64encode(row.body).decode()
    return shown


def endpoint_json(row: "EndpointRow", backlog: "Backlog", delays: "Durations") -> dict[str, Any]:
    """An endpoint without its secrets, what waits for it, and its delays in seconds."""
    return {
        **values_of(row, "endpoint_id", "url", "state", "events"),
        **{name: row.filters.get(name) for name in _ENDPOINT_FILTERS},
        **values_of(row, "since", "configured_at"),
        "pending": backlog.pending,
        "oldest_pending_at": _value(backlog.oldest_at),
        "failed": backlog.failed,
        "delay_p50": delays.p50 if delays.count else None,
        "delay_p95": delays.p95 if delays.count else None,
        **values_of(row, "failing_since", "last_success_at", "last_error_at", "last_error"),
        **values_of(row, "disabled_at", "disabled_reason"),
    }


def message_body(event: EventType, at: datetime, run: Record) -> str:
    """What endpoints receive, as JSON: the run as the API shows it."""
    from tracker.store.engine import dump_json  # noqa: PLC0415 - a program may only read runs

    return dump_json({"type": event.value, "timestamp": iso_time(at), "data": run_json(run)})


def message_json(
    row: "MessageRow", attempts: "Iterable[AttemptRow] | None" = None
) -> dict[str, Any]:
    """A message: the columns of the table `messages`; with `attempts` also its body, and each
    attempt."""
    shown = values_of(row, *(one.name for one in fields(row) if one.name != "body"))
    if attempts is not None:
        shown["body"] = json.loads(row.body or "null")
        shown["attempt_log"] = [
            values_of(one, *(each.name for each in fields(one))) for one in attempts
        ]
    return shown


def usage_json(usage: "Usage") -> dict[str, Any]:
    """The use of a budget, in USD."""
    budget = usage.budget
    scope = {"workspace_id": None, "technique_id": None, "tag": None} | budget.scope
    return {
        "budget": budget.name,
        **values_of(budget, "usd", "period"),
        **scope,
        **values_of(usage, "since", "renews_at"),
        **values_of(usage, "charged", "quoted", "reserved", "used", "left"),
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
        shown = values_of(row, "of", "name", "runs", "charged", "quoted", "unpriced")
        return shown | ({"of": f"{row.of:%Y-%m-%d}"} if isinstance(row.of, datetime) else {})

    return {
        "by": by,
        "since": f"{since.astimezone(UTC):%Y-%m-%d}",
        "spending": [sum_json(row) for row in rows],
        "total": sum_json(total),
        "budgets": [usage_json(usage) for usage in usages],
    }


def start_json(row: "StartRow") -> dict[str, Any]:
    """A start, without its callback address, which is a secret."""
    hidden = ("possible", "excluded")  # what `possible_runs` is made of
    return {
        **values_of(row, "idempotency_key", "workspace_id", "technique_id"),
        **values_of(row, "state", "run_id", "created_at"),
        "first_sent_at": _value(row.in_use_since),
        **values_of(row, "sent_at", "started_by"),
        "tags": row.tags or {},
        **values_of(row, "reserved_at", "reserved_cost", "inputs"),
        "error": row.error
        and {name: value for name, value in row.error.items() if name not in hidden},
        "possible_runs": sorted(row.possible_runs or ()),
    }


def batch_columns(batch: "BatchRow", counts: "BatchCounts") -> dict[str, Any]:
    """The values of a batch, by their public names."""
    return {
        **{name: getattr(batch, name) for name in _BATCH},
        "finished_at": counts.finished_at(batch),
        "launching": batch.launch_at is not None,
        "stopped": batch.stopped,
        "columns": batch.columns or [],
        **{name: getattr(counts, name) for name in _BATCH_COUNTS},
        "in_doubt": counts.doubt,
        "cost": counts.cost,
        "cost_final": counts.cost_final,
        "quoted": counts.quoted,
    }


def batch_json(batch: "BatchRow", counts: "BatchCounts") -> dict[str, Any]:
    """A batch, with the number of its rows in each state; costs in USD."""
    return {name: _value(value) for name, value in batch_columns(batch, counts).items()}


def plan_json(plan: "BatchPlan") -> dict[str, Any]:
    """What launching a batch would start, and the most that it can cost, in USD."""
    return {
        "batch_id": plan.batch.batch_id,
        "rows": len(plan.rows),
        "to_start": len(plan.missing),
        "run_cost": number_json(plan.technique.run_cost),
        "cost": number_json(plan.cost),
    }


def error_group_json(group: "ErrorGroup") -> dict[str, Any]:
    """Rows of a batch that failed for the same reason."""
    shown = values_of(group, "code", "message", "count", "retryable")
    return shown | {"retry_advice": _value(group.advice)}


def row_json(row: "RowState") -> dict[str, Any]:
    """A row of a batch; costs in USD."""
    return {
        **{name: _value(value) for name, value in row.result.items()},
        "run_ids": row.run_ids,
        "carried": row.entry.carried,
        "inputs": row.inputs,
        "tags": row.tags,
        "outputs": [output_json(one) for one in row.outputs],
    }


def audit_json(row: "AuditRow") -> dict[str, Any]:
    """An entry of the audit log: the columns of the table `audit`."""
    return values_of(row, "id", "at", "actor", "action", "detail", "count", "address", "request_id")


def audit_facts(detail: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The detail of an entry as labels and values for people."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name.replace('_', ' ')} {one}" for name, one in value.items())
        return str(value)

    return [(name.replace("_", " "), text(value)) for name, value in detail.items() if value]


def explanation_json(explanation: "Explanation") -> dict[str, Any]:
    """An explained run: its sentences; when it is polled next and why then, and how many polls in a
    row have not found its end."""
    record = explanation.record
    at, why = record.next_poll or (None, record.tracking)
    return {
        "run_id": record.run.run_id,
        "story": [
            values_of(sentence, "at", "kind", "source", "text")
            for sentence in explanation.sentences
        ],
        "next_poll": {"at": _value(at), "why": _value(why), "polls": record.polls},
    }


def technique_json(row: "TechniqueRow") -> dict[str, Any]:
    """A technique: the columns of the table `techniques`, and why it cannot be started, if so."""
    return {
        **values_of(row, "technique_id", "slug", "name", "description", "run_cost"),
        **values_of(row, "inputs", "outputs"),
        "obstacle": obstacle(ports(row.inputs)),
        **values_of(row, "synced_at", "defined_at", "gone_at"),
    }


def number_json(value: float | Decimal | None) -> float | int | None:
    """A JSON number; whole numbers without a fraction."""
    if value is None:
        return None
    number = float(value)
    # Beyond 2**53 a float has no fraction anyway, and an integer would feign digits.
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


_CONVERT: Final[dict[type, Callable[[Any], Any]]] = {
    datetime: iso_time,
    Decimal: number_json,
    float: number_json,
    tuple: list,
}


# Outputs, for pages and notebooks


class OutputView(NamedTuple):
    """An output with its name, how to show it (see `presentation`), and the host of its link."""

    output: Output
    name: str
    kind: str
    host: str


def output_views(
    outputs: Sequence[Output] | None,
    definition: Sequence[dict[str, Any]] = (),
    *,
    media_origin: str | None,
) -> list[OutputView]:
    """Outputs in order; `definition` has the outputs of their technique."""
    outputs = outputs or ()
    names = output_names(outputs, definition)
    return [
        OutputView(one, name, *presentation(one, media_origin=media_origin))
        for one, name in zip(outputs, names, strict=True)
    ]


def output_names(outputs: Sequence[Output], definition: Sequence[dict[str, Any]]) -> list[str]:
    """The technique's names for its outputs; where these are not as it defines them, their types,
    numbered."""
    defined = ports(definition)
    if fits(defined, outputs):
        return [port.name or port.id for port in defined]
    types, seen = Counter(one.type for one in outputs), Counter[str]()
    names = []
    for one in outputs:
        seen[one.type] += 1
        name = OUTPUT_KINDS.get(one.type, "output").capitalize()
        names.append(f"{name} {seen[one.type]}" if types[one.type] > 1 else name)
    return names


def plain_http_origin(flora_base_url: str) -> str | None:
    """The one origin whose files may be loaded by plain http: a local FLORA; else `None`."""
    parts = urlsplit(flora_base_url)
    return f"http://{parts.netloc}" if parts.scheme == "http" else None


def web_link(text: str) -> str | None:
    """`text` if it is a plain `http(s)` address that may become a link; else `None`."""
    if len(text) > MAX_LINK or any(ord(each) <= 0x20 or ord(each) == 0x7F for each in text):
        return None
    if unturned(text) != text:  # it would look like another address
        return None
    if "\\" in text:  # browsers read it as a slash, so the host may be another than it seems
        return None
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises where it is no port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        return None
    return text


def presentation(output: Output, *, media_origin: str | None) -> tuple[str, str]:
    """How to show an output, and the host of its link, where there is one.

    One of "image", "video", "audio", "document", "text", "link" (of an unknown type, or not to be
    loaded into the page) and "unsafe" (no web address). Plain http is loaded from `media_origin`
    alone.
    """
    if output.type == "text":
        return "text", ""
    if web_link(output.url) is None:
        return "unsafe", ""
    parts = urlsplit(output.url)
    loadable = parts.scheme == "https" or f"http://{parts.netloc}" == media_origin
    return OUTPUT_KINDS.get(output.type, "link") if loadable else "link", parts.hostname or ""
