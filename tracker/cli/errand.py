"""What every command does first: read the settings, set up the log, and open the services.

A one-shot command gives up where FLORA has not answered at all for `PATIENCE` seconds.
"""

import asyncio
import getpass
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import typer

from tracker.core.errors import FloraUnreachable
from tracker.core.plain import plain

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.settings import Rotation, Settings

T = TypeVar("T")

PATIENCE: Final = 28.0
"""A single call of a client gives up sooner; this bounds several of them."""


def prepare() -> "Settings":
    """The settings, with the log set up as they say. Raises `SettingsError`."""
    return prepare_service().settings


def prepare_service() -> "Rotation":
    """As `prepare`, for a process that stays: its secrets may be rotated while it runs."""
    from tracker.operations.logs import configure_logs, redact_also
    from tracker.settings import Rotation, read_settings

    loaded = read_settings()
    settings = loaded.settings
    configure_logs(
        format=settings.tracker_log_format,
        level=settings.tracker_log_level,
        secrets=settings.secret_values,
    )
    rotation = Rotation(settings, loaded, read_settings)
    rotation.follow(lambda rotated: redact_also(rotated.secret_values))
    return rotation


def run_once(
    work: Callable[["Services"], Awaitable[T]],
    *,
    needs_key: bool = False,
    concurrency: int | None = None,
    actor: str = "cli",
) -> T:
    """Open the services, do `work` with them, and close them again.

    The audit log has what is done as done by `actor`, a colon, and the user. `needs_key`: raises
    `SettingsError` where FLORA cannot be asked. `concurrency` goes before TRACKER_API_CONCURRENCY.
    """
    settings = prepare()
    if concurrency is not None:
        settings = settings.model_copy(update={"tracker_api_concurrency": concurrency})
    if needs_key:
        settings.require_api_key()

    async def errand() -> T:
        from tracker.services import open_services
        from tracker.store.queries.audit import Principal, acting

        with acting(Principal(name=f"{actor}:{_user()}")):
            async with open_services(settings) as services:
                return await work(services)

    return asyncio.run(errand())


def _user() -> str:
    """Who runs the command: the person behind `sudo -u tracker`, where there is one."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # in a container, a number without a name
        return str(os.getuid())


@asynccontextmanager
async def patience(services: "Services") -> AsyncIterator[None]:
    """Breaks off what is done inside where FLORA has not answered at all for `PATIENCE` seconds.

    Once it has answered, the client's own limits are enough. Raises `FloraUnreachable`.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:

            def look() -> None:
                if not _heard_from_flora(services):
                    limit.reschedule(loop.time())

            timer = loop.call_later(PATIENCE, look)
            try:
                yield
            finally:
                timer.cancel()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise FloraUnreachable(
            f"FLORA has not answered within {PATIENCE:g} s", may_have_acted=True, timed_out=True
        ) from error


def _heard_from_flora(services: "Services") -> bool:
    """Whether any answer has come: each one's `Date` tells how far apart the clocks are."""
    clients = [workspace.client for workspace in services.workspaces]
    return any(client is not None and client.clock_offset is not None for client in clients)


def note(message: str) -> None:
    """A line for the person who looks on; stdout is for what was asked for."""
    typer.echo(plain(message), err=True)
