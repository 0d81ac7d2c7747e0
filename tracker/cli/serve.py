"""`tracker serve` and `tracker worker`: the long-running processes."""

import ctypes
import signal
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import typer

from tracker.cli.options import flag, option
from tracker.cli.setup import configure_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tracker.services import Services
    from tracker.settings import Rotation

_M_ARENA_MAX: Final = -8
"""glibc's option for the number of heaps."""


def serve(
    host: str = option("Address to bind.", default="127.0.0.1"),
    port: int = option("Port to bind.", default=8080, min=0, max=65535),
    no_worker: bool = flag("--no-worker", "Leave polling and sweeping to other processes."),
    callbacks_only: bool = flag("--callbacks-only", "Serve callbacks and health alone."),
    callbacks_port: int | None = option(
        "Serve callbacks and health on this port, everything else on --port.", min=0, max=65535
    ),
    callbacks_host: str | None = option(
        "Address to bind for --callbacks-port.", show_default="that of --host"
    ),
    simulate: bool = flag(
        "--simulate", "Run a local FLORA beside it and use that: no key, no cost."
    ),
) -> int:
    """Run receiver, API, dashboard and worker in one process.

    An address that other machines reach needs TRACKER_API_TOKEN, except for callbacks and health,
    which are public: with --callbacks-port a proxy can forward these alone. A SQLite file is
    migrated first; migrate PostgreSQL with `tracker db upgrade`.

    With --simulate a local FLORA runs beside it, and the database is a temporary file, unless
    TRACKER_DATABASE_URL is set. Nothing is sent to the real FLORA.
    """
    if callbacks_only and callbacks_port is not None:
        raise typer.BadParameter("--callbacks-only and --callbacks-port exclude each other")
    if callbacks_host is not None and callbacks_port is None:
        raise typer.BadParameter("--callbacks-host needs --callbacks-port")
    if callbacks_port == port != 0:  # on different hosts too: one port must mean one thing
        raise typer.BadParameter("--callbacks-port and --port must differ")
    if simulate and (callbacks_only or 0 in (port, callbacks_port)):
        raise typer.BadParameter("--simulate needs a --port, and excludes --callbacks-only")
    rotation = _configure()
    from tracker.web import app
    from tracker.web.http import server
    from tracker.worker import Worker

    public = partial(server.Listener, build=app.build_callbacks_app, is_open=True)
    if callbacks_only:
        listeners = [public(host=host, port=port)]
    elif callbacks_port is not None:
        private = partial(app.build_app, callbacks=False)
        listeners = [
            server.Listener(host=host, port=port, build=private),
            public(host=callbacks_host or host, port=callbacks_port),
        ]
    else:
        listeners = [server.Listener(host=host, port=port, build=app.build_app)]
    worker = None if no_worker else Worker
    if simulate:
        from tracker.cli.simulation import simulation

        dashboard, callbacks = (host, port), (callbacks_host or host, callbacks_port or port)
        with simulation(rotation.settings, dashboard, callbacks) as (settings, services):
            return server.serve(settings, services, *listeners, worker=worker)
    return server.serve(rotation.settings, partial(_opened, rotation), *listeners, worker=worker)


def worker(
    host: str = option("Address to bind for --port.", default="127.0.0.1"),
    port: int | None = option("Serve /healthz and /metrics on this port.", min=0, max=65535),
) -> int:
    """Run the worker alone: poll due runs, sweep the history.

    Any number of workers may share one PostgreSQL database.
    """
    rotation = _configure()
    opened = partial(_opened, rotation)
    import asyncio

    from tracker.web.app import build_health_app
    from tracker.web.http import server
    from tracker.worker import Worker, run

    if port is None:
        asyncio.run(run(opened))
        return 0
    listener = server.Listener(host=host, port=port, build=build_health_app)
    return server.serve(rotation.settings, opened, listener, worker=Worker)


def _configure() -> "Rotation":
    # SIGHUP asks for a reload: it must not end a service that is still starting.
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    rotation = configure_service()
    from tracker.core.log import get_logger

    log = get_logger(__name__)
    for unknown in rotation.unknown:
        log.warning("settings.unknown", error=unknown)
    share_heap()
    return rotation


def share_heap() -> None:
    """Make all threads allocate from one heap. Call it before there are any threads.

    By default glibc gives each thread a heap of its own, which SQLite's threads fragment: the
    process grows by a tenth over hours. Sharing costs nothing, since the threads wait for Python's
    lock anyway. Does nothing with another C library.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@asynccontextmanager
async def _opened(rotation: "Rotation") -> "AsyncIterator[Services]":
    """The services; their secrets are reloaded until they are closed."""
    from tracker.services import open_services
    from tracker.store.sqlite import only_service

    with only_service(rotation.settings.tracker_database_url), rotation.reloaded_on_hangup():
        async with rotation.watched(), open_services(rotation, background=True) as services:
            yield services
