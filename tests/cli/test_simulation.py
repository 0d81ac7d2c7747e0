"""`tracker serve --simulate`: one command for a first try, and nothing for the real FLORA."""

import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Commands
from tests.cli.test_usage import one_line
from tests.support.forked import ForkedPython
from tests.support.waiting import NO_SWEEPS, free_port


@pytest.fixture
def tracker(new_tracker: Commands) -> Commands:
    """The command line where no database is yet."""
    return new_tracker


def shown(process: ForkedPython) -> str:
    """What the command prints before it serves."""
    lines = iter(process.stdout.readline, "")
    text = ""
    for line in lines:
        text += line
        if line.startswith("Ctrl-C"):
            return text
    raise AssertionError(text)


def test_a_first_try_is_one_command(tracker: Commands) -> None:
    """What it prints is pasted into another terminal: the run ends, its callback arrives, and the
    dashboard shows it. Ctrl-C ends both, and nothing is left behind."""
    environ = {"TRACKER_RECONCILE_CRON": NO_SWEEPS}
    with tracker.running("serve", "--simulate", "--port", str(free_port()), **environ) as server:
        text = shown(server)
        start = next(line for line in text.splitlines() if "runs start" in line)
        exports = "\n".join(re.findall(r"^export .*$", text, re.MULTILINE))
        done = subprocess.run(
            ["bash", "-ec", f"{exports}\n{start}"],
            check=False,
            cwd=tracker.folder,
            env=tracker.essential,
            capture_output=True,
            text=True,
            timeout=40,
        )
        assert done.returncode == 0, done.stderr
        fields = dict(re.findall(r"^(\w+) +(.*)$", done.stdout, re.MULTILINE))
        assert (fields["tracking"], fields["status"]) == ("settled", "completed")
        assert "callback_at" in fields
        (address,) = re.findall(r"^Dashboard: (.*)$", text, re.MULTILINE)
        assert fields["run_id"] in httpx.get(f"{address}/runs").text
        (folder,) = re.findall(r"sqlite:///(.*)/tracker\.db, removed at the end", text)
        assert Path(folder).is_dir()
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=15)
        assert server.returncode == 0
        assert not Path(folder).exists()


def test_a_database_that_is_set_is_kept(tracker: Commands) -> None:
    """With TRACKER_DATABASE_URL the runs stay, and the line to paste has the whole path."""
    environ = {"TRACKER_DATABASE_URL": "sqlite:///mine.db"}
    with tracker.running("serve", "--simulate", "--port", str(free_port()), **environ) as server:
        assert f"export TRACKER_DATABASE_URL=sqlite:///{tracker.folder}/mine.db" in shown(server)
    assert (tracker.folder / "mine.db").exists()


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_real_key_is_refused(tracker: Commands, place: str) -> None:
    """Where the real FLORA could be meant, nothing is started, and the key is not shown."""
    environ = {"FLORA_API_KEY": "sk_live_real"}
    if place == "file":
        config = tracker.folder / "tracker.toml"
        config.write_text('[[workspaces]]\nid = "ws_1"\napi_key = "sk_live_real"\n')
        environ = {"TRACKER_CONFIG": str(config)}
    done = tracker("serve", "--simulate", "--port", str(free_port()), **environ)
    assert done.returncode == 2
    assert "unset FLORA_API_KEY and TRACKER_CONFIG" in one_line(done)
    assert "sk_live_real" not in done.stderr
    assert not (tracker.folder / "tracker.db").exists()
