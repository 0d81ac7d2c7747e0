"""Starting a run so that nothing is paid for twice and nothing paid for is lost.

A start's key is in the start log, and its price reserved in the budgets, before its request leaves;
`tracker.store.queries.starts` has the states. It is sent once. Without an answer that says what
became of it, it is in doubt: a callback to its own address settles that, or
`tracker.starting.recover`. Callers wait for that as long as they have time, and ask again with the
same key.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

import structlog

from tracker.core.budget import Budgets
from tracker.core.clock import Clock
from tracker.core.errors import (
    BudgetExceeded,
    FloraRefusal,
    IdempotencyConflict,
    StartPending,
    StartUnresolved,
)
from tracker.core.record import Record
from tracker.core.tags import Tags
from tracker.flora.client import check_idempotency_key
from tracker.flora.technique import Technique
from tracker.polling.poll_round import DurationBook
from tracker.polling.workspaces import Workspace, WorkspaceIds, Workspaces
from tracker.starting.catalogue import Catalogue
from tracker.starting.held_start import holding
from tracker.starting.recover import Recovery
from tracker.starting.sending import Sender, new_token, pending
from tracker.store.engine import Database
from tracker.store.queries import runs as read
from tracker.store.queries import starts
from tracker.store.queries.starts import StartRow, StartState

NO_BUDGETS: Final = Budgets()
LAST_WITHIN: Final = 3.0
"""Seconds that the end of the process waits for answers to what was sent."""
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 0.5
"""Seconds between two looks at the start log while a caller waits."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """What to start: a technique by id or slug, and inputs as `{"id", "type", "value"}` each.

    `started_by` is who asks: a token's name, `cli` or `batch`. `tags` say what it is for.
    """

    technique: str
    inputs: list[dict[str, Any]]
    workspace_id: str | None = None
    idempotency_key: str | None = None
    started_by: str | None = None
    tags: Tags | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The run, and whether this key had started it before."""

    record: Record
    replayed: bool


class Starter:
    """Starts runs. Used as `async with Starter(…) as starter`.

    `process` names this process in the start log. `deadline` is how many seconds a caller waits
    unless it says otherwise: what is under way then goes on. `on_over_budget` is told the name of
    the budget that a start did not fit.
    """

    def __init__(
        self,
        *,
        database: Database,
        workspaces: Workspaces,
        ids: WorkspaceIds,
        catalogue: Catalogue,
        durations: DurationBook,
        sender: Sender,
        recovery: Recovery,
        process: str,
        clock: Clock,
        deadline: float,
        budgets: Budgets = NO_BUDGETS,
        on_over_budget: Callable[[str], None] = lambda budget: None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._workspaces = workspaces
        self._ids = ids
        self._catalogue = catalogue
        self._durations = durations
        self._sender = sender
        self._recovery = recovery
        self._process = process
        self._clock = clock
        self._deadline = deadline
        self._budgets = budgets
        self._on_over_budget = on_over_budget
        self._sleep = sleep
        self._monotonic = monotonic
        self._sending: set[asyncio.Task[Record | None]] = set()

    async def aclose(self) -> None:
        """Give what was sent a moment to be answered; what is not stays in doubt."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=LAST_WITHIN)
        left = list(self._sending)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=LAST_WITHIN)

    async def start(
        self, request: StartRequest, *, wait: float | None = None, wait_in_doubt: bool = True
    ) -> Started:
        """Start a run, or return the one that this key started.

        `wait` is how many seconds to wait until that is known; without `wait_in_doubt` a start in
        doubt is not waited for. Raises `InvalidRequest` (workspace, key, inputs), `BudgetExceeded`,
        `IdempotencyConflict`, `StartPending`, `StartUnresolved`, `StartNotStored`, `SettingsError`
        without an API key or a workspace's id, `StoreUnavailable`, and the `FloraError` tree for
        what FLORA answered.
        """
        give_up = self._monotonic() + (self._deadline if wait is None else wait)
        workspace = self._workspaces.pick(request.workspace_id)
        workspace.require_client()
        key = f"trk-{uuid4()}" if request.idempotency_key is None else request.idempotency_key
        check_idempotency_key(key)
        workspace_id = await self._ids.of(workspace, deadline=self._deadline)
        row = await starts.get(self._database, workspace_id, key)
        replayed = row is not None and not row.is_fresh
        if row is not None and replayed:
            # Its inputs are not checked: whatever the definition says by now, its answer stands.
            technique_id = await self._catalogue.technique_id(workspace, request.technique)
            _compare(row, technique_id, request)
            await self._durations.learn([technique_id])
        pause = FIRST_PAUSE
        while row is None or row.state is not StartState.STARTED:
            if row is None or row.is_fresh:
                # Before the key is kept, or it could not be corrected.
                definition = await self._catalogue.checked(
                    workspace, request.technique, request.inputs, deadline=self._deadline
                )
                await self._durations.learn([definition.technique_id])
                attempt = self._attempt(workspace, workspace_id, key, definition, request)
                try:
                    record = await self._within(give_up, key, attempt)
                except StartPending:
                    record = None
                else:
                    if record is not None:
                        return Started(record=record, replayed=False)
                    replayed = True  # another caller sends it, or has
                row = await starts.get(self._database, workspace_id, key)
                if row is None:
                    raise pending(key)
                _compare(row, definition.technique_id, request)
                if row.state is StartState.STARTED:
                    break
            elif row.state is StartState.UNRESOLVED:
                raise _unresolved(row)
            else:
                await self._recovery.look(workspace, row)
            if row.state is StartState.IN_DOUBT and not wait_in_doubt:
                raise pending(key)
            if self._monotonic() + pause >= give_up:
                raise pending(key)
            await self._sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
            row = await starts.get(self._database, workspace_id, key) or row
        return Started(record=await self._record(row), replayed=replayed)

    async def _within(
        self, give_up: float, key: str, sending: Coroutine[Any, Any, Record | None]
    ) -> Record | None:
        """What sending comes to. It goes on where the caller has no more time, or is gone."""
        task = asyncio.create_task(sending, name="start")
        self._sending.add(task)
        task.add_done_callback(self._ended)
        await asyncio.wait([task], timeout=max(give_up - self._monotonic(), 0.0))
        if not task.done():
            raise pending(key)
        return task.result()

    def _ended(self, task: "asyncio.Task[Record | None]") -> None:
        self._sending.discard(task)
        if not task.cancelled():
            task.exception()  # noted in the start log; its caller may be gone

    async def _attempt(
        self,
        workspace: Workspace,
        workspace_id: str,
        key: str,
        definition: Technique,
        request: StartRequest,
    ) -> Record | None:
        """Keep the key, reserve its price and send it; `None` where another caller has it, or it
        is another request's."""
        technique_id, tags = definition.technique_id, request.tags or {}

        async def reserve(holder: str, lease: timedelta) -> StartRow:
            return await starts.reserve(
                self._database,
                workspace_id=workspace_id,
                idempotency_key=key,
                technique_id=technique_id,
                fingerprint=fingerprint(technique_id, request.inputs),
                inputs=request.inputs,
                at=self._clock(),
                callback_token=new_token(),
                started_by=request.started_by,
                tags=tags,
                holder=holder,
                lease=lease,
                cost=definition.run_cost,
                runs=definition.runs_of(request.inputs),
                budgets=self._budgets.covering(workspace_id, technique_id, tags),
            )

        try:
            async with holding(
                self._database, (workspace_id, key), self._process, self._clock, reserve=reserve
            ) as held:
                if held is None:
                    return None
                return await self._sender.send(workspace, held, deadline=self._deadline)
        except BudgetExceeded as error:
            log.warning("start.over_budget", key=key, budget=error.budget, left=float(error.left))
            self._on_over_budget(error.budget)
            raise
        except FloraRefusal as refusal:
            await self._catalogue.refused(technique_id, refusal)
            raise

    async def _record(self, row: StartRow) -> Record:
        record = await read.get_run(self._database, row.run_id or "")
        if record is None:
            raise StartUnresolved(
                f"idempotency key {row.idempotency_key!r} started run {row.run_id}, "
                "which is no longer kept"
            )
        return record


def _unresolved(row: StartRow) -> StartUnresolved:
    key = row.idempotency_key
    return StartUnresolved(
        f"idempotency key {key!r} was sent before, and nothing tells which run of "
        f"{row.technique_id} it became. Nothing was started again; `tracker starts resolve {key}` "
        "settles it, with --run RUN_ID or --none"
    )


def _compare(row: StartRow, technique_id: str, request: StartRequest) -> None:
    """Raise `IdempotencyConflict` where the key was kept for another request than this."""
    if row.fingerprint != fingerprint(technique_id, request.inputs):
        differs = "another technique or other inputs"
    elif not row.is_fresh and (row.tags or {}) != (request.tags or {}):
        differs = "a run with other tags"
    else:
        return
    raise IdempotencyConflict(
        f"idempotency key {row.idempotency_key!r} was used before for {differs}"
    )


def fingerprint(technique_id: str, inputs: list[dict[str, Any]]) -> str:
    """A digest of what a start asks for: equal for equal technique and inputs."""
    canonical = json.dumps([technique_id, inputs], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
