"""One round of polling in one workspace: history pages while they pay, then single reads.

A history page reads up to a hundred runs, a single read one. So pages are read, newest first, for
as long as some number of them shows more due runs than that. Runs that are still open then, and
those that a list shows without details, are read singly.
"""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from tracker.core.errors import FloraError, KeyRefused, OtherWorkspace, RateLimited
from tracker.core.log import get_logger
from tracker.core.observation import Observation
from tracker.core.record import Observed, Record
from tracker.core.run import RunStatus
from tracker.core.waiting import run_all
from tracker.flora.client import pages
from tracker.polling import history
from tracker.polling.history import PAGE_SIZE
from tracker.polling.listed import attributed_page, counted_before, without_removed
from tracker.polling.reading import RunReader
from tracker.store import claims
from tracker.workspaces import Workspace

if TYPE_CHECKING:
    from tracker.polling.poll import Poller

SINGLE_READS: Final = 16
"""Single reads of a round, half of them for fresh ends; other runs are released and due in the
next round, so that no process holds work that another could do."""
ROUND_SECONDS: Final = 10.0
"""Seconds after which a round begins no further single read (FLORA is slow, or has set a limit):
the next round first checks for new callbacks."""
PAGE_SECONDS: Final = 10.0
"""How long a page may take, repetitions included: single reads wait for it, and FLORA lists a
hundred runs within a second."""
FAILURES: Final = 2
"""Failures without a single answer that end a round: FLORA is down, and no run is to blame."""

log = get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class PollReport:
    """What a round did: runs claimed, history pages and single reads made, runs settled, and runs
    that could not be read (FLORA's answer that a run does not exist is a read).

    `more` is true if due runs were left for the next round, `at_once` if that should not wait for
    others to become due; `trouble` is why the round was broken off, if it was.
    """

    claimed: int = 0
    pages: int = 0
    reads: int = 0
    settled: int = 0
    failed: int = 0
    more: bool = False
    at_once: bool = False
    trouble: str | None = None

    def add(self, other: "PollReport") -> None:
        self.claimed += other.claimed
        self.pages += other.pages
        self.reads += other.reads
        self.settled += other.settled
        self.failed += other.failed
        self.more = self.more or other.more
        self.at_once = self.at_once or other.at_once
        self.trouble = self.trouble or other.trouble


class PollRound:
    """Reads the runs that were claimed in one workspace.

    `remaining` are those not read yet, by id. `shared_reads` counts the requests that several due
    runs shared, or could have. With `recheck`, settled runs are read again for cost and outputs.
    """

    def __init__(
        self,
        poller: "Poller",
        workspace: Workspace,
        due: Sequence[Record],
        *,
        recheck: bool = False,
    ) -> None:
        self.remaining = {record.run.run_id: record for record in due}
        self.shared_reads = 0
        self.report = PollReport(claimed=len(due))
        self.error = ""
        self._poller = poller
        self._reader = RunReader(poller, workspace)
        self._workspace = workspace
        self._client = workspace.require_client()
        self._recheck = recheck
        self._places: Mapping[str, int] | None = None  # in FLORA's list, by run id, once needed
        self._cost_probe: str | None = None
        self._answered = False
        self._failures = 0
        self._refused = False

    @property
    def broken_off(self) -> bool:
        """Whether FLORA refuses requests, or has not answered any."""
        return self._refused or (self._failures >= FAILURES and not self._answered)

    def _refuse(self, error: FloraError) -> None:
        """FLORA refuses the key or any request for now, or the key reads another workspace."""
        self._refused = True
        self.error = str(error)

    def _fail(self, error: str) -> None:
        """FLORA did not answer, or with a 5xx."""
        self._failures += 1
        self.error = error

    # Pages

    async def read_pages(self) -> None:
        """Read history pages while they pay, and drop the runs that they settle.

        Failures of FLORA are noted. Raises `StoreUnavailable`.
        """
        place, backoff = self._workspace.place, self._poller.page_backoff
        wanted = self._listable()
        if len(wanted) < 2 or backoff.left(place):
            return
        self._places = await claims.list_positions(
            self._poller.database,
            [record.run.run_id for record in wanted],
            self._poller.workspaces.claimable(self._workspace),
            # Runs further down are fewer than the pages above them.
            among=len(wanted) * PAGE_SIZE * len(self._poller.workspaces),
        )
        if not self._pages_pay(wanted):
            return
        read = partial(self._client.history, fresh=not self._recheck, deadline=PAGE_SECONDS)
        try:
            async with aclosing(pages(lambda cursor: read(cursor=cursor))) as found:
                async for page in found:
                    self.report.pages += 1
                    self.shared_reads += 1
                    self._answered = True
                    await self._take_page(page.items)
                    backoff.succeeded(place)
                    oldest = history.oldest(page.items)
                    # A newer run that this page did not show is in no list.
                    wanted = [
                        record
                        for record in self._listable()
                        if oldest is not None and record.created_at <= oldest
                    ]
                    if not self._pages_pay(wanted):
                        return
        except (KeyRefused, RateLimited, OtherWorkspace) as refusal:
            self._refuse(refusal)
        except FloraError as error:
            # No due run is to blame: each is still read singly.
            if error.silent:
                self._fail(str(error))
            log.warning(
                "poll.page_failed",
                workspace_id=self._workspace.name,
                error=str(error),
                rest_seconds=backoff.failed(place),
            )

    def _listable(self) -> list[Record]:
        """The remaining runs that a page of technique runs can settle.

        If lists leave details out, a page says nothing new about a run that is known to have ended.
        """
        workspace = self._workspace

        def suffices(record: Record) -> bool:
            if record.run.settled:
                costs = record.cost_final or workspace.lists_carry_costs
                return costs and workspace.lists_carry_outputs
            return workspace.lists_carry_details or not record.run.precedence.ended

        return [
            record
            for record in self.remaining.values()
            if record.run.run_type != "generation" and suffices(record)
        ]

    def _pages_pay(self, wanted: Sequence[Record]) -> bool:
        """Whether some number of further pages costs fewer requests than their due runs singly.

        FLORA's list may hold runs that are unknown here. A run that was expected on a page that was
        read is then expected on the next.
        """
        places = self._places or {}
        pages_away = [
            max(1, math.ceil(places[record.run.run_id] / PAGE_SIZE) - self.report.pages)
            for record in wanted
            if record.run.run_id in places
        ]
        return any(due > pages for due, pages in enumerate(sorted(pages_away), start=1))

    async def _take_page(self, items: Sequence[Observation]) -> None:
        """Write a page; runs that it shows ended without details remain, and stay claimed."""
        kept = await without_removed(self._poller.database, attributed_page(self._workspace, items))
        if items:
            self._reader.is_readable = True
        lean = {item.run_id for item in kept if self._lacks_details(item)}
        answered = self.remaining.keys() - lean
        again = await counted_before(self._poller.database, self.remaining, kept)
        results = await self._poller.writer.submit_all(
            [
                Observed(
                    observation=item,
                    claim=self._poller.process if item.run_id in answered else None,
                    counted_before=item.run_id in again,
                    incidental=item.run_id not in self.remaining,
                )
                for item in kept
            ]
        )
        for item, result in zip(kept, results, strict=True):
            self.report.settled += result.settles
            if item.run_id not in self.remaining:
                continue
            if item.run_id not in lean:
                del self.remaining[item.run_id]
            elif result.after is not None:
                self.remaining[item.run_id] = result.after

    def _lacks_details(self, item: Observation) -> bool:
        """Whether a page's item shows too little of an ended run, which is then read singly.

        Of the settled runs shown with outputs but no cost, one in a round is read singly all the
        same: if that shows the cost, lists leave costs out.
        """
        if not self._recheck:
            return bool(item.lacks_status) or (item.precedence.ended and not item.details)
        record = self.remaining.get(item.run_id)
        if record is None:
            return False
        if not self._answers_recheck(record, item):
            return True
        if item.status is RunStatus.COMPLETED and item.charged_cost is None:
            self._cost_probe = self._cost_probe or item.run_id
        return self._cost_probe == item.run_id

    def _answers_recheck(self, record: Record, item: Observation) -> bool:
        """Whether a page's item says as much about cost and outputs as a single read.

        Something missing either does not exist yet or is left out by lists; whether lists show it
        for other runs shows which.
        """
        if item.status is not RunStatus.COMPLETED:
            return item.precedence.ended
        if record.run.lacks_outputs and not item.outputs:
            return False
        return item.charged_cost is not None or (
            bool(item.outputs) and self._workspace.lists_carry_costs
        )

    # Single reads

    async def read_singly(self) -> None:
        """Read remaining runs one by one; write each result at once. Raises as `read_pages`."""
        permits = asyncio.Semaphore(self._client.request_limit.concurrency)
        until = time.monotonic() + ROUND_SECONDS
        shareable = {
            record.run.run_id
            for record in self._listable()
            if self._places is None or record.run.run_id in self._places
        }

        async def read(record: Record) -> None:
            run_id = record.run.run_id
            fresh = record.run.precedence.ended and not self._recheck
            async with permits:
                if self.broken_off or time.monotonic() > until:
                    return  # it remains, and is released
                try:
                    found, entries = await self._reader.read(record, fresh=fresh)
                except (KeyRefused, RateLimited, OtherWorkspace) as refusal:
                    self._refuse(refusal)
                    return
                if found.silent:
                    self._fail(found.error)
                else:
                    self._answered = True
            self.report.reads += found.reads
            seen = found.observation
            if run_id == self._cost_probe and seen and seen.charged_cost is not None:
                self._workspace.lists_carry_costs = False
            if run_id in shareable:
                self.shared_reads += found.reads
            results = await self._poller.writer.submit_all(entries)
            self.report.settled += sum(result.settles for result in results)
            if seen is None and not found.missing:
                self.report.failed += 1
            self.remaining.pop(run_id, None)

        records = list(self.remaining.values())
        await run_all(
            [read(record) for record in records[: None if self._recheck else SINGLE_READS]]
        )
