"""A local FLORA for the examples, and what it bills."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.docs.pages import ROOT
from tests.e2e.processes import Sandbox, open_sandbox

EXAMPLES: Final = ROOT / "examples"
SOON: Final = {"TRACKER_CALLBACK_GRACE": "0.5", "TRACKER_POLL_INTERVAL": "0.2"}


@pytest.fixture
async def sandbox(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sandbox]:
    """A sandbox on the database that the test's parameter names."""
    url = request.getfixturevalue(request.node.callspec.params["database"])
    async with open_sandbox(tmp_path, url) as opened:
        yield opened


async def simulate(sandbox: Sandbox, *, drop: str, run_seconds: int = 1) -> None:
    """A FLORA whose runs complete after so many seconds."""
    await sandbox.simulate("--run-seconds", f"{run_seconds}", "--failures", "0", "--drop", drop)


async def paid(sandbox: Sandbox) -> list[dict[str, Any]]:
    """What FLORA bills."""
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        answer = await client.get(f"{sandbox.simulator}/simulator/bills")
    return answer.json()["bills"]  # type: ignore[no-any-return]
