"""`tracker serve --simulate`: its database, its addresses, and the commands for a first try."""

import os
import shlex
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import typer

from tracker.core.errors import SettingsError
from tracker.core.net import is_loopback, is_loopback_url
from tracker.services import Services, open_services
from tracker.settings import Settings, load_settings, read_settings
from tracker.simulator import Options, Simulator, running
from tracker.store.url import DatabaseUrl

FLORA: Final = Options(seed=1, run_seconds=5, failures=0.1)
"""Runs of some seconds, of which few fail."""
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


@contextmanager
def simulation(
    settings: Settings, dashboard: tuple[str, int], callbacks: tuple[str, int]
) -> Iterator[tuple[Settings, Callable[[], AbstractAsyncContextManager[Services]]]]:
    """The settings to serve with, and what opens the services with their local FLORA.

    The database is a temporary file, unless the settings name one. `dashboard` and `callbacks` are
    hosts and ports. Raises `SettingsError` where a key of the real FLORA is set.
    """
    _check_apart(settings)
    with TemporaryDirectory(prefix="tracker-simulate-") as folder:
        changes = {"tracker_public_url": _url(*callbacks)}
        if is_temporary := "TRACKER_DATABASE_URL" not in read_settings().sources:
            changes["tracker_database_url"] = f"sqlite:///{folder}/tracker.db"
        settings = settings.model_copy(update=changes)
        database = DatabaseUrl.parse(settings.tracker_database_url)

        def print_hints(simulator: Simulator) -> None:
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

        yield settings, lambda: _opened(settings, print_hints)


def _check_apart(settings: Settings) -> None:
    """Raise `SettingsError` where a key of the real FLORA is set.

    Its runs and those of the local FLORA must not get into one database.
    """
    real = any(one.api_key for one in settings.all_workspaces)
    if settings.workspaces or (real and not is_loopback_url(settings.flora_base_url)):
        raise SettingsError(
            f"an API key is set for {settings.flora_base_url}, and --simulate would mix its runs "
            "with those of the local FLORA: unset FLORA_API_KEY and TRACKER_CONFIG for it"
        )


@asynccontextmanager
async def _opened(
    settings: Settings, on_ready: Callable[[Simulator], None]
) -> AsyncIterator[Services]:
    """A local FLORA, and the services that use it; `on_ready` is called once both are open."""
    async with running(FLORA) as simulator:
        local = load_settings(simulator.environment)
        names = map(str.lower, simulator.environment)
        own = settings.model_copy(update={name: getattr(local, name) for name in names})
        async with open_services(own, background=True) as services:
            on_ready(simulator)
            yield services


def _url(host: str, port: int) -> str:
    """Where this machine reaches what is bound to `host`."""
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
