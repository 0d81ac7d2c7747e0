"""What happened to a run: how it was heard of, each sight of it, and its callbacks."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from tracker.core.merge import merge
from tracker.core.observation import Observation, Source
from tracker.core.record import DeliveryOutcome, Record
from tracker.core.run import Run
from tracker.store.queries.runs import DeliveryRow, Event
from tracker.store.queries.starts import StartRow
from tracker.tracking.telling import words
from tracker.tracking.telling.words import Kind, Sentence

LATE: Final = timedelta(seconds=10)
"""A callback that was applied so long after it came was not applied as usual."""


def happened(
    record: Record,
    events: Sequence[Event],
    deliveries: Sequence[DeliveryRow],
    start: StartRow | None,
) -> list[Sentence]:
    """All of it, in the order of time. `events` are the run's timeline, oldest first."""
    # Where its start is in the ledger, that is how it was heard of.
    told = [
        *(_start(start) or [_heard(record)]),
        *_sights(events, deliveries),
        *_deliveries(events, deliveries),
    ]
    return sorted(told, key=lambda sentence: sentence.at or record.first_seen_at)


def _heard(record: Record) -> Sentence:
    how = {
        Source.START: "It was started here.",
        Source.TRACK: (
            "It was started elsewhere, and somebody asked for it to be tracked. Nothing that was "
            "said about its state was believed."
        ),
        Source.CALLBACK: "It was first heard of through a callback: nobody here had started it.",
        Source.HISTORY: (
            "It was found in FLORA's history: nobody here had started it, and no callback had told "
            "of it."
        ),
        Source.POLL: "It was first heard of through a read of the API.",
    }[record.source]
    return Sentence(kind=Kind.STATE, text=how, at=record.first_seen_at, source=record.source)


def _start(row: StartRow | None) -> list[Sentence]:
    if row is None:
        return []

    def told(at: datetime, text: str) -> Sentence:
        return Sentence(kind=Kind.START, text=text, at=at, source=Source.START)

    stored = [
        told(
            row.created_at,
            f"A start of {row.technique_id} was stored here under the idempotency key "
            f"{row.idempotency_key}.",
        )
    ]
    if row.sent_at is None:
        return stored
    calls = "no callback"
    if row.callback_url is not None:  # the token stays between FLORA and us
        calls = f"a callback to {row.callback_url.replace(row.callback_token or '*', '*')}"
    first = row.in_use_since or row.sent_at
    stored.append(told(first, f"The start was sent to FLORA, asking for {calls}."))
    if row.sent_at > first:
        stored.append(told(row.sent_at, "The start was sent once more, under the same key."))
    return stored


def _sights(events: Sequence[Event], deliveries: Sequence[DeliveryRow]) -> list[Sentence]:
    """A sentence for each sight that said something new, and one for each contradiction."""
    told = []
    run: Run | None = None
    earlier: list[Observation] = []
    for event in events:
        seen = Observation.from_json(event.detail)
        after = merge(run, seen)
        text = " ".join(
            [_sight(seen, run, _delivery_of(seen, deliveries)), *words.news(seen, run, after)]
        )
        told.append(Sentence(kind=Kind.SIGHT, text=text, at=event.at, source=seen.source))
        if after.conflict and not (run is not None and run.conflict):
            text = words.contradiction(seen, earlier, after)
            told.append(Sentence(kind=Kind.CONFLICT, text=text, at=event.at, source=seen.source))
        earlier.append(seen)
        run = after
    return told


def _sight(seen: Observation, before: Run | None, delivery: DeliveryRow | None) -> str:
    """Who saw what."""
    state = words.state(seen)
    match seen.source:
        case Source.START if before is None:
            return f"FLORA answered our start with this run, {state}."
        case Source.START:
            return (
                f"FLORA's answer to our start named this run, {state}; it had been heard of by "
                "then, because a callback or a page of the history was quicker."
            )
        case Source.TRACK:
            return "Somebody asked for the run to be tracked, so a read was due at once."
        case Source.CALLBACK:
            name = "A callback" if delivery is None else f"The callback {delivery.delivery_id}"
            again = _late(delivery)
            settled = before is not None and before.settled
            due = "" if settled else ", so a read was due at once"
            return f"{name}{again} said that the run {state}{due}."
        case Source.POLL:
            return f"A read of this run alone showed it {state}."
    return f"A page of FLORA's history showed it {state}."


def _late(delivery: DeliveryRow | None) -> str:
    """When a delivery was applied, where that was long after it came: it was quarantined and then
    replayed, or nobody had the time."""
    if delivery is None or delivery.applied_at is None:
        return ""
    if delivery.applied_at - delivery.received_at < LATE:
        return ""
    return f", which was not applied until {words.moment(delivery.applied_at)},"


def _delivery_of(seen: Observation, deliveries: Sequence[DeliveryRow]) -> DeliveryRow | None:
    """The delivery that brought this sight: the last that came before it, or with it."""
    if seen.source is not Source.CALLBACK:
        return None
    came = [
        one
        for one in deliveries
        if one.outcome is DeliveryOutcome.APPLIED and one.received_at <= seen.at
    ]
    return max(came, key=lambda one: one.received_at, default=None)


def _deliveries(events: Sequence[Event], deliveries: Sequence[DeliveryRow]) -> list[Sentence]:
    """Callbacks beside those that brought news: quarantined, repeated, or with nothing new."""
    told: list[Sentence] = []

    def tell(text: str, at: datetime) -> None:
        told.append(Sentence(kind=Kind.DELIVERY, text=text, at=at, source=Source.CALLBACK))

    sights = [Observation.from_json(one.detail) for one in events if one.source is Source.CALLBACK]
    brought = {row.delivery_id for one in sights if (row := _delivery_of(one, deliveries))}
    for row in deliveries:
        name = f"The callback {row.delivery_id}"
        if row.outcome is DeliveryOutcome.QUARANTINED:
            tell(
                f"{name} came with a right signature but was not applied: "
                f"{row.reason or 'it was not understood'}. It is kept (quarantined).",
                row.received_at,
            )
        elif row.outcome is DeliveryOutcome.WAITING:
            tell(f"{name} came and waits to be applied.", row.received_at)
        elif row.delivery_id not in brought:
            tell(f"{name} ({row.event_type}) came and said nothing new.", row.received_at)
        if row.receipts > 1:
            times = words.counted(row.receipts, "time")
            tell(
                f"{name} came again, {times} in all; this was the last. A repetition only counts.",
                row.last_received_at,
            )
    return told
