"""Reading runs: one in the first way that works, and all that a round of polling has claimed.

A history page reads up to a hundred runs, a single read one. So a round reads pages, newest first,
for as long as some number of them shows more due runs than that. Runs that are still open then, and
those that a list shows without details, are read singly.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from tracker.core.errors import (
    FloraError,
    FloraUnreachable,
    KeyRefused,
    NotFound,
    OtherWorkspace,
    RateLimited,
)
from tracker.core.log import get_logger, log_context
from tracker.core.observation import Observation
from tracker.core.record import Entry, FailedRead, Observed, Record
from tracker.core.run import RunState, RunStatus
from tracker.core.waiting import run_all
from tracker.flora.client import FloraClient, PollUrlRefused, pages
from tracker.polling.history import PAGE_SIZE, oldest
from tracker.store import coordination
from tracker.store.writing.retention import counted_before, without_removed
from tracker.store.writing.writer import Writer
from tracker.workspaces import Service, Workspace

CALL_SECONDS: Final = 20.0
"""How long a single read may take, in all ways and repetitions included; what fails is tried at the
next poll. One-shot commands have 30."""
WAY_SECONDS: Final = 4.0
"""How long the answer is waited for in each of several ways at first. FLORA answers within a
second."""
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
BACKOFF: Final = 1.0
LONGEST_BACKOFF: Final = 30.0
"""The pause of a workspace in which FLORA failed, in seconds: doubling from the first to the
second."""

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


@dataclass(slots=True, kw_only=True)
class SingleRead:
    """The result of reading one run; `reads` counts the requests.

    Without an `observation`, `missing` is whether every way was answered with "does not exist",
    and `error` says why, fit for a person. `silent` means that FLORA itself did not answer
    (`FloraError.silent`). `others` are the other runs of a history page that was read. `entries`
    are what to write: these, then the run.
    """

    observation: Observation | None = None
    missing: bool = False
    error: str = ""
    silent: bool = False
    reads: int = 0
    others: list[Observation] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


@dataclass(kw_only=True, eq=False)
class RunReader(Service):
    """Reads runs with the key of a workspace, under the claims of this process.

    `is_readable` is whether FLORA can be read with that key, once that is known; `readable` gives
    the workspaces whose keys FLORA takes, as far as is known.
    """

    workspace: Workspace
    readable: Callable[[], list[Workspace]]
    is_readable: bool | None = None

    def __post_init__(self) -> None:
        self._checking = asyncio.Lock()

    async def read(self, record: Record, *, fresh: bool = False) -> SingleRead:
        """Read a run, before others if its end is `fresh`; the result, with what to write.

        A run whose workspace is not known, or only claimed, and that does not exist in this one, is
        read with the other keys: whoever knows a workspace's signing secret can claim any run for
        it. FLORA's answer that a run does not exist counts only while FLORA can be read in the
        workspace, and of a run whose workspace is not known, in all of them.
        Raises `OtherWorkspace`, `KeyRefused` and `RateLimited`.
        """
        run, workspace = record.run, self.workspace
        with log_context(run_id=run.run_id, workspace_id=workspace.name):
            found = await _read_run(workspace.require_client(), run, fresh=fresh)
            if found.missing and not run.workspace_is_confirmed:
                found, workspace = await self._read_elsewhere(found, run)
            elif found.observation is not None:
                self.is_readable = True
            if found.others:
                others = workspace.attributed_page(found.others)
                others, stored = await without_removed(self.database, others)
                found.entries += [
                    Observed(observation=item, incidental=True, only_stored=item.run_id in stored)
                    for item in others
                ]
            if found.observation is None:
                found.missing = found.missing and await self._can_read()
                failure = FailedRead(
                    run_id=run.run_id,
                    at=self.clock(),
                    error=found.error,
                    missing=found.missing,
                    reads=found.reads,
                    claim=self.process,
                )
                found.entries.append(failure)
            else:
                seen = workspace.attributed(found.observation)
                again = await counted_before(self.database, {seen.run_id: record}, [seen])
                entry = Observed(
                    observation=seen,
                    reads=found.reads,
                    claim=self.process,
                    counted_before=bool(again),
                    only_stored=run.settled,
                )
                found.entries.append(entry)
        return found

    async def _read_elsewhere(
        self, denied: SingleRead, run: RunState
    ) -> tuple[SingleRead, Workspace]:
        """Read a run with the keys of the other workspaces; `denied` if none shows it."""
        readable, is_known = self.readable(), run.workspace_id is not None
        for other in self.workspaces:
            if other is self.workspace:
                continue
            if other not in readable:
                denied.missing = denied.missing and is_known  # else it may be there
                continue
            try:
                found = await _read_run(other.require_client(), run, fresh=True)
                if found.missing and not is_known:
                    reader = replace(self, workspace=other, is_readable=None)
                    found.missing = await reader._can_read()
            except (KeyRefused, RateLimited, OtherWorkspace):
                denied.missing = False  # it may be there
                continue
            found.reads = denied.reads = denied.reads + found.reads
            if found.observation is not None:
                return found, other
            denied.missing = denied.missing and found.missing
        return denied, self.workspace

    async def _can_read(self) -> bool:
        """Whether FLORA can be read in this workspace with this key, as the round has shown; else
        the newest run of the history shows it, or FLORA's list of the key's workspaces.

        Raises `OtherWorkspace`, `KeyRefused` and `RateLimited`.
        """
        async with self._checking:
            if self.is_readable is not None:
                return self.is_readable
            self.is_readable, client = False, self.workspace.require_client()
            try:
                page = await client.history(limit=1, deadline=CALL_SECONDS)
                if self.workspace.attributed_page(page.items):
                    self.is_readable = True
                else:  # an empty history may be another workspace's
                    ids = await client.list_workspaces(deadline=CALL_SECONDS)
                    self.workspace.check_listed(ids)
                    self.is_readable = self.workspace.workspace_id in ids
            except (KeyRefused, RateLimited, OtherWorkspace):
                raise
            except FloraError as error:
                log.warning(
                    "poll.denial_not_counted", workspace_id=self.workspace.name, error=str(error)
                )
            return self.is_readable


async def _read_run(client: FloraClient, run: RunState, *, fresh: bool) -> SingleRead:
    """Read `run` in the first way that works.

    FLORA reads a technique run below its technique, and the technique of a run that is known by a
    callback alone is unknown. So the ways are tried in turn: its `poll_url` (on FLORA's origin
    only), its technique, the newest history page, and `GET /runs/{run_id}`, which reads generation
    runs too. A way that fails or hangs leaves the others, unless no connection is made: FLORA is
    down. If none shows the run, the first that failed or hung has the rest of the time: FLORA may
    be slow. FLORA's errors are part of the result, except `KeyRefused` and `RateLimited`, which say
    nothing about the run.
    """
    found, run_id, until = SingleRead(), run.run_id, time.monotonic() + CALL_SECONDS

    async def on_newest_page(**how: Any) -> Observation | None:
        page = await client.history(**how)
        found.others = [item for item in page.items if item.run_id != run_id]
        listed = next((item for item in page.items if item.run_id == run_id), None)
        if listed is None or listed.details or not listed.may_have_ended:
            return listed
        found.others.append(listed)  # it names the technique, which a single read does not
        if listed.technique_id is None:
            return None
        found.reads += 1
        return await client.get_run(listed.technique_id, run_id, **how)

    ways: list[Callable[..., Awaitable[Observation | None]]] = []
    if run.poll_url:
        ways.append(partial(client.follow, run.poll_url, run_id))
    if run.run_type != "generation":
        if not run.technique_id:
            ways.append(on_newest_page)
        elif not client.is_address_of(run.poll_url, run.technique_id, run_id):
            ways.append(partial(client.get_run, run.technique_id, run_id))
    ways.append(partial(client.get_any_run, run_id))
    errors: dict[int, FloraError] = {}

    async def ends(way: int, **options: Any) -> bool:
        """Read in this way; whether no other is to be tried."""
        left = max(until - time.monotonic(), WAY_SECONDS)
        found.reads += 1
        try:
            found.observation = await ways[way](deadline=left, fresh=fresh, **options)
            errors.pop(way, None)
        except (KeyRefused, RateLimited):
            raise
        except PollUrlRefused as refusal:
            found.reads -= 1  # nothing was sent
            found.error = str(refusal)
        except FloraError as error:
            found.error, errors[way] = str(error), error
            return isinstance(error, FloraUnreachable) and not error.may_have_acted
        return found.observation is not None

    brief = {"answer_seconds": WAY_SECONDS} if len(ways) > 1 else {}
    for way in range(len(ways)):
        if await ends(way, **brief):
            break
    else:
        failed = next((way for way, error in errors.items() if error.silent), None)
        if brief and failed is not None:
            await ends(failed)
    if found.observation is None:
        refusals = errors.values()
        found.silent = bool(refusals) and all(one.silent for one in refusals)
        # Others leave doubt, such as a 403, or another run, to which a wrong `poll_url` leads.
        found.missing = bool(refusals) and all(isinstance(one, NotFound) for one in refusals)
    return found


class Backoff:
    """Pauses by name, which grow with each failure in a row. All times are in `seconds`."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._pauses: dict[str, tuple[int, float]] = {}

    def left(self, name: str) -> float:
        """The seconds that are left of the pause, if any."""
        _, until = self._pauses.get(name, (0, -math.inf))
        return max(0.0, until - self._seconds())

    def failed(self, name: str, *, least: float = 0.0) -> float:
        """Count a failure; the seconds of pause that follow, at least `least`."""
        failures = self._pauses.get(name, (0, 0.0))[0] + 1
        length = min(BACKOFF * 2.0 ** min(failures - 1, 10), LONGEST_BACKOFF)
        length = max(length, least)
        self._pauses[name] = failures, self._seconds() + length
        return length

    def succeeded(self, name: str) -> None:
        self._pauses.pop(name, None)

    def clear(self) -> None:
        self._pauses.clear()


@dataclass(kw_only=True, eq=False)
class PollRound:
    """Reads the runs that are `due`: those that were claimed in the workspace of `reader`.

    `remaining` are those not read yet, by id. `shared_reads` counts the requests that several due
    runs shared, or could have. With `recheck`, settled runs are read again for cost and outputs.
    """

    reader: RunReader
    writer: Writer
    page_backoff: Backoff
    due: Sequence[Record]
    recheck: bool = False

    def __post_init__(self) -> None:
        self.workspace = self.reader.workspace
        self.remaining = {record.run.run_id: record for record in self.due}
        self.shared_reads = 0
        self.report = PollReport(claimed=len(self.due))
        self.error = ""
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
        place, backoff = self.workspace.place, self.page_backoff
        wanted = self._listable()
        if len(wanted) < 2 or backoff.left(place):
            return
        self._places = await coordination.list_positions(
            self.reader.database,
            [record.run.run_id for record in wanted],
            self.reader.workspaces.claimable(self.workspace),
            # Runs further down are fewer than the pages above them.
            among=len(wanted) * PAGE_SIZE * len(self.reader.workspaces),
        )
        if not self._pages_pay(wanted):
            return
        history = self.workspace.require_client().history
        options: dict[str, Any] = {"fresh": not self.recheck, "deadline": PAGE_SECONDS}
        try:
            async with aclosing(pages(lambda at: history(cursor=at, **options))) as found:
                async for page in found:
                    self.report.pages += 1
                    self.shared_reads += 1
                    self._answered = True
                    await self._take_page(page.items)
                    backoff.succeeded(place)
                    lowest = oldest(page.items)
                    # A newer run that this page did not show is in no list.
                    wanted = [
                        record
                        for record in self._listable()
                        if lowest is not None and record.created_at <= lowest
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
                workspace_id=self.workspace.name,
                error=str(error),
                rest_seconds=backoff.failed(place),
            )

    def _listable(self) -> list[Record]:
        """The remaining runs that a page of technique runs can settle.

        If lists leave details out, a page says nothing new about a run that is known to have ended.
        """
        workspace = self.workspace

        def suffices(record: Record) -> bool:
            if record.run.settled:
                costs = record.cost_final or workspace.lists_carry_costs
                return costs and workspace.lists_carry_outputs
            return workspace.lists_carry_details or not record.run.precedence.ended

        remaining = self.remaining.values()
        return [one for one in remaining if one.run.run_type != "generation" and suffices(one)]

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
        page = self.workspace.attributed_page(items)
        kept, stored = await without_removed(self.reader.database, page)
        if items:
            self.reader.is_readable = True
        lean = {item.run_id for item in kept if self._lacks_details(item)}
        answered = self.remaining.keys() - lean
        again = await counted_before(self.reader.database, self.remaining, kept)
        results = await self.writer.submit_all(
            [
                Observed(
                    observation=item,
                    claim=self.reader.process if item.run_id in answered else None,
                    counted_before=item.run_id in again,
                    incidental=item.run_id not in self.remaining,
                    only_stored=item.run_id in stored,
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
        if not self.recheck:
            return item.may_have_ended and not item.details
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
            bool(item.outputs) and self.workspace.lists_carry_costs
        )

    # Single reads

    async def read_singly(self) -> None:
        """Read remaining runs one by one; write each result at once. Raises as `read_pages`."""
        permits = asyncio.Semaphore(self.workspace.require_client().request_limit.concurrency)
        until = time.monotonic() + ROUND_SECONDS
        shareable = {
            record.run.run_id
            for record in self._listable()
            if self._places is None or record.run.run_id in self._places
        }

        async def read_one(record: Record) -> None:
            run_id = record.run.run_id
            fresh = record.run.precedence.ended and not self.recheck
            async with permits:
                if self.broken_off or time.monotonic() > until:
                    return  # it remains, and is released
                try:
                    found = await self.reader.read(record, fresh=fresh)
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
                self.workspace.lists_carry_costs = False
            if run_id in shareable:
                self.shared_reads += found.reads
            results = await self.writer.submit_all(found.entries)
            self.report.settled += sum(result.settles for result in results)
            if seen is None and not found.missing:
                self.report.failed += 1
            self.remaining.pop(run_id, None)

        records = list(self.remaining.values())
        most = None if self.recheck else SINGLE_READS
        await run_all([read_one(record) for record in records[:most]])
