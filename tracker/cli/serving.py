"""`tracker serve` and `tracker worker`: the processes that stay."""

import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tracker.cli.errand import prepare_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from tracker.services import Services
    from tracker.settings import Rotation


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(serve)
    app.command()(worker)


def serve(
    host: Annotated[str, typer.Option(help="Address to serve.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve.", min=0, max=65535)] = 8080,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Leave polling and sweeping to other processes.")
    ] = False,
    callbacks_only: Annotated[
        bool, typer.Option("--callbacks-only", help="Serve callbacks and health, nothing else.")
    ] = False,
    callbacks_port: Annotated[
        int | None,
        typer.Option(
            help="Serve callbacks and health on this port, everything else on --port.",
            min=0,
            max=65535,
        ),
    ] = None,
    callbacks_host: Annotated[
        str | None,
        typer.Option(help="Address for --callbacks-port.", show_default="the one of --host"),
    ] = None,
) -> int:
    """Receive callbacks and serve the API, with the worker in the same process.

    Any host that is not this machine alone needs TRACKER_API_TOKEN, but for callbacks and health,
    which are for everybody: with --callbacks-port a proxy can be led to these alone. A SQLite file
    is brought up to date first; PostgreSQL has to be, by `tracker db upgrade`.
    """
    if callbacks_only and callbacks_port is not None:
        raise typer.BadParameter("--callbacks-only and --callbacks-port exclude each other")
    if callbacks_host is not None and callbacks_port is None:
        raise typer.BadParameter("--callbacks-host needs --callbacks-port")
    if callbacks_port == port != 0:  # whatever the hosts are: the port tells what is asked for
        raise typer.BadParameter("--callbacks-port and --port must differ")
    _ignore_hangups()
    rotation = prepare_service()
    from tracker.cli.heap import share_the_heap

    share_the_heap()
    from tracker.web import app
    from tracker.web.http import server
    from tracker.worker.scheduler import Worker

    if callbacks_only:
        places = [
            server.Place(host=host, port=port, build=app.build_callbacks_app, is_open=True),
        ]
    elif callbacks_port is not None:
        places = [
            server.Place(host=host, port=port, build=app.build_private_app),
            server.Place(
                host=callbacks_host or host,
                port=callbacks_port,
                build=app.build_callbacks_app,
                is_open=True,
            ),
        ]
    else:
        places = [server.Place(host=host, port=port, build=app.build_app)]
    return server.serve(
        rotation.settings, _opened(rotation), *places, worker=None if no_worker else Worker
    )


def worker(
    host: Annotated[str, typer.Option(help="Address for --port.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Serve /healthz and /metrics on this port.", min=0, max=65535)
    ] = None,
) -> int:
    """Poll what is due and sweep the history, without receiving.

    Any number may run against one PostgreSQL.
    """
    _ignore_hangups()
    rotation = prepare_service()
    from tracker.cli.heap import share_the_heap

    share_the_heap()
    from tracker.web.app import build_health_app
    from tracker.web.http import server
    from tracker.worker import scheduler as process
    from tracker.worker.scheduler import Worker

    if port is None:
        return process.run(_opened(rotation))
    place = server.Place(host=host, port=port, build=build_health_app)
    return server.serve(rotation.settings, _opened(rotation), place, worker=Worker)


def _ignore_hangups() -> None:
    """Let SIGHUP, which asks for a reload, not end a service that still starts."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _opened(rotation: "Rotation") -> "Callable[[], AbstractAsyncContextManager[Services]]":
    """Opens the services, and keeps their secrets up to date until they are closed."""
    from tracker.services import open_services

    @asynccontextmanager
    async def opened() -> "AsyncIterator[Services]":
        async with rotation.watched(), open_services(rotation, background=True) as services:
            yield services

    return opened
