"""What happened to a run, in sentences: how it was first seen, each observation, each callback.

Sentences contain other people's text (error messages, ids) unescaped: whatever shows them escapes
it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from tracker.core.formatting import counted, duration, money
from tracker.core.observation import Observation, Source, merge
from tracker.core.record import DeliveryOutcome, Record
from tracker.core.run import Run, RunStatus
from tracker.store.queries.deliveries import DeliveryRow
from tracker.store.queries.runs import TimelineEvent
from tracker.store.queries.starts import StartRow

LATE: Final = timedelta(seconds=10)
"""A callback that was applied this long after its receipt was quarantined first, or had to wait."""

_SOURCE_NAMES: Final[dict[str, str]] = {
    Source.START: "FLORA's answer to the start",
    Source.TRACK: "the request to track it",
    Source.CALLBACK: "a callback",
    Source.POLL: "a poll",
    Source.HISTORY: "FLORA's run history",
}
_FIRST_SEEN: Final[dict[str, str]] = {
    Source.START: "Started here.",
    Source.TRACK: "Started elsewhere; someone asked to track it. The state given in that request "
    "is not trusted: FLORA is asked.",
    Source.CALLBACK: "First seen in a callback. The run was not started here.",
    Source.HISTORY: "First seen in FLORA's run history. The run was not started here, and no "
    "callback came before.",
    Source.POLL: "First seen in a poll.",
}
_FACTS: Final = {
    "run_type": "its type",
    "workspace_id": "its workspace",
    "project_id": "its project",
    "technique_id": "its technique",
    "technique_name": "its technique's name",
    "poll_url": "its poll URL",
    "created_at": "its time of creation",
    "started_at": "its start time",
}


class SentenceKind(StrEnum):
    """What a sentence is about."""

    START = "start"
    OBSERVATION = "observation"
    CONFLICT = "conflict"
    DELIVERY = "delivery"
    CALLBACK = "callback"
    CHECKS = "checks"
    STATE = "state"
    CLAIM = "claim"
    TROUBLE = "trouble"
    NEXT = "next"


@dataclass(frozen=True, slots=True)
class Sentence:
    """`at` is when it happened, UTC; `None` for the state now. `event` is what was observed then,
    `delivery_id` the callback that it is about."""

    kind: SentenceKind
    text: str
    at: datetime | None = None
    source: Source | str | None = None
    event: TimelineEvent | None = None
    delivery_id: str | None = None


def timeline(
    record: Record,
    events: Sequence[TimelineEvent],
    deliveries: Sequence[DeliveryRow],
    start: StartRow | None,
) -> list[Sentence]:
    """What happened, oldest first. `events` are the run's events, oldest first."""
    first_seen = Sentence(
        SentenceKind.STATE,
        _FIRST_SEEN.get(record.source, f"First seen through {record.source}."),
        record.first_seen_at,
        record.source,
    )
    sentences = [
        *(_start(start, record.run.run_id) if start else [first_seen]),
        *_observations(events, deliveries),
        *_deliveries(events, deliveries),
    ]
    return sorted(sentences, key=lambda sentence: sentence.at or record.first_seen_at)


def source_name(source: Source | str) -> str:
    """A source for people; one that only a newer version knows as it is."""
    return _SOURCE_NAMES.get(source, source)


def moment(at: datetime) -> str:
    """A time in UTC, to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _start(row: StartRow, run_id: str) -> Iterator[Sentence]:
    def sentence(at: datetime, text: str) -> Sentence:
        return Sentence(SentenceKind.START, text, at, Source.START)

    key = row.idempotency_key
    yield sentence(
        row.created_at, f"Start of {row.technique_id} stored with the idempotency key {key}."
    )
    if row.sent_at is None:
        return
    address = "no callback address"
    if row.callback_url is not None:  # the token stays between FLORA and us
        masked = row.callback_url.replace(row.callback_token or "*", "*")
        address = f"the callback address {masked}"
    first = row.in_use_since or row.sent_at
    yield sentence(first, f"Start sent to FLORA with {address}.")
    if row.run_id not in (None, run_id):
        yield sentence(
            first, f"The start made several runs, this one among them; the first is {row.run_id}."
        )
    if row.sent_at > first:
        yield sentence(row.sent_at, "Start sent again with the same key.")


def _observations(
    events: Sequence[TimelineEvent], deliveries: Sequence[DeliveryRow]
) -> Iterator[Sentence]:
    """A sentence for each observation, and one more for a contradiction."""
    run: Run | None = None
    earlier: list[Observation] = []
    for event in events:
        seen = Observation.from_json(event.detail)
        after = merge(run, seen)
        delivery = _delivery_of(seen, deliveries)
        text = " ".join([_observed(seen, run, delivery), *_news(seen, run, after)])
        delivery_id = None if delivery is None else delivery.delivery_id
        yield Sentence(SentenceKind.OBSERVATION, text, event.at, seen.source, event, delivery_id)
        if after.conflict and not (run is not None and run.conflict):
            text = _contradiction(seen, earlier, after)
            yield Sentence(SentenceKind.CONFLICT, text, event.at, seen.source)
        earlier.append(seen)
        run = after


def _observed(seen: Observation, before: Run | None, delivery: DeliveryRow | None) -> str:
    state = _state(seen)
    match seen.source:
        case Source.START if before is None:
            return f"FLORA answered the start with this run: {state}."
        case Source.START:
            return (
                f"FLORA answered the start with this run: {state}. A callback or the run history "
                "had shown the run before."
            )
        case Source.TRACK:
            return "Tracking requested; the run is polled at once."
        case Source.CALLBACK:
            name = "A callback" if delivery is None else f"Callback {delivery.delivery_id}"
            applied_at = None if delivery is None else delivery.applied_at
            if delivery and applied_at and applied_at - delivery.received_at >= LATE:
                name += f", applied only at {moment(applied_at)},"
            settled = before is not None and before.settled
            return f"{name} reported {state}{'' if settled else '; the run is polled at once'}."
        case Source.POLL:
            return f"A poll showed {state}."
        case Source.HISTORY:
            return f"FLORA's run history showed {state}."
    return f"{seen.source} showed {state}."


def _state(seen: Observation) -> str:
    """The observed status, with progress while the run is open and the error of a failed one."""
    text = str(seen.status)
    if not seen.precedence.ended and seen.progress:
        text += f" at {seen.progress:g} %"
    if seen.precedence.ended and seen.error is not None:
        parts = [part for part in (seen.error.code, seen.error.message.rstrip(".")) if part]
        text += f" ({': '.join(parts)})" if parts else ""
    return text


def _news(seen: Observation, before: Run | None, after: Run) -> Iterator[str]:
    """What the observation added to what was known."""
    known = before or Run(run_id=after.run_id)
    if seen.precedence < known.precedence:
        older = f"This is older: the run stays {known.status}."
        yield "The end was already known." if seen.status == known.status else older
    new = list(_details(seen, known, after))
    if not new and before is not None and seen.precedence == known.precedence:
        new = [
            text for name, text in _FACTS.items() if getattr(known, name) != getattr(after, name)
        ]
    if new:
        yield f"New: {_listed(new)}."
    if after.settled and not known.settled:
        yield "The run is settled: its end and details are known."
    elif known.settled and not after.settled:
        yield "The run is no longer settled: its details are fetched again."
    elif seen.precedence.ended and not after.settled:
        values = {"outputs": after.outputs, "cost": after.charged_cost, "times": after.completed_at}
        if missing := [name for name, value in values.items() if value is None]:
            verb = "is" if missing == ["cost"] else "are"
            yield f"{_listed(missing).capitalize()} {verb} still to be fetched."


def _details(seen: Observation, before: Run, after: Run) -> Iterator[str]:
    """The details of an end that the observation brought."""
    if after.outputs and after.outputs != before.outputs:
        yield counted(len(after.outputs), "output")
    if after.charged_cost is not None and after.charged_cost != before.charged_cost:
        yield f"a cost of {money(after.charged_cost)}"
    elif after.charged_cost is None and before.charged_cost is not None:
        yield "a refund (the run costs nothing)"
    if after.completed_at is not None and after.completed_at != before.completed_at:
        took = ""
        if after.created_at is not None:
            took = f" (it took {duration(after.completed_at - after.created_at)})"
        yield f"its end at {moment(after.completed_at)}{took}"
    if after.error not in (None, before.error) and seen.status is not RunStatus.FAILED:
        yield "its error"


def _contradiction(seen: Observation, earlier: Sequence[Observation], after: Run) -> str:
    """Both sides of a contradiction about the end, and which of them counts."""
    ends = [one for one in earlier if one.precedence.ended]
    this = source_name(seen.source)
    for other in reversed(ends):
        that = f"{source_name(other.source)} at {moment(other.at)}"
        if other.status != seen.status:
            by_api = other.precedence.ended_at_api != seen.precedence.ended_at_api
            rule = "the API overrides a callback" if by_api else "completed overrides failed"
            return (
                f"Sources disagree about the end: {that} reported {_state(other)}, {this} "
                f"reported {_state(seen)}. The run counts as {after.status}: {rule}."
            )
    for other in reversed(ends):
        one, two = other.error, seen.error
        if other.precedence == seen.precedence and one and two and one.code != two.code:
            that = f"{source_name(other.source)} at {moment(other.at)}"
            return (
                f"Sources agree about the end but not about the error ({one.code} and {two.code}): "
                f"{that}, and {this}."
            )
    return f"This observation ({_state(seen)}) contradicts an earlier one."


def _delivery_of(seen: Observation, deliveries: Sequence[DeliveryRow]) -> DeliveryRow | None:
    """The delivery that brought an observation: the last applied one received by then."""
    if seen.source is not Source.CALLBACK:
        return None
    received = [
        one
        for one in deliveries
        if one.outcome is DeliveryOutcome.APPLIED and one.received_at <= seen.at
    ]
    return max(received, key=lambda one: one.received_at, default=None)


def _deliveries(
    events: Sequence[TimelineEvent], deliveries: Sequence[DeliveryRow]
) -> Iterator[Sentence]:
    """Callbacks that brought no observation: quarantined, waiting, repeated, or without news."""
    observed = [Observation.from_json(one.detail) for one in events]
    brought = {row.delivery_id for one in observed if (row := _delivery_of(one, deliveries))}
    for row in deliveries:
        name = f"Callback {row.delivery_id}"
        text = None
        if row.outcome is DeliveryOutcome.QUARANTINED:
            reason = row.reason or "it was not understood"
            text = f"{name} quarantined: signed by FLORA, but {reason}."
        elif row.outcome is DeliveryOutcome.WAITING:
            text = f"{name} received; it waits to be applied."
        elif row.delivery_id not in brought:
            text = f"{name} ({row.event_type}) brought nothing new."
        if text:
            yield _about_delivery(row, text, row.received_at)
        if row.receipts > 1:
            text = (
                f"{name} received {row.receipts} times, now for the last time. Repeats only count."
            )
            yield _about_delivery(row, text, row.last_received_at)


def _about_delivery(row: DeliveryRow, text: str, at: datetime) -> Sentence:
    return Sentence(SentenceKind.DELIVERY, text, at, Source.CALLBACK, delivery_id=row.delivery_id)


def _listed(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
