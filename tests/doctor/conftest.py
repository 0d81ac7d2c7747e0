"""Fixtures: a FLORA, a deployment whose process is real, and the doctor's report on it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Commands
from tests.e2e.processes import Sandbox, open_sandbox
from tracker.operations.doctor import Finding, Level
from tracker.operations.doctor.examination import TimeLimits, examine
from tracker.settings import read_settings
from tracker.simulator import Options, Simulator, running


class Report(dict[str, Finding]):
    """The lines of a report by name."""

    def level(self, name: str) -> Level:
        """How bad it is."""
        return self[name].level

    @property
    def troubles(self) -> dict[str, str]:
        """All that is not ok."""
        return {one.name: one.seen for one in self.values() if one.level is not Level.OK}


Look = Callable[..., Awaitable[Report]]


async def look(limits: TimeLimits | None = None, **environ: str) -> Report:
    """The doctor's report on settings that come from these variables alone."""
    loaded = read_settings(environ)
    findings = await examine(loaded.settings, loaded.sources, loaded.unknown, limits=limits)
    for one in findings:
        assert (one.level is Level.OK) == (one.advice == ""), one
        assert one.seen.endswith((".", "…", "?")), one
    report = Report({one.name: one for one in findings})
    assert len(report) == len(findings)
    return report


@pytest.fixture
async def flora() -> AsyncIterator[Simulator]:
    """A local FLORA, over real HTTP."""
    async with running(Options(failures=0, run_seconds=0.1)) as simulator:
        yield simulator


@pytest.fixture
async def sandbox(tmp_path: Path, database_url: str, flora: Simulator) -> AsyncIterator[Sandbox]:
    """Where `tracker serve` is a real process, on each database."""
    async with open_sandbox(tmp_path, database_url) as one:
        one.simulator_port = int(flora.root.rpartition(":")[2])
        yield one


def with_flora(flora: Simulator, **environ: Any) -> dict[str, str]:
    """The variables for a FLORA, and others."""
    return {**flora.environment, **environ}


@pytest.fixture
def tracker(tmp_path: Path) -> Commands:
    """The command line, with nothing set."""
    return Commands(tmp_path)
