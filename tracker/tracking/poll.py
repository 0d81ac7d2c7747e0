"""Polling what is due, with as few requests as possible.

One page of the history reads up to a hundred runs, a single read one. So where at least two runs
are due, pages are read from the newest on for as long as the next one is likely to show two due
runs more; what is still open then, and what a list shows without its details, is read alone.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.core.entry import Entry, Seen, Unseen
from tracker.core.errors import FloraError, KeyRefused, StoreError
from tracker.core.observation import Observation
from tracker.core.record import Record
from tracker.core.run import RunStatus
from tracker.sources import history
from tracker.sources.poll import Reading, read_run
from tracker.store import claims
from tracker.store.batch import Passed
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.tracking.durations import DurationBook
from tracker.tracking.workspaces import Workspace, Workspaces

CLAIM: Final = 100
"""So many due runs are claimed in one round: what one page of the history can show."""
SINGLE_READS: Final = 16
"""So many runs are read alone in one round; the rest is given back and due in the next, so that no
process sits on work that another could do."""
LEASE: Final = timedelta(seconds=30)
"""A claim that was not given back, because its process died, runs out after this."""
RENEW_AFTER: Final = 10.0
"""Seconds after which a round that is still under way (FLORA is slow) holds its claims longer."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class PollReport:
    """What one round did: runs claimed, history pages and single reads made, runs settled, reads
    that failed. `more` is true where due runs were left for the next round."""

    claimed: int = 0
    pages: int = 0
    reads: int = 0
    settled: int = 0
    failed: int = 0
    more: bool = False

    def count(self, passed: Passed) -> None:
        """Count one run that went through the door, if that settled it."""
        before, after = passed.before, passed.after
        if after is not None and after.run.settled and not (before and before.run.settled):
            self.settled += 1

    def add(self, other: "PollReport") -> None:
        """Add another round's figures."""
        self.claimed += other.claimed
        self.pages += other.pages
        self.reads += other.reads
        self.settled += other.settled
        self.failed += other.failed
        self.more = self.more or other.more


class Poller:
    """Reads due runs. `holder` names this process in the claims that it makes."""

    def __init__(
        self,
        *,
        database: Database,
        door: Door,
        workspaces: Workspaces,
        durations: DurationBook,
        holder: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._door = door
        self._workspaces = workspaces
        self._durations = durations
        self._holder = holder
        self._clock = clock

    async def poll_due(self) -> PollReport:
        """One round: claim what is due in each workspace and read it. Raises `StoreUnavailable`.

        A workspace whose key is refused, or that has none, is left alone.
        """
        report = PollReport()
        rounds = [self._poll_workspace(workspace) for workspace in self._readable()]
        for one in await asyncio.gather(*rounds):
            report.add(one)
        return report

    async def next_due_at(self) -> datetime | None:
        """When the next run that can be read is due, UTC; in the past where one waits already."""
        times = [
            await claims.next_due_at(
                self._database, self._workspaces.claimable(workspace), now=self._clock()
            )
            for workspace in self._readable()
        ]
        return min((moment for moment in times if moment), default=None)

    def _readable(self) -> list[Workspace]:
        """The workspaces with a key that FLORA does not refuse (or that may be tried again now)."""
        return [
            workspace
            for workspace in self._workspaces
            if workspace.client is not None and not workspace.client.breaker.blocked
        ]

    async def read_now(self, record: Record) -> Record:
        """Read one run at once, whoever else may be at it; what is known of it afterwards.

        Without a key, or with one that FLORA refuses, it stays due. Raises `StoreUnavailable`.
        """
        workspace = self._workspaces.of(record.run.workspace_id)
        if workspace is None or workspace.client is None or record.run.settled:
            return record
        try:
            reading = await read_run(workspace.client, record.run)
        except KeyRefused as refusal:
            return replace(record, last_error=str(refusal))
        passed = await self._door.put_all(self._entries(workspace, record, reading))
        return passed[-1].after or record

    async def release(self) -> None:
        """Give back whatever this process still claims."""
        await claims.release(self._database, self._holder)

    async def _poll_workspace(self, workspace: Workspace) -> PollReport:
        due = await claims.claim_due(
            self._database,
            holder=self._holder,
            now=self._clock(),
            lease=LEASE,
            limit=CLAIM,
            workspaces=self._workspaces.claimable(workspace),
        )
        report = PollReport(claimed=len(due))
        if not due:
            return report
        await self._durations.learn(record.run.technique_id for record in due)
        open_runs = {record.run.run_id: record for record in due}
        renewing = asyncio.create_task(self._renew())
        try:
            await self._read_pages(workspace, open_runs, report)
            alone = list(open_runs.values())
            await self._read_alone(workspace, alone[:SINGLE_READS], open_runs, report)
        finally:
            renewing.cancel()
            # What was not read (too many for one round, a refused key, a shutdown) is due as
            # before.
            if open_runs:
                await claims.release(self._database, self._holder, list(open_runs))
        report.more = len(due) == CLAIM or bool(open_runs)
        return report

    async def _renew(self) -> None:
        """Hold what this process claims for as long as the round takes."""
        while True:
            await asyncio.sleep(RENEW_AFTER)
            try:
                await claims.renew(self._database, self._holder, self._clock() + LEASE)
            except StoreError as error:
                log.warning("poll.claims_not_renewed", error=str(error))

    async def _read_pages(
        self, workspace: Workspace, open_runs: dict[str, Record], report: PollReport
    ) -> None:
        """Read history pages while they pay, and take from `open_runs` what they settle."""
        wanted = _listable(open_runs.values(), workspace)
        if len(wanted) < 2:
            return
        newer: datetime | None = None
        try:
            async for page in history.pages(workspace.require_client(), "technique"):
                report.pages += 1
                await self._take_page(workspace, page.items, open_runs, report)
                oldest = history.oldest(page.items)
                wanted = _listable(open_runs.values(), workspace)
                if oldest is None or not _pays(wanted, newer=newer, oldest=oldest):
                    return
                newer = oldest
        except FloraError as error:
            # The due runs are not to blame: each is still read alone, and tells of its own failure.
            log.warning("poll.page_failed", workspace_id=workspace.name, error=str(error))

    async def _take_page(
        self,
        workspace: Workspace,
        items: Sequence[Observation],
        open_runs: dict[str, Record],
        report: PollReport,
    ) -> None:
        """Take a page through the door. What it shows ended without details stays open, and
        claimed."""
        learn_from_page(workspace, items)
        lean = {item.run_id for item in items if item.status.ended and not item.details}
        answered = {item.run_id for item in items} - lean
        passed = await self._door.put_all(
            [
                Seen(observation=item, claim=self._holder if item.run_id in answered else None)
                for item in items
            ]
        )
        for item, one in zip(items, passed, strict=True):
            report.count(one)
            if item.run_id in answered:
                open_runs.pop(item.run_id, None)
            elif item.run_id in open_runs and one.after is not None:
                open_runs[item.run_id] = one.after

    async def _read_alone(
        self,
        workspace: Workspace,
        records: Sequence[Record],
        open_runs: dict[str, Record],
        report: PollReport,
    ) -> None:
        """Read runs one by one; each result goes through the door as soon as it is there."""

        async def read(record: Record) -> None:
            try:
                reading = await read_run(workspace.require_client(), record.run)
            except KeyRefused as refusal:
                log.error("poll.key_refused", workspace_id=workspace.name, error=str(refusal))
                return  # it stays open, and is given back: the run is not to blame
            report.reads += reading.reads
            for passed in await self._door.put_all(self._entries(workspace, record, reading)):
                report.count(passed)
            if reading.observation is None and not reading.missing:
                report.failed += 1
            open_runs.pop(record.run.run_id, None)

        await asyncio.gather(*(read(record) for record in records))

    def _entries(self, workspace: Workspace, record: Record, reading: Reading) -> list[Entry]:
        """What a reading says of its run, and of the runs that it showed on the way."""
        learn_from_page(workspace, reading.beside)
        entries: list[Entry] = [Seen(observation=item) for item in reading.beside]
        if reading.observation is None:
            return [
                *entries,
                Unseen(
                    run_id=record.run.run_id,
                    at=self._clock(),
                    error=reading.error,
                    missing=reading.missing,
                    reads=reading.reads,
                    claim=self._holder,
                ),
            ]
        seen = reading.observation
        if seen.workspace_id is None:  # a key belongs to one workspace, so what it reads does too
            seen = replace(seen, workspace_id=workspace.workspace_id)
        return [*entries, Seen(observation=seen, reads=reading.reads, claim=self._holder)]


def learn_from_page(workspace: Workspace, items: Iterable[Observation]) -> None:
    """Take from a page what it tells of the workspace: its id, and whether lists carry details."""
    completed = with_details = 0
    for item in items:
        workspace.learn(item.workspace_id)
        if item.status is RunStatus.COMPLETED:
            completed += 1
            with_details += bool(item.details)
    if completed:
        workspace.lists_carry_details = 2 * with_details >= completed


def _listable(records: Iterable[Record], workspace: Workspace) -> list[Record]:
    """The due runs that a page of technique runs can answer for.

    Where lists leave the details out, a page says nothing new about a run known to have ended.
    """
    return [
        record
        for record in records
        if record.run.run_type != "generation"
        and (workspace.lists_carry_details or not record.run.standing.ended)
    ]


def _pays(wanted: Sequence[Record], *, newer: datetime | None, oldest: datetime) -> bool:
    """Whether the next page is likely to show two due runs: then it is cheaper than reading them.

    It is taken to reach as far back as the last one did, from `newer` (the end of the page before;
    the newest due run for the first) to `oldest`. Runs known to be newer than `oldest` have been
    passed.
    """
    ahead = [record.created_at for record in wanted if record.created_at <= oldest]
    if newer is None:
        return len(ahead) >= 2
    reach = oldest - (newer - oldest)
    return sum(created >= reach for created in ahead) >= 2
