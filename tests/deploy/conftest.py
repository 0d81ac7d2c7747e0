"""Fixtures: promtool, and the metrics that there are.

Where promtool is not installed its tests are left out, unless TRACKER_REQUIRE_PROMTOOL is set.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tracker.services import open_services
from tracker.settings import Settings

ROOT = Path(__file__).parents[2]
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}

Promtool = Callable[..., str]


@pytest.fixture(scope="session")
def promtool() -> Promtool:
    """Runs promtool with arguments, and gives what it says; fails the test where it fails."""
    path = shutil.which("promtool")
    if path is None:
        if os.environ.get("TRACKER_REQUIRE_PROMTOOL"):
            pytest.fail("promtool is not installed, and TRACKER_REQUIRE_PROMTOOL is set")
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")

    def run(*arguments: str | Path, given: str | None = None) -> str:
        done = subprocess.run(
            [path, *arguments], input=given, capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return said

    return run


@pytest.fixture
async def exposed(sqlite_url: str) -> dict[str, str]:
    """All metrics of a process by name, each with its type."""
    settings = Settings(
        tracker_database_url=sqlite_url, flora_api_key="sk_test_1", flora_workspace_id="ws_1"
    )
    async with open_services(settings) as services:
        text = (await services.metrics.exposition())[0].decode()
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


@pytest.fixture
def series(exposed: dict[str, str]) -> set[str]:
    """The names of all series that a query may ask for."""
    return {name + suffix for name, kind in exposed.items() for suffix in SUFFIXES[kind]}


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names."""
    return set(re.findall(r"\b(?:tracker|process)_[a-z_]+", expression))
