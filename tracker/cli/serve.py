"""`tracker serve`, with a local FLORA where it is simulated, and `tracker worker`."""

import ctypes
import os
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from tracker.cli.command import configure_service, flag, option, temporary_folder
from tracker.core.errors import SettingsError

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.settings import Rotation, Settings
    from tracker.simulator import Simulator

_M_ARENA_MAX: Final = -8
"""glibc's option for the number of heaps."""
_HINTS: Final = """\
A local FLORA runs beside the tracker: no key is needed, and nothing is paid.

Dashboard: {dashboard}
Database:  {database}

In another terminal:

{exports}

{program} runs start cctv-cam --input face=https://example.com/face.png --wait
printf 'prompt\\ngarden tools\\nkitchen\\n' > prompts.csv
{program} batch icon-pack prompts.csv

Ctrl-C ends both.
"""


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
        dashboard, callbacks = (host, port), (callbacks_host or host, callbacks_port or port)
        with _simulation(rotation.settings, dashboard, callbacks) as (settings, services):
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
    from tracker.web.app import build_health_app
    from tracker.web.http import server
    from tracker.worker import Worker

    health = partial(server.Listener, host=host, build=build_health_app)
    listeners = [] if port is None else [health(port=port)]
    return server.serve(rotation.settings, partial(_opened, rotation), *listeners, worker=Worker)


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


@contextmanager
def _simulation(
    settings: "Settings", dashboard: tuple[str, int], callbacks: tuple[str, int]
) -> "Iterator[tuple[Settings, Callable[[], AbstractAsyncContextManager[Services]]]]":
    """The settings to serve with, and what opens the services with their local FLORA.

    The database is a temporary file, unless the settings name one. `dashboard` and `callbacks` are
    hosts and ports. Raises `SettingsError` where a key of the real FLORA is set.
    """
    from tracker.settings import read_settings
    from tracker.store.url import DatabaseUrl

    _check_apart(settings)
    with temporary_folder("tracker-simulate-") as folder:
        changes = {"tracker_public_url": _url(*callbacks)}
        if is_temporary := "TRACKER_DATABASE_URL" not in read_settings().sources:
            changes["tracker_database_url"] = f"sqlite:///{folder}/tracker.db"
        settings = settings.model_copy(update=changes)
        database = DatabaseUrl.parse(settings.tracker_database_url)

        def print_hints(simulator: "Simulator") -> None:
            environment = simulator.environment | {"TRACKER_PUBLIC_URL": _url(*callbacks)}
            if database.path:
                environment["TRACKER_DATABASE_URL"] = f"sqlite:///{Path(database.path).absolute()}"
            exports = [f"export {name}={shlex.quote(v)}" for name, v in environment.items()]
            if not database.path:  # whose password is not shown
                exports.append("# and TRACKER_DATABASE_URL as in this terminal")
            hints = _HINTS.format(
                dashboard=_url(*dashboard),
                database=f"{database}{', removed at the end' if is_temporary else ''}",
                exports="\n".join(exports),
                program=_program(),
            )
            typer.echo(hints)

        yield settings, lambda: _open_simulated(settings, print_hints)


def _check_apart(settings: "Settings") -> None:
    """Raise `SettingsError` where a key of the real FLORA is set.

    Its runs and those of the local FLORA must not get into one database.
    """
    from tracker.core.net import is_loopback_url

    real = any(one.api_key for one in settings.all_workspaces)
    if settings.workspaces or (real and not is_loopback_url(settings.flora_base_url)):
        raise SettingsError(
            f"an API key is set for {settings.flora_base_url}, and --simulate would mix its runs "
            "with those of the local FLORA: unset FLORA_API_KEY and TRACKER_CONFIG for it"
        )


@asynccontextmanager
async def _open_simulated(
    settings: "Settings", on_ready: "Callable[[Simulator], None]"
) -> "AsyncIterator[Services]":
    """A local FLORA, whose runs take some seconds and seldom fail, and the services that use it.

    `on_ready` is called once both are open.
    """
    from tracker.services import open_services
    from tracker.settings import load_settings
    from tracker.simulator import Options, running

    async with running(Options(seed=1, run_seconds=5, failures=0.1)) as simulator:
        local = load_settings(simulator.environment)
        names = map(str.lower, simulator.environment)
        own = settings.model_copy(update={name: getattr(local, name) for name in names})
        async with open_services(own, background=True) as services:
            on_ready(simulator)
            yield services


def _url(host: str, port: int) -> str:
    """Where this machine reaches what is bound to `host`."""
    from tracker.core.net import is_loopback

    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104 - not to bind it
    if not is_loopback(host):
        raise typer.BadParameter("--simulate serves this machine: use 127.0.0.1")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _program() -> str:
    """How another terminal calls this program."""
    called = Path(sys.argv[0])
    if called.name != "tracker":
        return f"{shlex.quote(sys.executable)} -m tracker"
    found = shutil.which("tracker")
    on_path = found is not None and os.path.realpath(found) == os.path.realpath(called)
    return "tracker" if on_path else shlex.quote(str(called.absolute()))
