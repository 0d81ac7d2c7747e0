"""Starting a run so that nothing is paid twice and nothing paid is lost.

The idempotency key of a start is in the start log, and its price reserved in the budgets, before
its request is sent; `tracker.store.queries.starts` has the states. It is sent once. Without an
answer that says what it became it is in doubt, until a callback to its own address or
`tracker.starting.recover` ends the doubt. Callers wait for that as long as they have time, and ask
again with the same key.
"""

import asyncio
import base64
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, TypeVar
from uuid import uuid4

from tracker.core.errors import (
    BudgetExceeded,
    FloraError,
    FloraRefusal,
    IdempotencyConflict,
    StartPending,
    StartUnresolved,
    StoreError,
    TrackerError,
)
from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.starts import Budgets, Tags, TechniqueDefinition, digest_of, typed
from tracker.core.waiting import cancel
from tracker.flora.client import FloraClient, check_idempotency_key
from tracker.flora.parse import ports, runs_of
from tracker.polling.poll import DurationBook
from tracker.starting.catalogue import Catalogue
from tracker.starting.recover import Recovery
from tracker.starting.sending import StartSender, held_by, known_to_flora, pending
from tracker.store.queries import runs, spending, starts, techniques
from tracker.store.queries import workspaces as stored
from tracker.store.queries.spending import Usage
from tracker.store.queries.starts import StartRow, StartState
from tracker.workspaces import Service, Workspace

T = TypeVar("T")

NO_BUDGETS: Final = Budgets()
LAST_SECONDS: Final = 3.0
"""How long the end of the process waits for answers to starts that were sent."""
LEAST_SECONDS: Final = 2.0
"""How long FLORA may take for what is read before, also if the caller waits for less."""
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 0.5
"""Seconds between two reads of the start log while a caller waits."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """What to start: a technique by id or slug, and inputs as `{"id", "type", "value"}` each.

    A type that is `None` comes from the technique's definition, or from the log if the key is
    known. `started_by` is a token's name, `cli`, `batch` or `python`; `tags` say what the run is
    for.
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


@dataclass(kw_only=True, eq=False)
class Starter(Service):
    """Starts runs.

    `deadline` is how many seconds a caller waits by default; a start that was sent goes on.
    `on_over_budget` is called with the name of the budget that a start did not fit into.
    """

    catalogue: Catalogue
    durations: DurationBook
    sender: StartSender
    recovery: Recovery
    deadline: float
    budgets: Budgets = NO_BUDGETS
    on_over_budget: Callable[[str], None] = lambda budget: None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._sending: set[asyncio.Task[Any]] = set()
        self._stopping = False

    def stop_waiting(self) -> None:
        """The process stops: whoever waits for evidence of a start in doubt is told so now."""
        self._stopping = True

    async def aclose(self) -> None:
        """Wait a moment for answers to what was sent; the rest stays in doubt."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=LAST_SECONDS)
        await cancel(*self._sending)

    async def start(
        self, request: StartRequest, *, wait: float | None = None, wait_in_doubt: bool = True
    ) -> Started:
        """Start a run, or return the one that this key started.

        `wait` is how many seconds to wait for the outcome; without `wait_in_doubt` a start in doubt
        is not waited for. Raises `InvalidRequest` (workspace, key, inputs), `BudgetExceeded`,
        `IdempotencyConflict`, `StartPending`, `StartUnresolved`, `StartNotStored`, `SettingsError`
        without an API key or a workspace's id, `StoreUnavailable`, and FLORA's answers as
        `FloraError`.
        """
        give_up = self.monotonic() + (self.deadline if wait is None else wait)
        workspace = await self.workspaces.pick(request.workspace_id)
        workspace.require_client()
        key = f"trk-{uuid4()}" if request.idempotency_key is None else request.idempotency_key
        check_idempotency_key(key)
        workspace_id = await self.workspaces.id_of(
            workspace, wanted=request.workspace_id, deadline=self._reading_time(give_up)
        )
        call = _Call(workspace, workspace_id, key, request, give_up)
        row = await starts.get(self.database, workspace_id, key)
        if row is not None and not row.is_fresh:
            await self._check_known(call, row)
        return await self._outcome(call, row, wait_in_doubt=wait_in_doubt)

    async def _check_known(self, call: "_Call", row: StartRow) -> None:
        """Check that a start that may have been sent is the one that is asked for.

        Its answer stands, although FLORA may have changed or removed the technique since: the
        inputs are not checked, and their types are the stored ones. Raises `IdempotencyConflict`,
        `InvalidRequest`, `StoreUnavailable`, and `FloraError` if the technique is named by an
        unknown slug.
        """
        request = call.request
        try:
            technique_id = await self.catalogue.technique_id(
                call.workspace, request.technique, deadline=self._reading_time(call.give_up)
            )
        except FloraError:
            stored = await techniques.get(self.database, row.technique_id)
            if stored is None or stored.slug != request.technique:
                raise
            technique_id = row.technique_id
        if not row.inputs:  # removed by retention; the fingerprint has their types
            stored = await techniques.get(self.database, row.technique_id)
            known = ports(stored.inputs) if stored else ()
            request = replace(request, inputs=typed(known, request.inputs))
        _compare(row, technique_id, request)
        await self.durations.learn([technique_id])

    async def _outcome(
        self, call: "_Call", row: StartRow | None, *, wait_in_doubt: bool
    ) -> Started:
        """Send the start, unless a request may have acted, and wait until its run is known; `row`
        is what is stored of it. Raises as `start` does."""
        sent, pause = False, FIRST_PAUSE
        while row is None or row.state is not StartState.STARTED:
            if row is None or row.is_fresh:
                if row is not None and row.is_known_to_flora:
                    raise known_to_flora(call.key)
                result, sent = await self._send_fresh(call)
                if isinstance(result, Record):
                    return Started(record=result, replayed=False)
                row = result
                if row.state is StartState.STARTED:
                    break
            elif row.state is StartState.UNRESOLVED:
                raise _unresolved(row)
            else:
                await self._within(call, self.recovery.recover_one(call.workspace, row))
            if row.state is StartState.IN_DOUBT and not wait_in_doubt:
                raise pending(call.key)
            if self._stopping or self.monotonic() + pause >= call.give_up:
                raise pending(call.key)
            await self.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
            row = await starts.get(self.database, call.workspace_id, call.key) or row
            # Another caller may have sent it with other tags or types, which count since.
            _compare(row, row.technique_id, call.request)
        started = await runs.get_run(self.database, row.run_id or "")
        if started is None:
            raise StartUnresolved(
                f"idempotency key {call.key!r} started run {row.run_id}, which is no longer kept"
            )
        return Started(record=started, replayed=not sent)

    async def _send_fresh(self, call: "_Call") -> tuple[Record | StartRow, bool]:
        """Send a start of which no request can have taken effect.

        Its run; without an answer, or if another caller sends it, the start as it is stored. And
        whether this call sent it, or may have.
        """
        # Checked before the key is kept, so that wrong inputs can be corrected.
        definition, inputs = await self.catalogue.checked(
            call.workspace,
            call.request.technique,
            call.request.inputs,
            deadline=self._reading_time(call.give_up),
        )
        await self.durations.learn([definition.technique_id])
        sent = True
        with suppress(StartPending):
            record = await self._within(call, self._attempt(call, definition, inputs))
            if record is not None:
                if runs_of(definition, inputs) > 1:
                    record = await self._first_run(call, record)
                return record, True
            sent = False
        row = await starts.get(self.database, call.workspace_id, call.key)
        if row is None:
            raise pending(call.key)
        _compare(row, definition.technique_id, call.request)
        return row, sent

    async def _first_run(self, call: "_Call", answered: Record) -> Record:
        """The first known run of a start that has several: not the one in FLORA's answer if the
        callback of another came before; that one too if the database does not say."""
        with suppress(StoreError):
            row = await starts.get(self.database, call.workspace_id, call.key)
            if row is not None and row.run_id not in (None, answered.run.run_id):
                return await runs.get_run(self.database, row.run_id) or answered
        return answered

    def _reading_time(self, give_up: float) -> float:
        """For how many seconds something may be read before a start is sent, for a caller who waits
        until `give_up`."""
        return min(max(give_up - self.monotonic(), LEAST_SECONDS), self.deadline)

    async def _within(self, call: "_Call", sending: Coroutine[Any, Any, T]) -> T:
        """The result of `sending`, which goes on if the caller has no more time or is gone."""
        task = asyncio.create_task(sending, name="start")
        self._sending.add(task)
        task.add_done_callback(self._sent)
        await asyncio.wait([task], timeout=max(call.give_up - self.monotonic(), 0.0))
        if not task.done():
            raise pending(call.key)
        return task.result()

    def _sent(self, task: asyncio.Task[Any]) -> None:
        self._sending.discard(task)
        failure = None if task.cancelled() else task.exception()
        # The caller may be gone. An expected error is in the start log.
        if failure is not None and not isinstance(failure, TrackerError):
            log.exception("start.broken", exc_info=failure)

    async def _attempt(
        self, call: "_Call", definition: TechniqueDefinition, inputs: list[dict[str, Any]]
    ) -> Record | None:
        """Keep the key, reserve the price and send the start; `None` if another caller holds it, or
        it is of another request. `inputs` are those of the call with their types."""
        workspace_id, key, request = call.workspace_id, call.key, call.request
        technique_id = definition.technique_id

        async def reserve(holder: str, lease: timedelta) -> StartRow | None:
            now = self.clock()
            new = StartRow(
                workspace_id=workspace_id,
                idempotency_key=key,
                technique_id=technique_id,
                fingerprint=digest_of([technique_id, inputs]),
                inputs=inputs,
                created_at=now,
                callback_token=_callback_token(call.workspace.require_client(), workspace_id, key),
                started_by=request.started_by,
                tags=request.tags or None,
                lease_holder=holder,
                lease_until=now + lease,
                reserved_at=now,
                reserved_cost=definition.run_cost,
                reserved_runs=runs_of(definition, inputs),
            )
            budgets = self.budgets.covering(workspace_id, technique_id, request.tags or {})
            row = await starts.reserve(self.database, new, budgets)
            return row if row.lease_holder == holder else None

        try:
            async with held_by(self, (workspace_id, key), reserve) as held:
                if held is None:
                    return None
                return await self.sender.send(call.workspace, held, deadline=self.deadline)
        except BudgetExceeded as error:
            log.warning("start.over_budget", key=key, budget=error.budget, left=float(error.left))
            self.on_over_budget(error.budget)
            raise
        except FloraRefusal as refusal:
            await self.catalogue.refused(technique_id, refusal)
            raise


@dataclass(frozen=True, slots=True)
class _Call:
    """A request to start a run, with its workspace and key; it waits until `give_up`, by the
    monotonic clock."""

    workspace: Workspace
    workspace_id: str
    key: str
    request: StartRequest
    give_up: float


def _callback_token(client: FloraClient, workspace_id: str, key: str) -> str:
    """The last part of a start's own callback address, which cannot be guessed.

    It is the same for the same key, so that FLORA recognises a request that is repeated from a
    database which was restored from a backup and does not know it.
    """
    content = json.dumps([workspace_id, key]).encode()
    digest = hmac.digest(client.key_fingerprint.encode(), content, "sha256")
    return base64.urlsafe_b64encode(digest[:24]).decode()


def _unresolved(row: StartRow) -> StartUnresolved:
    key = row.idempotency_key
    return StartUnresolved(
        f"idempotency key {key!r} was sent before, and it is not known which run of "
        f"{row.technique_id} it became. Nothing was started again; settle it with "
        f"`tracker starts resolve {key}`, by --run RUN_ID or --none"
    )


def _compare(row: StartRow, technique_id: str, request: StartRequest) -> None:
    """Raise `IdempotencyConflict` if the key was kept for another request."""
    if not row.is_for(technique_id, request.inputs):
        differs = "another technique or other inputs"
    elif not row.is_fresh and (row.tags or {}) != (request.tags or {}):
        differs = "a run with other tags"
    else:
        return
    raise IdempotencyConflict(
        f"idempotency key {row.idempotency_key!r} was used before for {differs}"
    )


@dataclass(kw_only=True, eq=False)
class BudgetReader(Service):
    """Reads how far the configured budgets are used."""

    budgets: Budgets

    async def usages(self) -> list[Usage]:
        """The usage of each workspace's budgets and of `[[budgets]]`. Raises `StoreUnavailable`."""
        ids = {one.workspace_id for one in self.workspaces}
        if None in ids and self.budgets.of_each_workspace:
            # Another process may know an id that this one has not learnt yet.
            ids |= set(await stored.all_ids(self.database))
        known = self.budgets.known(sorted(each for each in ids if each is not None))
        return await spending.usages(self.database, known, now=self.clock())
