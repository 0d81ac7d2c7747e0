"""Commands say what they wait for: FLORA's answer, a retry, or the pause that FLORA asked for."""

import re
import socket
from contextlib import ExitStack

import pytest

from tests.cli.conftest import Commands, first_line, set_faults, simulate
from tests.support.waiting import free_port

FACE = "face:imageUrl=https://example.com/a.png"
COMMANDS = {
    "techniques sync": "FLORA does not answer, retrying",
    "reconcile": "FLORA does not answer, retrying",
    "runs track run_1": "FLORA does not answer, retrying",
    f"runs start cctv-cam --wait --input {FACE}": "FLORA does not answer, retrying",
}


@pytest.fixture
def unreachable(tracker: Commands) -> Commands:
    """The command line, with a FLORA that refuses connections."""
    tracker.environ |= {
        "FLORA_API_KEY": "sk_test_x",
        "FLORA_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "FLORA_WORKSPACE_ID": "ws_1",
    }
    tracker("db", "upgrade")
    return tracker


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_counts_down_while_flora_is_unreachable(
    unreachable: Commands, command: str
) -> None:
    """The line appears at once, with the seconds that are left, and an interrupt ends the wait."""
    with unreachable.terminal(*command.split()) as shown:
        text = shown.read(until=COMMANDS[command])
        found = re.search(r"retrying \((\d+) s\) …", shown.read(until=" s) …"))
        assert found is not None, text
        assert int(found[1]) >= 2


def test_a_silent_flora_is_reported(unreachable: Commands) -> None:
    """A FLORA that takes the request and says nothing is waited for in words."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        unreachable.environ["FLORA_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        with unreachable.terminal("techniques", "sync") as shown:
            shown.read(until="Waiting for FLORA's answer (")


def test_a_pause_is_reported(tracker: Commands, stack: ExitStack) -> None:
    """A short wait that FLORA asks for is counted down on a terminal and is one line elsewhere; a
    longer one is an error that says until when, also where nothing was sent."""
    simulate(tracker, stack)

    set_faults(tracker, rate_limit=1, retry_after=3)
    with tracker.terminal("techniques", "sync") as shown:
        shown.read(until="FLORA asked for a pause, waiting (")
        set_faults(tracker, rate_limit=0, retry_after=3)
        assert "38 new" in shown.read()

    set_faults(tracker, rate_limit=1, retry_after=3)
    with tracker.running("techniques", "sync", TRACKER_LOG_LEVEL="error") as process:
        assert "tracker: FLORA asked for a pause, waiting for" in first_line(process)
        set_faults(tracker, rate_limit=0, retry_after=3)
        output, errors = process.communicate(timeout=40)
    assert "0 new" in output
    # A FLORA that stands still, when it is asked again or for more, is a cause of its own.
    causes = [line.partition(" for up to ")[0] for line in errors.splitlines()]
    stands_still = {"tracker: FLORA answers 429, retrying", "tracker: Waiting for FLORA's answer"}
    assert len(causes) == len(stands_still.intersection(causes))

    set_faults(tracker, rate_limit=1, retry_after=60)
    assert "FLORA answered 429" in tracker("techniques", "sync").stderr
    set_faults(tracker, rate_limit=0, retry_after=3)
    paused = tracker("techniques", "sync")
    assert paused.returncode == 1
    assert re.search(
        r"FLORA asked for a pause until \d\d:\d\d:\d\d UTC; nothing was sent", paused.stderr
    )
    assert "429" not in paused.stderr
