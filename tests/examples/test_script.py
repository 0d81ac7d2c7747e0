"""The script can be killed and repeated."""

import re
import signal

import pytest

from tests.e2e.processes import Sandbox
from tests.examples.conftest import EXAMPLES, SOON, paid, simulate
from tests.support.waiting import START_SECONDS, eventually


@pytest.mark.parametrize("database", ["postgres_url"])
async def test_the_script_is_killed_and_repeated(sandbox: Sandbox, database: str) -> None:
    """Killed after the start and repeated with the same order, the script ends with one run, its
    cost and its files, although every callback is lost; once more, it only shows them."""
    await simulate(sandbox, drop="1", run_seconds=5)
    command = (str(EXAMPLES / "script.py"), "order-17", "garden tools")
    killed = await sandbox.run(*command, **SOON)
    await eventually(lambda: "run_" in killed.log, timeout=START_SECONDS)
    assert await killed.kill() == -signal.SIGKILL
    shown = []
    for _ in range(2):
        again = await sandbox.run(*command, **SOON)
        assert await again.wait() == 0, again.log
        shown.append(again.log)
    (bill,) = await paid(sandbox)
    for log in shown:
        assert f"{bill['run_id']} cost {bill['bill']} USD" in log
        files = re.findall("^saved (.+)$", log, re.MULTILINE)
        assert files
        assert all((sandbox.directory / file).stat().st_size for file in files)
