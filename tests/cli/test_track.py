"""`tracker runs track` and `forget`: what FLORA does not know is not tracked for ever."""

from contextlib import ExitStack

import httpx
import pytest

from tests.cli.conftest import Commands, simulate
from tests.cli.test_usage import one_line

FACE = "face=https://example.com/a.png"


@pytest.fixture
def flora(tracker: Commands, stack: ExitStack) -> Commands:
    """The command line, with a simulated FLORA that has one run which nobody tracks."""
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "0%")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    return tracker


def elsewhere(tracker: Commands) -> str:
    """The id of a run that is started past the tracker."""
    answer = httpx.post(
        f"{tracker.environ['FLORA_BASE_URL']}/techniques/icon-pack/runs",
        json={"inputs": [{"id": "prompt", "type": "text", "value": "x"}], "mode": "async"},
        headers={"Authorization": f"Bearer {tracker.environ['FLORA_API_KEY']}"},
    )
    run_id: str = answer.json()["run_id"]
    return run_id


def test_only_a_run_that_flora_shows_is_tracked(flora: Commands) -> None:
    """A typo is refused and nothing is stored; a run that exists is stored as FLORA shows it."""
    run_id = elsewhere(flora)
    done = flora("runs", "track", "run_typo")
    assert done.returncode == 1
    assert "FLORA has no run run_typo in workspace ws_simulator" in one_line(done)
    assert "--force" in done.stderr
    assert flora("runs", "track", "run_x ", "--force").returncode == 2
    assert flora.json("runs", "list")["runs"] == []

    run = flora.json("runs", "track", run_id)
    assert (run["run_id"], run["source"], run["technique_id"]) == (
        run_id,
        "track",
        "tech_icon-pack",
    )
    assert flora.json("runs", "track", run_id)["source"] == "track"


def test_without_an_answer_only_force_tracks(flora: Commands) -> None:
    """A FLORA that refuses the key, or none at all, refuses a run too, unless it is forced."""
    for environ in ({"FLORA_API_KEY": "sk_test_wrong"}, {"FLORA_API_KEY": ""}):
        done = flora("runs", "track", "run_1", **environ)
        assert done.returncode == 1
        assert "FLORA cannot be asked about run run_1" in done.stderr
        assert "--force" in done.stderr
    assert flora.json("runs", "list")["runs"] == []
    forced = flora("runs", "track", "run_1", "--force", FLORA_API_KEY="")
    assert forced.returncode == 0
    assert [run["run_id"] for run in flora.json("runs", "list")["runs"]] == ["run_1"]


def test_a_run_that_flora_never_showed_is_forgotten(flora: Commands) -> None:
    """It is gone from the list, the audit log names it; an unknown run is status 1."""
    flora("runs", "track", "run_typo", "--force")
    assert "run_typo is not tracked any more" in flora("runs", "forget", "run_typo").stdout
    assert flora.json("runs", "list")["runs"] == []
    (entry,) = flora.json("audit", "list", "--action", "forget")["entries"]
    assert entry["detail"] == {"run_id": "run_typo"}
    again = flora("runs", "forget", "run_typo")
    assert again.returncode == 1
    assert "run run_typo is not tracked" in one_line(again)


def test_a_run_of_flora_is_forgotten_only_by_force(flora: Commands) -> None:
    """Without it nothing is removed; with it the run comes back with the history."""
    run = flora.json("runs", "start", "cctv-cam", "--input", FACE, "--wait")
    run_id, cost = run["run_id"], run["charged_cost"]
    done = flora("runs", "forget", run_id)
    assert done.returncode == 1
    assert "the next page of the history that shows it would track it again" in one_line(done)
    assert flora.json("runs", "show", run_id)["charged_cost"] == cost

    assert flora.json("runs", "forget", run_id, "--force")["forgotten"]["run_id"] == run_id
    assert flora("runs", "show", run_id).returncode == 1
    assert flora.json("spending", "--by", "technique")["spending"] == []
    flora.json("reconcile", "--since", "1h")
    assert flora.json("runs", "show", run_id)["charged_cost"] == cost
    (spent,) = flora.json("spending", "--by", "technique")["spending"]
    assert (spent["runs"], spent["charged"]) == (1, cost)
