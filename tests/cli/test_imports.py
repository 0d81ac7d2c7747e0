"""What a command imports: needless imports slow down every call."""

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.store.upgrading import revisions as of_alembic
from tracker.store import migrate as revisions

FOR_HELP = """aiosqlite alembic apscheduler asyncpg httpx importlib.metadata jinja2 mako
    opentelemetry orjson prometheus_client pydantic rich sqlalchemy starlette uvicorn uvloop"""
FOR_A_SHORT_COMMAND = """alembic apscheduler asyncpg httpx jinja2 mako opentelemetry
    prometheus_client pygments starlette.routing tracker.operations.doctor
    tracker.operations.metrics tracker.services tracker.simulator tracker.web uvicorn uvloop"""


def loaded(*arguments: str, folder: Path, **environ: str) -> set[str]:
    """The modules that a command imports, from `-X importtime`."""
    return _imported("-m", "tracker", *arguments, folder=folder, **environ)


def _imported(*arguments: str, folder: Path, **environ: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """What a command needs is imported when it runs, so that `--help` and completion are quick."""
    found = loaded("--help", folder=tmp_path)
    assert "tracker.cli.app" in found
    assert found & set(FOR_HELP.split()) == set()


@pytest.mark.parametrize("command", ["runs list", "db current"])
def test_a_short_command_imports_what_it_uses(
    command: str, tmp_path: Path, sqlite_url: str
) -> None:
    """Neither server, worker, client nor metrics; no migrations where the schema is current."""
    found = loaded(*command.split(), folder=tmp_path, TRACKER_DATABASE_URL=sqlite_url)
    assert "sqlalchemy" in found
    assert found & set(FOR_A_SHORT_COMMAND.split()) == set()


@pytest.mark.parametrize("module", ["tracker", "tracker.sync"])
def test_the_library_imports_what_a_call_needs_when_it_is_made(module: str, tmp_path: Path) -> None:
    """A program that may start a run loads neither database, client nor settings until it does."""
    found = _imported("-c", f"from {module} import Tracker", folder=tmp_path)
    assert "tracker.library.reading" in found
    heavy = {*FOR_HELP.split(), "tracker.settings", "tracker.services", "tracker.store.engine"}
    assert found & (heavy - {"importlib.metadata", "orjson"}) == set()


def test_alembic_comes_where_there_is_something_to_migrate(tmp_path: Path) -> None:
    """A database that does not exist yet, or is behind, is brought up to date by it."""
    assert "alembic" in loaded("runs", "list", folder=tmp_path)
    with closing(sqlite3.connect(tmp_path / "tracker.db")) as file:
        found = file.execute("SELECT version_num FROM alembic_version").fetchall()
    assert found == [(revisions.head(),)]


def test_the_names_of_the_files_say_what_alembic_says() -> None:
    """The revisions, their order and the newest are the same, whoever is asked."""
    assert list(revisions.known()) == of_alembic()
