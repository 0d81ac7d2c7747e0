"""Reading one run, in the first way that works, and what to write of it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tracker.core.errors import FloraError, KeyRefused, NotFound, OtherWorkspace, RateLimited
from tracker.core.log import get_logger, log_context
from tracker.core.observation import Observation
from tracker.core.record import Entry, FailedRead, Observed, Record
from tracker.core.run import Run
from tracker.flora.client import FloraClient
from tracker.flora.urls import PollUrlRefused
from tracker.polling.listed import attributed, attributed_page, counted_before, without_removed
from tracker.workspaces import Workspace

if TYPE_CHECKING:
    from tracker.polling.poll import Poller

CALL_SECONDS: Final = 20.0
"""How long a single read may take, repetitions included; what fails is tried at the next poll."""

log = get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class SingleRead:
    """The result of reading one run; `reads` counts the requests.

    Without an `observation`, `missing` is whether every way was answered with "does not exist",
    and `error` says why, fit for a person. `silent` means that FLORA itself did not answer
    (`FloraError.silent`). `others` are the other runs of a history page that was read.
    """

    observation: Observation | None = None
    missing: bool = False
    error: str = ""
    silent: bool = False
    reads: int = 0
    others: list[Observation] = field(default_factory=list)


@dataclass(eq=False)
class RunReader:
    """Reads runs with the key of a workspace, under the claims of the poller's process.

    `is_readable` is whether FLORA can be read with that key, once that is known.
    """

    poller: "Poller"
    workspace: Workspace
    is_readable: bool | None = None

    def __post_init__(self) -> None:
        self._checking = asyncio.Lock()

    async def read(self, record: Record, *, fresh: bool = False) -> tuple[SingleRead, list[Entry]]:
        """Read a run, before others if its end is `fresh`; the result, and what to write: the other
        runs that it showed, then the run.

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
            entries: list[Entry] = []
            if found.others:
                others = attributed_page(workspace, found.others)
                others = await without_removed(self.poller.database, others)
                entries += [Observed(observation=item, incidental=True) for item in others]
            if found.observation is None:
                found.missing = found.missing and await self._can_read()
                entries.append(
                    FailedRead(
                        run_id=run.run_id,
                        at=self.poller.clock(),
                        error=found.error,
                        missing=found.missing,
                        reads=found.reads,
                        claim=self.poller.process,
                    )
                )
            else:
                seen = attributed(workspace, found.observation)
                again = await counted_before(self.poller.database, {seen.run_id: record}, [seen])
                entries.append(
                    Observed(
                        observation=seen,
                        reads=found.reads,
                        claim=self.poller.process,
                        counted_before=bool(again),
                    )
                )
        return found, entries

    async def _read_elsewhere(self, denied: SingleRead, run: Run) -> tuple[SingleRead, Workspace]:
        """Read a run with the keys of the other workspaces; `denied` if none shows it."""
        readable, is_known = self.poller.readable(), run.workspace_id is not None
        for other in self.poller.workspaces:
            if other is self.workspace:
                continue
            if other not in readable:
                denied.missing = denied.missing and is_known  # else it may be there
                continue
            try:
                found = await _read_run(other.require_client(), run, fresh=True)
                if found.missing and not is_known:
                    found.missing = await RunReader(self.poller, other)._can_read()
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
                if attributed_page(self.workspace, page.items):
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


async def _read_run(client: FloraClient, run: Run, *, fresh: bool) -> SingleRead:
    """Read `run` in the first way that works.

    FLORA reads a technique run below its technique, and the technique of a run that is known by a
    callback alone is unknown. So the ways are tried in turn: its `poll_url` (on FLORA's origin
    only), its technique, the newest history page, and `GET /runs/{run_id}`, which reads generation
    runs too. FLORA's errors are part of the result, except `KeyRefused` and `RateLimited`, which
    say nothing about the run.
    """
    found, run_id = SingleRead(), run.run_id
    how: dict[str, Any] = {"deadline": CALL_SECONDS, "fresh": fresh}

    async def on_newest_page() -> Observation | None:
        page = await client.history(**how)
        found.others += [item for item in page.items if item.run_id != run_id]
        listed = next((item for item in page.items if item.run_id == run_id), None)
        if listed is None:
            return None
        if listed.details or not (listed.precedence.ended or listed.lacks_status):
            return listed
        found.others.append(listed)  # it names the technique, which a single read does not
        if listed.technique_id is None:
            return None
        found.reads += 1
        return await client.get_run(listed.technique_id, run_id, **how)

    ways: list[Callable[[], Awaitable[Observation | None]]] = []
    if run.poll_url:
        ways.append(partial(client.follow, run.poll_url, run_id, **how))
    if run.run_type != "generation":
        technique_id = run.technique_id
        ways.append(
            partial(client.get_run, technique_id, run_id, **how) if technique_id else on_newest_page
        )
    ways.append(partial(client.get_any_run, run_id, **how))
    denied = doubtful = False
    for way in ways:
        found.reads += 1
        try:
            found.observation = await way()
        except NotFound as refusal:
            denied = True
            found.error = str(refusal)
        except PollUrlRefused as refusal:
            found.reads -= 1  # nothing was sent
            found.error = str(refusal)
        except (KeyRefused, RateLimited):
            raise
        except FloraError as error:
            found.error = str(error)
            if error.silent:
                found.silent = True
                return found
            doubtful = True  # such as a 403, or another run, to which a wrong `poll_url` leads
        if found.observation is not None:
            return found
    found.missing = denied and not doubtful
    return found
