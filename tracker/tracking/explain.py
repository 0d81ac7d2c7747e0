"""How a run came to be known, in plain words: what was seen when, by whom, and what comes next.

`explain` is a pure function of what is stored; `Explainer` reads that from the database. Nothing is
asked of FLORA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from tracker.core.clock import Clock
from tracker.core.next_poll import NextLook, next_look
from tracker.core.record import Record
from tracker.core.schedule import Durations, Policy
from tracker.polling.poll_round import DurationBook
from tracker.polling.workspaces import Workspaces
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.queries import starts, sweeps
from tracker.store.queries.runs import DeliveryRow, Event
from tracker.store.queries.starts import StartRow
from tracker.tracking.telling import words
from tracker.tracking.telling.happened import happened
from tracker.tracking.telling.standing import standing
from tracker.tracking.telling.words import Sentence

DELIVERIES: Final = 100
"""So many callbacks of one run are told of, the newest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The whole story: what happened, oldest first, then how things stand. The last sentence tells
    of the next look, and `next` is the same for a program."""

    run_id: str
    sentences: tuple[Sentence, ...]
    next: NextLook


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """All that an explanation is made of. `obstacles` says what keeps the run from being read."""

    record: Record
    events: Sequence[Event] = ()
    deliveries: Sequence[DeliveryRow] = ()
    start: StartRow | None = None
    durations: Durations | None = None
    obstacles: Sequence[str] = field(default=())


def explain(known: Known, *, policy: Policy, now: datetime) -> Explanation:
    """The story of a run, from what is known of it. Pure."""
    record = known.record
    look = next_look(record, policy=policy, durations=known.durations)
    past = happened(record, known.events, known.deliveries, known.start)
    present = standing(record, look, known.obstacles, policy=policy, now=now)
    return Explanation(run_id=record.run.run_id, sentences=(*past, *present), next=look)


class Explainer:
    """Explains runs from the database. `policy` is how the settings want runs looked at."""

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        durations: DurationBook,
        policy: Policy,
        clock: Clock,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._durations = durations
        self._policy = policy
        self._clock = clock

    async def explain(self, run_id: str) -> Explanation | None:
        """The story of a run; `None` for one that was never heard of. Raises `StoreUnavailable`."""
        record = await read.get_run(self._database, run_id)
        if record is None:
            return None
        technique_id = record.run.technique_id
        await self._durations.learn([technique_id])
        delivered, _ = await read.list_deliveries(self._database, run_id=run_id, limit=DELIVERIES)
        known = Known(
            record=record,
            events=await read.events(self._database, run_id),
            deliveries=delivered,
            start=await starts.of_run(self._database, run_id),
            durations=self._durations.of(technique_id),
            obstacles=[] if record.run.settled else await self._obstacles(record),
        )
        return explain(known, policy=self._policy, now=self._clock())

    async def _obstacles(self, record: Record) -> list[str]:
        """What keeps a run from being read, as far as this process and the ledger can tell."""
        workspace = self._workspaces.of(record.run.workspace_id)
        if workspace is None:
            return [
                f"Its workspace, {record.run.workspace_id}, is not configured here, so that no key "
                "reads it."
            ]
        if workspace.client is None:
            return ["No API key is set here, so that this process cannot read it."]
        if (reason := workspace.client.breaker.reason) is not None:
            return [f"FLORA refuses the key of its workspace: {reason}."]
        if (found := workspace.client.contact.found) is not None:
            since = words.moment(found.since)
            return [f"FLORA cannot be read ({found.trouble}) since {since}: {found.reason}."]
        names = {workspace.name, workspace.slot, record.run.workspace_id}
        for sweep in await sweeps.list_sweeps(self._database):
            if sweep.workspace_id in names and sweep.finished_at is not None:
                return [] if sweep.error is None else [_failed(sweep.finished_at, sweep.error)]
        return []


def _failed(at: datetime, error: str) -> str:
    return (
        f"The last sweep of its workspace's history, at {words.moment(at)}, failed: "
        f"{error.rstrip('.')}."
    )
