"""Commands say what they wait for: FLORA's answer, a retry, or the pause that FLORA asked for."""

import re
import socket
from contextlib import ExitStack

import httpx
import pytest

from tests.cli.conftest import Commands, first_line, simulate
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
    root = tracker.environ["FLORA_BASE_URL"].partition("/api")[0]

    def refuse(share: float, seconds: int) -> None:
        faults = {"rate_limit": share, "retry_after": seconds}
        httpx.post(f"{root}/simulator/faults", json=faults).raise_for_status()

    refuse(1, 3)
    with tracker.terminal("techniques", "sync") as shown:
        shown.read(until="FLORA asked for a pause, waiting (")
        refuse(0, 3)
        assert "38 new" in shown.read()

    refuse(1, 3)
    with tracker.running("techniques", "sync", TRACKER_LOG_LEVEL="error") as process:
        assert "tracker: FLORA asked for a pause, waiting for" in first_line(process)
        refuse(0, 3)
        output, errors = process.communicate(timeout=40)
    assert "0 new" in output
    # A FLORA that stands still when it is asked again is another cause.
    again = "tracker: FLORA answers 429, retrying for up to"
    assert [line for line in errors.splitlines() if not line.startswith(again)] == []

    refuse(1, 60)
    assert "FLORA answered 429" in tracker("techniques", "sync").stderr
    refuse(0, 3)
    paused = tracker("techniques", "sync")
    assert paused.returncode == 1
    assert re.search(
        r"FLORA asked for a pause until \d\d:\d\d:\d\d UTC; nothing was sent", paused.stderr
    )
    assert "429" not in paused.stderr
