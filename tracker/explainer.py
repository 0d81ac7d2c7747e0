"""Explains a run from the database: what happened, its state now, and when it is polled next."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from tracker.core.contact import Trouble
from tracker.core.formatting import counted, duration
from tracker.core.observation import Source
from tracker.core.record import LOST_AFTER, LOST_AFTER_READS, Record
from tracker.core.run import Tracking
from tracker.core.schedule import Durations, Policy, PollReason
from tracker.polling.poll import Contacts, DurationBook
from tracker.store.queries import runs as read
from tracker.store.queries import starts, sweeps
from tracker.store.queries.deliveries import list_deliveries
from tracker.timeline import Sentence, SentenceKind, moment, source_name, timeline
from tracker.workspaces import Service

DELIVERIES: Final = 100
"""Callbacks of one run that are explained, the newest ones."""
OVERDUE: Final = timedelta(seconds=30)
"""When a run has been due for longer, no worker runs: one needs less than half of it."""


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
        sentences = [
            *timeline(record, events, deliveries, await starts.of_run(database, run_id)),
            *_callback(record, policy, now),
            *_polls(record),
            *_state(record),
        ]
        sentences.sort(key=lambda sentence: sentence.at or now)
        if not record.run.settled and (obstacle := await self._obstacle(record)):
            sentences.append(Sentence(SentenceKind.TROUBLE, obstacle))
        following = _next_poll(record, policy, self.durations.of(technique_id), now)
        sentences += [*_worker(record, now), Sentence(SentenceKind.NEXT, following)]
        return Explanation(record=record, sentences=tuple(sentences))

    async def _obstacle(self, record: Record) -> str | None:
        """What keeps a run from being polled, as far as FLORA's answers and the sweeps show."""
        workspace = self.workspaces.reader_of(record.run.workspace_id)
        if workspace is None:
            return (
                f"Its workspace, {record.run.workspace_id}, is not configured here: no API key can "
                "read the run."
            )
        if workspace.client is None:
            return "No API key is set here: this process cannot poll the run."
        await self.contacts.read()
        state = self.contacts.of(workspace)
        if state is not None and state.is_current(self.clock()) and (found := state.trouble):
            since = moment(found.since)
            if found.trouble is Trouble.KEY_REFUSED:
                return f"FLORA has refused the workspace's API key since {since}: {found.reason}."
            if found.silent:
                return f"FLORA has not answered since {since}: {found.reason}."
            return f"FLORA cannot be read ({found.trouble}) since {since}: {found.reason}."
        names = {workspace.workspace_id, record.run.workspace_id}
        for sweep in await sweeps.list_sweeps(self.database):
            if sweep.workspace_id in names and sweep.finished_at is not None:
                if sweep.error is None:
                    return None
                at, error = moment(sweep.finished_at), sweep.error.rstrip(".")
                return f"The workspace's last history sweep, at {at}, failed: {error}."
        return None


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
    elif now > record.first_seen_at + policy.grace:
        text = f"No callback after {duration(now - record.first_seen_at)}: the run is polled."
    else:
        text = "Waiting for the callback."
    yield Sentence(SentenceKind.CALLBACK, text, record.callback_at, Source.CALLBACK)


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
    first_known = f"first known from {source_name(via)}" if via is not None else ""
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


def _worker(record: Record, now: datetime) -> Iterator[Sentence]:
    """Which worker polls the run now, or that none does although it is due."""
    if record.lease_until is not None and record.lease_until > now:
        until = moment(record.lease_until)
        text = f"Worker {record.lease_holder} is polling it now; its lease ends at {until}."
        yield Sentence(SentenceKind.CLAIM, text)
    elif record.next_check_at is not None and now - record.next_check_at > OVERDUE:
        text = (
            f"Overdue for {duration(now - record.next_check_at)}: no worker seems to be running. "
            "`tracker serve` and `tracker worker` poll all the time, `tracker poll` polls once."
        )
        yield Sentence(SentenceKind.TROUBLE, text)


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
