"""`tracker serve --simulate`: its database, its addresses, and the commands for a first try."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import typer

from tracker.core.net import is_loopback
from tracker.demo.simulation import check_apart, open_simulated
from tracker.services import Services
from tracker.settings import Settings, read_settings
from tracker.simulator import Simulator
from tracker.store.url import DatabaseUrl

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
    check_apart(settings)
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

        yield settings, lambda: open_simulated(settings, print_hints)


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
