"""The only place where concrete things meet: settings become an open database, clients, use
cases."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from tracker.core.clock import Clock, utc_now
from tracker.flora.client import FloraClient
from tracker.settings import Settings, WorkspaceSettings
from tracker.store import migrate
from tracker.store.door import Door
from tracker.store.engine import Database
from tracker.store.signals import Signals
from tracker.tracking.catalogue import Catalogue
from tracker.tracking.durations import DurationBook
from tracker.tracking.poll import Poller
from tracker.tracking.receive import Receiver
from tracker.tracking.start import Starter
from tracker.tracking.sweep import Sweeper
from tracker.tracking.track import Tracker
from tracker.tracking.workspaces import Workspace, Workspaces

CALLER_SECONDS: Final = 25.0
"""How long FLORA is tried while somebody waits: a one-shot gives up within 30 s in all."""
JOB_SECONDS: Final = 60.0
"""How long one call of a long-running process may take, repetitions included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything a command, the web or the worker calls, ready to use."""

    settings: Settings
    clock: Clock
    database: Database
    door: Door
    signals: Signals
    workspaces: Workspaces
    catalogue: Catalogue
    receiver: Receiver
    starter: Starter
    tracker: Tracker
    poller: Poller
    sweeper: Sweeper

    @property
    def reconcile_cron(self) -> str:
        """When the history is swept."""
        return self.settings.tracker_reconcile_cron


@asynccontextmanager
async def open_services(
    settings: Settings, *, background: bool = False, clock: Clock = utc_now
) -> AsyncIterator[Services]:
    """Open what the settings name, and close it in order.

    `background` is true for a long-running process: it waits longer for FLORA and hears of work
    that other processes bring. A SQLite database is migrated here; a PostgreSQL one that is too old
    raises `SchemaOutdated`. Raises `StoreUnavailable` where the database does not answer.
    """
    async with AsyncExitStack() as stack:
        if settings.tracker_database_url.startswith("sqlite"):
            await migrate.upgrade(settings.tracker_database_url)
        database = await stack.enter_async_context(
            await Database.open(settings.tracker_database_url)
        )
        await migrate.check(database)
        workspaces = Workspaces(
            [
                await _workspace(one, settings, stack, background=background, clock=clock)
                for one in settings.all_workspaces
            ]
        )
        durations = DurationBook(database, clock=clock)
        signals = Signals(database)
        if background:
            await stack.enter_async_context(signals)
        door = await stack.enter_async_context(
            Door(
                database,
                policy=settings.policy,
                durations_of=durations.of,
                on_commit=[signals.committed],
            )
        )
        catalogue = Catalogue(database, clock=clock)
        holder = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        yield Services(
            settings=settings,
            clock=clock,
            database=database,
            door=door,
            signals=signals,
            workspaces=workspaces,
            catalogue=catalogue,
            receiver=Receiver(
                door=door,
                workspaces=workspaces,
                tolerance=settings.tracker_signature_tolerance,
                clock=clock,
            ),
            starter=Starter(
                database=database,
                door=door,
                workspaces=workspaces,
                catalogue=catalogue,
                durations=durations,
                callback_url=settings.callback_url,
                holder=holder,
                clock=clock,
                deadline=CALLER_SECONDS,
            ),
            tracker=Tracker(door=door, workspaces=workspaces, catalogue=catalogue, clock=clock),
            poller=Poller(
                database=database,
                door=door,
                workspaces=workspaces,
                durations=durations,
                holder=holder,
                clock=clock,
            ),
            sweeper=Sweeper(
                database=database,
                door=door,
                workspaces=workspaces,
                durations=durations,
                holder=holder,
                first_since=settings.tracker_history_since,
                clock=clock,
            ),
        )


async def _workspace(
    given: WorkspaceSettings,
    settings: Settings,
    stack: AsyncExitStack,
    *,
    background: bool,
    clock: Clock,
) -> Workspace:
    client: FloraClient | None = None
    if given.api_key is not None:
        client = FloraClient(
            base_url=settings.flora_base_url,
            api_key=given.api_key.get_secret_value(),
            concurrency=settings.tracker_api_concurrency,
            clock=clock,
            deadline=JOB_SECONDS if background else CALLER_SECONDS,
        )
        stack.push_async_callback(client.aclose)
    return Workspace(
        # The one of the top-level names keeps its slot when its id is set later on: the ledger of
        # starts goes by it.
        slot="default" if given.id == settings.flora_workspace_id else given.id or "default",
        workspace_id=given.id,
        client=client,
        secrets=tuple(secret.get_secret_value() for secret in given.webhook_secrets),
    )
