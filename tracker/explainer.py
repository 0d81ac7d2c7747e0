"""What happened to a run, in sentences: each observation and callback, and its state now.

Sentences contain other people's text (error messages, ids) unescaped: whatever shows them escapes
it.
"""

from collections.abc import AsyncIterator, Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from tracker.core.contact import ContactState, Trouble
from tracker.core.formatting import counted, duration, moment, money
from tracker.core.observation import Observation, Source, merge
from tracker.core.record import LOST_AFTER, LOST_AFTER_READS, DeliveryOutcome, Record
from tracker.core.run import RunState, RunStatus, Tracking
from tracker.core.schedule import Durations, Policy, PollReason
from tracker.flora.http import LONGEST_WAIT
from tracker.polling.poll import Contacts, DurationBook
from tracker.store.queries import runs as read
from tracker.store.queries import starts, sweeps
from tracker.store.queries.deliveries import DeliveryRow, list_deliveries
from tracker.store.queries.overview import LATE_AFTER
from tracker.store.queries.runs import TimelineEvent
from tracker.store.queries.starts import StartRow
from tracker.store.queries.workspaces import waits_until
from tracker.workspaces import Service

DELIVERIES: Final = 100
"""Callbacks of one run that are explained, the newest ones."""
LATE: Final = timedelta(seconds=10)
"""A callback that was applied this long after its receipt was quarantined first, or had to wait."""
_LONGEST_PAUSE: Final = timedelta(seconds=LONGEST_WAIT)
"""A pause that lasts longer was stored by another clock."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What happened to a run, oldest first, then its state now. The last sentence is about the next
    poll."""

    record: Record
    sentences: tuple[Sentence, ...]


@dataclass(kw_only=True, eq=False)
class Explainer(Service):
    """Explains runs from the database; FLORA is not asked. `policy` is the polling schedule."""

    contacts: Contacts
    durations: DurationBook
    policy: Policy

    async def explain(self, run_id: str) -> Explanation | None:
        """Explain a run; `None` for an unknown one. Raises `StoreUnavailable`."""
        database, policy, now = self.database, self.policy, self.clock()
        record = await read.get_run(database, run_id)
        if record is None:
            return None
        technique_id = record.run.technique_id
        await self.durations.learn([technique_id])
        events = await read.events(database, run_id)
        deliveries, _ = await list_deliveries(database, run_id=run_id, limit=DELIVERIES)
        observed = list(_observations(events, deliveries))
        sentences = [
            *_beginning(record, await starts.of_run(database, run_id)),
            *observed,
            *_deliveries(deliveries, brought={one.delivery_id for one in observed}),
            *_callback(record, policy, now),
            *_polls(record),
            *_state(record),
        ]
        sentences.sort(key=lambda sentence: sentence.at or now)
        if not record.run.settled:
            troubles = [text async for text in self._troubles(record, now)]
            sentences += [Sentence(SentenceKind.TROUBLE, text) for text in troubles]
        if record.lease_until is not None and record.lease_until > now:
            until = moment(record.lease_until)
            text = f"Worker {record.lease_holder} is polling it now; its lease ends at {until}."
            sentences.append(Sentence(SentenceKind.CLAIM, text))
        following = _next_poll(record, policy, self.durations.of(technique_id), now)
        sentences.append(Sentence(SentenceKind.NEXT, following))
        return Explanation(record=record, sentences=tuple(sentences))

    async def _troubles(self, record: Record, now: datetime) -> AsyncIterator[str]:
        """What keeps a run from being polled, as far as the database and FLORA's answers show."""
        workspace = self.workspaces.reader_of(record.run.workspace_id)
        if workspace is None:
            yield (
                f"Its workspace, {record.run.workspace_id}, is not configured here: no API key can "
                "read the run."
            )
            return
        if workspace.client is None:
            yield "No API key is set here: this process cannot poll the run."
        await self.contacts.read()
        contact = self.contacts.of(workspace)
        if contact is not None and contact.is_current(now) and (found := contact.trouble):
            if found.trouble is Trouble.KEY_REFUSED:
                what = "has refused the workspace's API key"
            elif found.silent:
                what = "has not answered"
            else:
                what = f"cannot be read ({found.trouble})"
            yield f"FLORA {what} since {moment(found.since)}: {found.reason.rstrip('.')}."
            return
        names = {workspace.workspace_id, record.run.workspace_id}
        ended = (one for one in await sweeps.list_sweeps(self.database) if one.finished_at)
        last = next((one for one in ended if one.workspace_id in names), None)
        if last is not None and last.finished_at is not None and last.error is not None:
            at, error = moment(last.finished_at), last.error.rstrip(".")
            yield f"The workspace's last history sweep, at {at}, failed: {error}."
        due_at, lease_until = record.next_check_at, record.lease_until
        if due_at is None or due_at > now or (lease_until is not None and lease_until > now):
            return
        paused_until = await waits_until(self.database, workspace.place)
        if paused_until is not None and now < paused_until <= now + _LONGEST_PAUSE:
            yield f"FLORA has asked for a pause until {moment(paused_until)}; polls wait for it."
        elif now - due_at > LATE_AFTER:
            yield f"Overdue for {duration(now - due_at)}{_cause(contact, now)}"


# What happened, oldest first.


def _name_of(source: Source | str) -> str:
    """A source for people; one that only a newer version knows as it is."""
    return _SOURCE_NAMES.get(source, source)


def _beginning(record: Record, row: StartRow | None) -> Iterator[Sentence]:
    """The start that the run belongs to, or how it was first seen."""
    if row is None:
        source, at = record.source, record.first_seen_at
        text = _FIRST_SEEN.get(source, f"First seen through {source}.")
        yield Sentence(SentenceKind.STATE, text, at, source)
        return

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
    if row.run_id not in (None, record.run.run_id):
        yield sentence(
            first, f"The start made several runs, this one among them; the first is {row.run_id}."
        )
    if row.sent_at > first:
        yield sentence(row.sent_at, "Start sent again with the same key.")


def _observations(
    events: Sequence[TimelineEvent], deliveries: Sequence[DeliveryRow]
) -> Iterator[Sentence]:
    """A sentence for each observation, and one more for a contradiction."""
    run: RunState | None = None
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


def _observed(seen: Observation, before: RunState | None, delivery: DeliveryRow | None) -> str:
    state = _shown(seen)
    match seen.source:
        case Source.START:
            late = " A callback or the run history had shown the run before." if before else ""
            return f"FLORA answered the start with this run: {state}.{late}"
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


def _shown(seen: Observation) -> str:
    """The observed status, with progress while the run is open and the error of a failed one."""
    text = str(seen.status)
    if not seen.precedence.ended and seen.progress:
        text += f" at {seen.progress:g} %"
    if seen.precedence.ended and seen.error is not None:
        parts = [part for part in (seen.error.code, seen.error.message.rstrip(".")) if part]
        text += f" ({': '.join(parts)})" if parts else ""
    return text


def _news(seen: Observation, before: RunState | None, after: RunState) -> Iterator[str]:
    """What the observation added to what was known."""
    known = before or RunState(run_id=after.run_id)
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


def _details(seen: Observation, before: RunState, after: RunState) -> Iterator[str]:
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


def _contradiction(seen: Observation, earlier: Sequence[Observation], after: RunState) -> str:
    """Both sides of a contradiction about the end, and which of them counts."""
    ends = [one for one in earlier if one.precedence.ended]
    this = _name_of(seen.source)
    for other in reversed(ends):
        that = f"{_name_of(other.source)} at {moment(other.at)}"
        if other.status != seen.status:
            by_api = other.precedence.ended_at_api != seen.precedence.ended_at_api
            rule = "the API overrides a callback" if by_api else "completed overrides failed"
            return (
                f"Sources disagree about the end: {that} reported {_shown(other)}, {this} "
                f"reported {_shown(seen)}. The run counts as {after.status}: {rule}."
            )
    for other in reversed(ends):
        one, two = other.error, seen.error
        if other.precedence == seen.precedence and one and two and one.code != two.code:
            that = f"{_name_of(other.source)} at {moment(other.at)}"
            return (
                f"Sources agree about the end but not about the error ({one.code} and {two.code}): "
                f"{that}, and {this}."
            )
    return f"This observation ({_shown(seen)}) contradicts an earlier one."


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
    deliveries: Sequence[DeliveryRow], *, brought: Container[str | None]
) -> Iterator[Sentence]:
    """Callbacks that brought no observation: quarantined, waiting, repeated, or without news;
    `brought` are the ids of those that did."""
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


# The state now, and the next poll.


def _callback(record: Record, policy: Policy, now: datetime) -> Iterator[Sentence]:
    """Whether the callback came, and how late."""
    if record.callback_at is not None:
        text = f"Callback received{_lag(record, record.callback_at, policy)}."
        if record.ended_via is not Source.CALLBACK and record.end_seen_at is not None:
            text += (
                f" The end had been known for {duration(record.callback_at - record.end_seen_at)}."
            )
    elif not record.callback_expected:
        if record.source is not Source.START:
            return
        text = "No callback was requested with the start."
    elif record.run.precedence.ended:
        text = "The callback was missed. No results lost: another source showed the end."
    elif _awaits_callback(record, now):
        text = "Waiting for the callback."
    else:
        text = f"No callback after {duration(now - record.first_seen_at)}: the run is polled."
    yield Sentence(SentenceKind.CALLBACK, text, record.callback_at, Source.CALLBACK)


def _awaits_callback(record: Record, now: datetime) -> bool:
    """Whether the run is not polled yet because its callback may still come."""
    if record.next_poll is None:
        return False
    at, why = record.next_poll
    return at > now and why in (PollReason.GRACE, PollReason.LEARNED_GRACE)


def _lag(record: Record, received: datetime, policy: Policy) -> str:
    """How long after the end the callback came, by the clocks of both sides."""
    end = record.run.completed_at
    if end is None:
        return ""
    if received < end:
        return f" {duration(end - received)} before the end (FLORA's clock differs from ours)"
    late = " (late)" if received - end > policy.grace else ""
    return f" {duration(received - end)} after the end{late}"


def _polls(record: Record) -> Iterator[Sentence]:
    if record.checks:
        requests = counted(record.checks, "API request")
        text = f"{requests} for this run alone. Polls that showed nothing new are not listed."
        yield Sentence(SentenceKind.CHECKS, text, source=Source.POLL)
    if record.last_error is not None and not record.run.settled:
        text = f"The last poll failed: {record.last_error.rstrip('.')}."
        yield Sentence(SentenceKind.TROUBLE, text, source=Source.POLL)


def _state(record: Record) -> Iterator[Sentence]:
    """The tracking state: settled, not found, or finished with details to fetch."""
    run, via = record.run, record.ended_via
    first_known = f"first known from {_name_of(via)}" if via is not None else ""
    if record.tracking is Tracking.SETTLED:
        text = f"Settled: {run.status}, with all details."
        text += f" The end was {first_known}." if first_known else ""
        yield Sentence(SentenceKind.STATE, text + _bill(record), record.settled_at)
        return
    if record.missing and record.missing_since is not None:
        times, since = counted(record.missing, "time"), moment(record.missing_since)
        text = f"FLORA has answered {times} since {since} that the run does not exist."
        if record.lost:
            text += " The run counts as lost until something shows it."
        else:
            limit = f"{LOST_AFTER_READS} such answers over at least {duration(LOST_AFTER)}"
            text += f" After {limit} it counts as lost."
        yield Sentence(SentenceKind.STATE, text, source=Source.POLL)
    if run.precedence.ended and first_known:
        text = f"Finished: {run.status}, {first_known}. Outputs, cost and times are being fetched."
        yield Sentence(SentenceKind.STATE, text)


def _bill(record: Record) -> str:
    """What is still to come of cost and outputs."""
    wanted = [] if record.cost_final else ["cost"]
    wanted += ["outputs"] if record.run.lacks_outputs else []
    if record.recheck_at is not None:
        what = f"{' and '.join(wanted) or 'refund'} {'are' if 'outputs' in wanted else 'is'}"
        return f" Its {what} checked again at {moment(record.recheck_at)}."
    if record.run.charged_cost is None and not record.cost_final:
        return " FLORA never reported its cost and is not asked again."
    return ""


def _cause(contact: ContactState | None, now: datetime) -> str:
    """Why nothing reads a due run, by the last request of any process to FLORA. A worker that runs
    asks FLORA more often than a contact stays current."""
    if contact is None or not contact.is_current(now):
        asked = "never asked" if contact is None else f"last asked at {moment(contact.asked_at)}"
        return (
            f", and FLORA was {asked}: no worker seems to be running. `tracker serve` and "
            "`tracker worker` poll all the time, `tracker poll` polls once."
        )
    return (
        f", although FLORA was asked at {moment(contact.asked_at)}: polling is behind, or the "
        "process that asked has no worker. `tracker doctor` checks the work."
    )


def _next_poll(record: Record, policy: Policy, durations: Durations | None, now: datetime) -> str:
    if record.next_poll is None:
        return f"No further poll: the run is {record.tracking.value}."
    at, why = record.next_poll
    when = f"at {moment(at)}" if at > now else f"due now (since {moment(at)})"
    reason = "" if why is None else f": {_reason(record, why, policy, durations, at)}"
    return f"Next poll {when}{reason}."


def _reason(
    record: Record, why: PollReason, policy: Policy, durations: Durations | None, at: datetime
) -> str:
    after_first = f"{duration(at - record.first_seen_at)} after the run was first seen"
    match why:
        case PollReason.GRACE:
            return f"{after_first}, the time allowed for its callback"
        case PollReason.INTERVAL:
            return f"{after_first}, since no callback is expected"
        case PollReason.LEARNED_GRACE | PollReason.LEARNED_INTERVAL:
            return (
                f"{after_first}, as {_learned(record, durations)}; experience moves the first poll "
                "by a factor of ten at most"
            )
        case PollReason.LEARNED_WAIT:
            longest = duration(policy.interval_max)
            return (
                f"{after_first}, as {_learned(record, durations)}; until then it is polled every "
                f"{longest}"
            )
        case PollReason.WAIT:
            polls = counted(record.polls, "poll has", "polls in a row have")
            return (
                f"{polls} not found its end; each doubles the wait, up to "
                f"{duration(policy.interval_max)}, less a random share (jitter)"
            )
        case PollReason.LOST:
            return "a lost run is polled once a day, in case FLORA was wrong"
        case PollReason.ENDED:
            return "the run has finished, and its details are fetched at once"
        case PollReason.ASKED:
            return "a callback, or a request to track the run, asks for a poll at once"
        case PollReason.CLOCK_SET:
            return (
                "it was further ahead than any wait allows (the clock was set back, or the waits "
                "were shortened), so the run is polled at once"
            )


def _learned(record: Record, durations: Durations | None) -> str:
    """What is known of how long runs of the technique take."""
    if durations is None or durations.count == 0:
        return "typical durations of its technique suggest"
    runs = counted(durations.count, "run")
    if record.callback_expected:
        return (
            f"95 % of its technique's runs end within {duration(durations.p95)} (learned from "
            f"{runs}), plus a margin for the callback"
        )
    return (
        f"half of its technique's runs end within {duration(durations.p50)} (learned from {runs})"
    )
