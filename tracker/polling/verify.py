"""Comparing the database with FLORA's history, changing nothing.

The history is read page by page, and each page is compared with the runs here that were created in
the same span of time, so that memory does not grow with the history. Runs that may still change by
themselves are left out: begun or ended minutes ago and not settled here, or with a bill that is
still to be read.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from tracker.core.errors import FloraError
from tracker.core.formatting import iso_time
from tracker.core.observation import Observation
from tracker.core.record import Record
from tracker.core.run import RunType, Tracking
from tracker.flora.client import HistoryPage
from tracker.polling.history import PAGE_SIZE, HistoryWalk
from tracker.store.queries import runs
from tracker.store.writing.retention import without_removed
from tracker.workspaces import Service, Workspace

SETTLES_WITHIN: Final = timedelta(minutes=10)
"""A run that was created or ended less long ago may not be known here yet, or not be complete."""

Problem = Literal["missing", "status", "cost", "outputs", "not_listed"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference: `here` and `flora` are the two sides.

    `missing` is a run that FLORA lists and that is not here, `not_listed` the opposite.
    """

    run_id: str
    run_type: RunType
    problem: Problem
    created_at: str
    here: str | None = None
    flora: str | None = None


@dataclass(slots=True, kw_only=True)
class VerifyReport:
    """The result of comparing one workspace.

    `compared` counts the runs that FLORA listed, `removed` those among them that retention has
    removed here, `unsettled` those that may still change. `error` says why not all could be read.
    """

    workspace_id: str
    since: str
    pages: int = 0
    compared: int = 0
    removed: int = 0
    unsettled: int = 0
    differences: list[Difference] = field(default_factory=list)
    error: str | None = None

    @property
    def good(self) -> bool:
        """Whether everything was read and agrees."""
        return self.error is None and not self.differences

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.good}


@dataclass(kw_only=True, eq=False)
class Verifier(Service):
    """Compares workspaces with FLORA's history."""

    async def verify(self, workspace: Workspace, *, since: timedelta) -> VerifyReport:
        """Compare everything that FLORA created since then; its failures are part of the report.

        Raises `SettingsError` if the workspace has no key, and `StoreUnavailable`.
        """
        workspace.require_client()
        start = self.clock() - since
        report = VerifyReport(workspace_id=workspace.name, since=iso_time(start))
        shown = await runs.has_generations(self.database, self.workspaces.ids_of_runs(workspace))
        kinds: tuple[RunType, ...] = ("technique", "generation") if shown else ("technique",)
        for kind in kinds:
            try:
                await self._verify_kind(workspace, kind, start, report)
            except FloraError as error:
                report.error = f"{kind} runs: {error}"
        report.workspace_id = workspace.name
        return report

    async def _verify_kind(
        self, workspace: Workspace, kind: RunType, start: datetime, report: VerifyReport
    ) -> None:
        client = workspace.require_client()

        async def read(cursor: str | None, limit: int) -> HistoryPage:
            page = await client.history(kind=kind, cursor=cursor, limit=limit)
            report.pages += 1
            return replace(page, items=workspace.attributed_page(page.items))

        top = datetime.max.replace(tzinfo=start.tzinfo)
        settled_until = self.clock() - SETTLES_WITHIN
        listed: deque[str] = deque(maxlen=3 * PAGE_SIZE)  # pages overlap, and may be small
        async with aclosing(HistoryWalk(read).pages()) as pages:
            async for page in pages:
                asked = [one for one in page.items if one.created_at and one.created_at > start]
                await self._compare(kind, asked, settled_until, report)
                if page.hole is not None:
                    report.error = f"{kind} runs: {page.hole.error}"
                    top = page.hole.end or start
                floor = start if page.is_last else max(page.floor or top, start)
                listed.extend(item.run_id for item in page.items)
                if floor < top:
                    among = self.workspaces.ids_of_runs(workspace)
                    span = (floor, min(top, settled_until))
                    created = await runs.created_within(self.database, among, kind, span)
                    report.differences += [
                        Difference(run_id, kind, "not_listed", iso_time(created_at), here=here)
                        for run_id, created_at, here in created
                        if run_id not in listed
                    ]
                    top = floor
                if floor <= start:
                    break

    async def _compare(
        self,
        kind: RunType,
        items: Sequence[Observation],
        settled_until: datetime,
        report: VerifyReport,
    ) -> None:
        report.compared += len(items)
        kept, _ = await without_removed(self.database, items)
        report.removed += len(items) - len(kept)
        here = await runs.get_runs(self.database, [item.run_id for item in kept])
        for item in kept:
            record = here.get(item.run_id)
            changed_at = item.completed_at or item.created_at
            is_young = changed_at is None or changed_at > settled_until
            if is_young and not (record and _is_final(record, item)):
                report.unsettled += 1
                continue
            if item.lacks_status and record is not None:
                report.error = f"{kind} runs: FLORA lists run {item.run_id} without a status"
                continue
            created_at = iso_time(item.created_at) if item.created_at else ""
            report.differences += [
                Difference(item.run_id, kind, problem, created_at, here=ours, flora=theirs)
                for problem, ours, theirs in _differences(record, item)
            ]
            report.unsettled += record is not None and record.recheck_at is not None


def _is_final(record: Record, item: Observation) -> bool:
    """Whether nothing of the run is read again here, and the item was read last."""
    read_at = record.run.cost_read_at
    return (
        record.tracking is Tracking.SETTLED
        and record.recheck_at is None
        and item.precedence.ended
        and (read_at is None or read_at < item.read_at)
    )


def _differences(
    record: Record | None, item: Observation
) -> Iterable[tuple[Problem, str | None, str | None]]:
    """The problem, our side and FLORA's. A cost or outputs that the list leaves out are not
    compared, nor those that are still to be read again here."""
    if record is None:
        yield "missing", None, item.status
        return
    run = record.run
    if run.status != item.status and (run.precedence.ended or item.precedence.ended):
        yield "status", run.status, item.status
    if record.recheck_at is not None or not item.precedence.ended:
        return
    if item.charged_cost is not None and item.charged_cost != (run.charged_cost or 0):
        cost = None if run.charged_cost is None else str(run.charged_cost)
        yield "cost", cost, str(item.charged_cost)
    if item.outputs:
        # Links may be signed anew at each read, so they are not compared.
        ours, theirs = (
            [f"{one.output_id} ({one.type})" for one in outputs or ()]
            for outputs in (run.outputs, item.outputs)
        )
        if ours != theirs:
            yield "outputs", ", ".join(ours) or None, ", ".join(theirs)
