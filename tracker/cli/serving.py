"""`tracker serve` and `tracker worker`: the processes that stay."""

from typing import TYPE_CHECKING, Annotated

import typer

from tracker.cli.errand import prepare

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from starlette.types import ASGIApp

    from tracker.wiring import Services


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
) -> int:
    """Receive callbacks and serve the API, with the worker in the same process.

    Any host that is not this machine alone needs TRACKER_API_TOKEN. A SQLite file is brought up to
    date first; PostgreSQL has to be, by `tracker db upgrade`.
    """
    settings = prepare()
    from tracker.cli.heap import share_the_heap

    share_the_heap()
    from tracker.web import server
    from tracker.wiring import open_services
    from tracker.worker.scheduler import Worker

    return server.serve(
        settings,
        lambda: open_services(settings, background=True),
        host=host,
        port=port,
        worker=None if no_worker else Worker,
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
    settings = prepare()
    from tracker.cli.heap import share_the_heap

    share_the_heap()
    from tracker.web import server
    from tracker.web.app import build_health_app
    from tracker.wiring import open_services
    from tracker.worker import process
    from tracker.worker.scheduler import Worker

    def opened() -> "AbstractAsyncContextManager[Services]":
        return open_services(settings, background=True)

    if port is None:
        return process.run(opened)
    build: Callable[[Services], ASGIApp] = build_health_app
    return server.serve(settings, opened, host=host, port=port, worker=Worker, build=build)
