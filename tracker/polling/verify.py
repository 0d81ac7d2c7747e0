"""Comparing what is here with FLORA's history, changing nothing.

The history is read a page at a time, and each page is compared with the runs here that were created
in the same stretch of time; so memory does not grow with the history. What may still change by
itself is left out: a run that began or ended minutes ago, a bill that is still to be read.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from tracker.core.clock import Clock
from tracker.core.errors import FloraError
from tracker.core.observation import Observation
from tracker.core.record import Record
from tracker.core.run import RunType
from tracker.polling.history import PAGE_SIZE, PageUnreadable, Walk, taken_over, without_removed
from tracker.polling.workspaces import Workspace, Workspaces
from tracker.store.engine import Database
from tracker.store.queries import runs as read

SETTLES_WITHIN: Final = timedelta(minutes=10)
"""A run that was created, or ended, less long ago may still be on its way."""

Problem = Literal["missing", "status", "cost", "outputs", "not_listed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not the same: `here` and `flora` say what each side has.

    `missing` is a run that FLORA lists and that is not here, `not_listed` the other way round.
    """

    run_id: str
    run_type: RunType
    problem: Problem
    created_at: str
    here: str | None = None
    flora: str | None = None


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What the comparison of one workspace found.

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
        """Whether everything was read and is the same."""
        return self.error is None and not self.differences

    def as_json(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return asdict(self) | {"ok": self.good}


class Verifier:
    """Compares workspaces with FLORA's history."""

    def __init__(self, *, database: Database, workspaces: Workspaces, clock: Clock) -> None:
        self._database = database
        self._workspaces = workspaces
        self._clock = clock

    async def verify(self, workspace: Workspace, *, since: timedelta) -> Verdict:
        """Compare all that FLORA made since then; its failures are part of the verdict.

        Raises `SettingsError` where the workspace has no key, and `StoreUnavailable`.
        """
        client = workspace.require_client()
        start = self._clock() - since
        verdict = Verdict(workspace_id=workspace.name, since=start.isoformat())
        shown = await read.has_generations(self._database, self._workspaces.claimable(workspace))
        kinds: tuple[RunType, ...] = ("technique", "generation") if shown else ("technique",)
        for kind in kinds:
            walk = Walk(client, kind)
            try:
                await self._verify_kind(workspace, kind, walk, start, verdict)
            except FloraError as error:
                verdict.error = f"{kind} runs: {error}"
            verdict.pages += walk.pages_read
        verdict.workspace_id = workspace.name
        return verdict

    async def _verify_kind(
        self, workspace: Workspace, kind: RunType, walk: Walk, start: datetime, verdict: Verdict
    ) -> None:
        top = datetime.max.replace(tzinfo=start.tzinfo)
        settled_until = self._clock() - SETTLES_WITHIN
        listed: deque[str] = deque(maxlen=3 * PAGE_SIZE)  # last; pages overlap, and may be small
        try:
            async with aclosing(walk.pages()) as pages:
                async for page in pages:
                    items = taken_over(workspace, page.items)
                    asked = [one for one in items if one.created_at and one.created_at > start]
                    await self._compare(kind, asked, settled_until, verdict)
                    if page.hole is not None:
                        verdict.error = f"{kind} runs: {page.hole.error}"
                        top = page.ceiling or start
                    floor = start if page.is_last else max(page.floor or top, start)
                    listed.extend(item.run_id for item in items)
                    if floor < top:
                        span = (floor, min(top, settled_until))
                        await self._look_for(workspace, kind, span, set(listed), verdict)
                        top = floor
                    if floor <= start:
                        break
        except PageUnreadable as error:
            verdict.error = f"{kind} runs: {error}"

    async def _compare(
        self,
        kind: RunType,
        items: Sequence[Observation],
        settled_until: datetime,
        verdict: Verdict,
    ) -> None:
        """A page's runs with those here."""
        verdict.compared += len(items)
        kept = await without_removed(self._database, items)
        verdict.removed += len(items) - len(kept)
        here = await read.get_runs(self._database, [item.run_id for item in kept])
        for item in kept:
            record = here.get(item.run_id)
            changed_at = item.completed_at or item.created_at
            if changed_at is None or changed_at > settled_until:
                verdict.unsettled += 1
            elif record is None:
                verdict.differences.append(_difference(kind, item, "missing", flora=item.status))
            else:
                verdict.differences += _differences(kind, item, record)
                verdict.unsettled += record.recheck_at is not None

    async def _look_for(
        self,
        workspace: Workspace,
        kind: RunType,
        span: tuple[datetime, datetime],
        listed: set[str],
        verdict: Verdict,
    ) -> None:
        """The runs here that FLORA should have listed in that span of time."""
        for run_id, created_at, status in await read.created_within(
            self._database, self._workspaces.claimable(workspace), kind, span
        ):
            if run_id not in listed:
                verdict.differences.append(
                    Difference(
                        run_id=run_id,
                        run_type=kind,
                        problem="not_listed",
                        created_at=created_at.isoformat(),
                        here=status,
                    )
                )


def _differences(kind: RunType, item: Observation, record: Record) -> Iterable[Difference]:
    """What of a run is not the same; a cost or outputs that the list leaves out are not compared,
    nor are those that are still to be read again here."""
    run = record.run
    if run.status != item.status and (run.standing.ended or item.standing.ended):
        yield _difference(kind, item, "status", here=run.status, flora=item.status)
    if record.recheck_at is not None or not item.standing.ended:
        return
    if item.charged_cost is not None and item.charged_cost != (run.charged_cost or 0):
        cost = None if run.charged_cost is None else str(run.charged_cost)
        yield _difference(kind, item, "cost", here=cost, flora=str(item.charged_cost))
    if item.outputs:
        # Links may be signed anew at each read, so these are not compared.
        ours, theirs = (
            [f"{one.output_id} ({one.type})" for one in outputs or ()]
            for outputs in (run.outputs, item.outputs)
        )
        if ours != theirs:
            both = {"here": ", ".join(ours) or None, "flora": ", ".join(theirs)}
            yield _difference(kind, item, "outputs", **both)


def _difference(
    kind: RunType,
    item: Observation,
    problem: Problem,
    *,
    here: str | None = None,
    flora: str | None = None,
) -> Difference:
    return Difference(
        run_id=item.run_id,
        run_type=kind,
        problem=problem,
        created_at=item.created_at.isoformat() if item.created_at else "",
        here=here,
        flora=flora,
    )
