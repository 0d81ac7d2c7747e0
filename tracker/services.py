"""Builds everything from settings: the only place where concrete classes meet."""

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Final, TypedDict
from uuid import uuid4

from tracker.core.clock import Clock
from tracker.core.errors import SettingsError
from tracker.core.log import get_logger, redact_also
from tracker.core.waiting import ClosingStack
from tracker.delivering.downloads import Downloader
from tracker.delivering.endpoints import Handler, endpoint_of
from tracker.delivering.webhooks import Webhooks
from tracker.explainer import Explainer
from tracker.flora.client import FloraClient
from tracker.operations.gauges import DatabaseGauges, ProcessGauges
from tracker.operations.metrics import Metrics
from tracker.operations.retention import Pruner
from tracker.operations.telemetry import Wrap, tracing, untraced
from tracker.polling.changes import Broadcaster
from tracker.polling.follow import Follower
from tracker.polling.poll import Coalescer, Contacts, DurationBook, Poller
from tracker.polling.sweep import Sweeper
from tracker.polling.verify import Verifier
from tracker.receiving.apply import Applier, Replayer
from tracker.receiving.receive import Inbox, Receiver
from tracker.settings import Rotation, Settings
from tracker.settings.values import longest_wait
from tracker.starting.batches import Batches
from tracker.starting.catalogue import Catalogue, CatalogueSync
from tracker.starting.orders import BatchOrders, BatchWorker
from tracker.starting.recover import Recovery
from tracker.starting.resolve import RunTracker, StartResolver
from tracker.starting.sending import StartSender
from tracker.starting.start import BudgetReader, Starter
from tracker.store import migrate
from tracker.store.clock import SharedClock, shared_clock
from tracker.store.coordination import INBOX, OUTBOX, Signals
from tracker.store.engine import Database
from tracker.store.queries.audit import Refusals
from tracker.store.url import TLS_ADVICE
from tracker.store.writing.rollups import RollupCompactor
from tracker.store.writing.writer import MergeRules, Writer
from tracker.views import message_body
from tracker.workspaces import DatabaseWaits, Workspace, Workspaces

log = get_logger(__name__)

CALLER_SECONDS: Final = 25.0
"""How long FLORA is tried while a caller waits: one-shot commands give up within 30 s."""
START_SECONDS: Final = 24.0
"""How long a caller waits for the outcome of a start."""
LONGEST_RECHECK: Final = timedelta(seconds=60)
"""The longest interval of rechecks, in which bills that become due share their pages."""
JOB_SECONDS: Final = 60.0
"""How long one call of a long-running process may take, repetitions included."""
CLOSE_SECONDS: Final = 5.0
"""How long all of it may take to close. With an answering database that takes a tenth of a second;
what is cut short is done by another process or by the next start."""


class _Shared(TypedDict):
    """The fields of every `Service`."""

    database: Database
    workspaces: Workspaces
    clock: SharedClock
    process: str


class Services:
    """Everything that commands, the web and the worker call; `open_services` opens it."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self.settings = rotation.settings

    @property
    def recheck_every(self) -> timedelta:
        """How often settled runs whose bills are due are read again."""
        return min(self.settings.policy.cost_recheck, LONGEST_RECHECK)

    async def open(
        self,
        stack: ClosingStack,
        *,
        background: bool,
        traces: bool,
        wall: Clock | None,
        seconds: Callable[[], float] | None,
        handlers: Sequence[Handler],
    ) -> None:
        """Open each part, which `stack` closes. The parameters and errors are those of
        `open_services`."""
        rotation, settings = self.rotation, self.settings
        receivers = _receivers(settings, handlers)
        self.database = database = await stack.enter_async_context(
            migrate.open_database(
                settings.tracker_database_url, history_since=settings.tracker_history_since
            )
        )
        if background and (trouble := database.url.tls_trouble):
            log.warning("database.not_verified", trouble=trouble, advice=TLS_ADVICE)
        self.clock = clock = await stack.open(
            "clock", shared_clock(database, wall=wall, seconds=seconds)
        )
        self.traced: Wrap = untraced
        if traces:
            self.traced = await stack.open("tracing", tracing(database.engines))
        self.metrics = metrics = Metrics(clock=clock)
        stack.on_close("metrics", metrics.aclose)
        self.process = process = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        seconds_a_call = JOB_SECONDS if background else CALLER_SECONDS
        self.workspaces = workspaces = _workspaces(
            rotation, database, clock, metrics, process=process, seconds=seconds_a_call
        )
        for workspace in workspaces.keyed:
            stack.on_close("client", workspace.require_client().aclose)
        shared: _Shared = {
            "database": database,
            "workspaces": workspaces,
            "clock": clock,
            "process": process,
        }
        self.contacts = contacts = await stack.open(
            "contacts", Contacts(**shared, background=background)
        )
        durations = DurationBook(database, seconds=clock.seconds)
        self.signals = signals = Signals(database)
        # These two before the writers, so that they are closed after them and see the last commits.
        self.webhooks = webhooks = Webhooks(
            database=database,
            endpoints=map(endpoint_of, settings.endpoints),
            body=message_body,
            process=process,
            clock=clock,
            on_attempt=metrics.attempted,
            handlers=handlers,
        )
        stack.on_close("webhooks", webhooks.aclose)
        signals.when_events(webhooks.make_messages)
        signals.when_notified(OUTBOX, webhooks.wake)
        # Each on its own: a secret that one of them refuses does not keep the other from its own.
        rotation.follow(partial(_rotate, workspaces))
        rotation.follow(
            lambda now: webhooks.rotate({one.id: endpoint_of(one).secrets for one in now.endpoints})
        )
        compactor = RollupCompactor(database, background=background)
        rules = MergeRules(settings.policy, durations.of)
        on_commit = [signals.committed, compactor.committed, metrics.committed]
        self.applier = applier = Applier(
            database,
            workspaces=workspaces,
            rules=rules,
            clock=clock,
            background=background,
            on_commit=on_commit,
            on_applied=metrics.applied,
            on_write=metrics.written,
        )
        signals.when_notified(INBOX, applier.wake)
        if background:
            await stack.open("signals", signals)
        await stack.open("compactor", compactor)
        on_commit = [*on_commit, applier.committed]
        self.writer = writer = await stack.open(
            "writer", Writer(database, rules=rules, on_commit=on_commit, on_write=metrics.written)
        )
        await stack.open("applier", applier)
        self.inbox = inbox = await stack.open(
            "inbox", Inbox(database, on_stored=applier.stored, on_write=metrics.written)
        )
        self.receiver = Receiver(
            inbox=inbox,
            workspaces=workspaces,
            tolerance=settings.tracker_signature_tolerance,
            clock=clock.shown,
            find_new_secrets=rotation.check,
        )
        self.replayer = Replayer(**shared, applier=applier)
        self.budgets = BudgetReader(**shared, budgets=settings.all_budgets)
        self.sweep_seconds = partial(longest_wait, settings.tracker_reconcile_cron, clock())
        metrics.create_series(workspaces, receivers)
        metrics.watch(
            ProcessGauges(
                metrics,
                waiting=lambda: writer.waiting + inbox.waiting,
                is_stale=lambda: rotation.stale is not None,
                workspaces=workspaces,
                contacts=contacts,
                sweep_seconds=self.sweep_seconds,
                clock=clock,
            ),
            DatabaseGauges(**shared, contacts=contacts, budgets=self.budgets),
        )
        self.catalogue = Catalogue(**shared)
        self.catalogue_sync = CatalogueSync(**shared)
        sender = StartSender(**shared, writer=writer, callback_url=settings.callback_url)
        stack.on_close("sender", sender.aclose)
        self.recovery = Recovery(**shared, sender=sender, doubt=settings.tracker_start_doubt)
        self.resolver = StartResolver(**shared, sender=sender)
        coalescer = Coalescer(clock.seconds)
        self.poller = poller = Poller(
            **shared,
            writer=writer,
            durations=durations,
            coalescer=coalescer,
            policy=settings.policy,
        )
        rotation.follow(lambda _: poller.backoff.clear())  # its key may be good now
        rotation.follow(lambda _: signals.wake_due())
        self.sweeper = Sweeper(
            **shared,
            writer=writer,
            durations=durations,
            coalescer=coalescer,
            first_since=settings.tracker_history_since,
        )
        self.verifier = Verifier(**shared)
        self.tracker = RunTracker(**shared, writer=writer, poller=poller, catalogue=self.catalogue)
        self.starter = Starter(
            **shared,
            catalogue=self.catalogue,
            durations=durations,
            sender=sender,
            recovery=self.recovery,
            deadline=START_SECONDS,
            budgets=settings.all_budgets,
            on_over_budget=partial(metrics.count, "starts_over_budget"),
        )
        stack.on_close("starter", self.starter.aclose)
        self.follower = Follower(**shared, signals=signals, poller=poller)
        self.changes = Broadcaster(database, signals)
        stack.on_close("changes", self.changes.aclose)
        self.batches = Batches(
            **shared,
            catalogue=self.catalogue,
            starter=self.starter,
            recovery=self.recovery,
            poller=poller,
        )
        self.batch_worker = BatchWorker(
            **shared, batches=self.batches, concurrency=settings.tracker_api_concurrency
        )
        self.batch_orders = BatchOrders(
            **shared, budgets=settings.all_budgets, on_order=self.batch_worker.wake
        )
        self.explainer = Explainer(
            **shared, contacts=contacts, durations=durations, policy=settings.policy
        )
        self.downloader = Downloader(
            database=database,
            follower=self.follower,
            changes=self.changes,
            poller=poller,
            clock=clock,
        )
        self.pruner = Pruner(database=database, clock=clock)
        self.refusals = await stack.open("refusals", Refusals(database, clock=clock))


@asynccontextmanager
async def open_services(
    settings: Settings | Rotation,
    *,
    background: bool = False,
    traces: bool | None = None,
    wall: Clock | None = None,
    seconds: Callable[[], float] | None = None,
    handlers: Sequence[Handler] = (),
) -> AsyncIterator[Services]:
    """Open what the settings name, and close it in order, within `CLOSE_SECONDS`. With a
    `Rotation`, secrets may change.

    `background` is true for a long-running process: it waits longer for FLORA, and is notified
    of other processes' work. `traces` is whether spans are recorded (default: `background`), which
    only one block of a process can do. `wall` and `seconds` are clocks to use in place of those
    that all processes on the database share (`SharedClock`). `handlers` get events wherever a
    worker runs in this process.

    A SQLite database is migrated here; a PostgreSQL one that is too old raises `SchemaOutdated`.
    Raises `StoreUnavailable` if the database does not answer, and `SettingsError` if a handler has
    the id of an endpoint.
    """
    rotation = settings if isinstance(settings, Rotation) else Rotation(settings)
    redact_also(rotation.settings.secret_values)
    rotation.follow(lambda rotated: redact_also(rotated.secret_values))
    services = Services(rotation)
    async with ClosingStack(CLOSE_SECONDS, quiet=not background) as stack:
        await services.open(
            stack,
            background=background,
            traces=background if traces is None else traces,
            wall=wall,
            seconds=seconds,
            handlers=handlers,
        )
        yield services


def _receivers(settings: Settings, handlers: Sequence[Handler]) -> list[str]:
    """The ids of endpoints and handlers. Raises `SettingsError` if they share one."""
    ids = [one.id for one in settings.endpoints]
    for handler in handlers:
        if handler.config.endpoint_id in ids:
            raise SettingsError(
                f"the handler {handler.config.endpoint_id} has the id of an endpoint in "
                "[[endpoints]]: rename one of them"
            )
    return ids + [handler.config.endpoint_id for handler in handlers]


def _workspaces(
    rotation: Rotation,
    database: Database,
    clock: SharedClock,
    metrics: Metrics,
    *,
    process: str,
    seconds: float,
) -> Workspaces:
    """The workspaces in the settings, with their clients, which take `seconds` for a call."""
    settings, opened = rotation.settings, []
    for configured in settings.all_workspaces:
        workspace = Workspace(
            place=settings.place_of(configured),
            workspace_id=configured.id,
            is_top=configured.id == settings.flora_workspace_id,
            secrets=configured.clear_secrets,
        )
        workspace.on_named = metrics.named
        if configured.api_key is not None:
            workspace.client = FloraClient(
                base_url=settings.flora_base_url,
                api_key=configured.api_key.get_secret_value(),
                workspace_id=configured.id,
                concurrency=settings.tracker_api_concurrency,
                clock=clock,
                deadline=seconds,
                on_request=metrics.requests_of(workspace),
                shared_waits=DatabaseWaits(database, workspace.place, process=process, clock=clock),
                find_new_key=rotation.check_or_retry,  # commands do not check by themselves
            )
        opened.append(workspace)
    return Workspaces(opened, database=database, clock=clock)


def _rotate(workspaces: Workspaces, settings: Settings) -> None:
    for configured in settings.all_workspaces:
        workspaces.rotate(
            settings.place_of(configured),
            api_key=configured.api_key.get_secret_value() if configured.api_key else None,
            secrets=configured.clear_secrets,
        )
