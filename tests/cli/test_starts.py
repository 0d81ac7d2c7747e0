"""`tracker starts`, and starts that are resolved by cron alone, as processes."""

import json
import time
from contextlib import ExitStack
from functools import partial

from tests.cli.conftest import Commands, set_faults, simulate
from tests.e2e.short_waits import shorten_searches
from tests.support.clocks import PassedTime
from tracker import services as wiring


def started(tracker: Commands, key: str) -> tuple[str, ...]:
    """A start of an icon under that key."""
    return ("runs", "start", "icon-pack", "--input", f"prompt={key}", "--idempotency-key", key)


def give_up_soon() -> None:
    """`START_SECONDS` pass only while a caller waits for what is in doubt, and take no time."""
    assert 1 < wiring.START_SECONDS < wiring.CALLER_SECONDS < 30
    passed = PassedTime()
    wiring.Starter = partial(wiring.Starter, sleep=passed.sleep, monotonic=passed)  # type: ignore


def test_cron_alone_resolves_starts(tracker: Commands, stack: ExitStack) -> None:
    """`tracker poll` and `tracker reconcile`, no worker: what reached nobody is started, once; what
    is left to a person is listed, shown and resolved."""
    for_a_while = ("--set", "gateway_starts=1", "--set", "gateway_works=0")
    simulate(tracker, stack, *for_a_while, "--failures", "0%")
    tracker.environ["TRACKER_START_DOUBT"] = "1"
    for key in "ab":
        done = tracker(*started(tracker, key), prepare=give_up_soon)
        assert (done.returncode, done.stdout) == (1, "")
        assert "its outcome is not known yet" in done.stderr

    listed = tracker.json("starts", "list")["starts"]
    assert {(one["idempotency_key"], one["state"], one["started_by"]) for one in listed} == {
        ("a", "in_doubt", "cli"),
        ("b", "in_doubt", "cli"),
    }
    assert "in_doubt" in tracker("starts", "list").stdout
    time.sleep(1.1)  # longer than `TRACKER_START_DOUBT`: one poll and one sweep have to be enough
    set_faults(tracker, gateway_starts=0)
    tracker("poll")
    tracker("reconcile")
    assert tracker.json("starts", "list")["starts"] == []
    for key in "ab":
        start = tracker.json("starts", "show", key)
        assert start["state"] == "started"
        again = tracker.json(*started(tracker, key))
        assert again["run_id"] == start["run_id"]
        assert again["inputs"] == [{"id": "prompt", "type": "text", "value": key}]
    assert len({one["run_id"] for one in tracker.json("runs", "list")["runs"]}) == 2


def test_what_a_person_compares(tracker: Commands, stack: ExitStack) -> None:
    """The runs that a start may have become, until another start is said to have become them."""
    simulate(tracker, stack, "--set", "lost_starts=1", "--set", "keys_released=true")
    tracker.environ["TRACKER_START_DOUBT"] = "1"
    for key in "abc":
        if key == "c":
            set_faults(tracker, lost_starts=0, gateway_starts=1, gateway_works=0)
        assert tracker(*started(tracker, key), prepare=give_up_soon).returncode == 1
    assert "one of these runs" not in tracker("starts", "show", "a").stdout
    time.sleep(2.1)  # longer than `TRACKER_START_DOUBT`, and than a run takes to be listed
    set_faults(tracker, gateway_starts=0)
    tracker("reconcile", prepare=shorten_searches)
    runs = [one["run_id"] for one in tracker.json("runs", "list")["runs"]]
    assert len(runs) == 2
    for key in "abc":
        shown = tracker.json("starts", "show", key)
        assert (shown["state"], shown["possible_runs"]) == ("in_doubt", sorted(runs))
        assert "possible" not in shown["error"]
    for key, left in (("a", runs), ("b", runs[1:])):
        shown = tracker("starts", "show", key).stdout
        table = shown.partition("became one of these runs, or none")[2]
        assert {run_id for run_id in runs if run_id in table} == {*left}
        assert table.count("prj_simulator") == len(left)
        assert f"tracker starts resolve {key} --run RUN_ID" in table
        assert "a person has to decide from 20" in table
        tracker("starts", "resolve", "a", "--run", runs[0])
    unknown = tracker("starts", "resolve", "b", "--run", "run_nobody")
    assert unknown.returncode == 1  # as of `runs show`: the usage is right
    assert "FLORA has no run run_nobody" in unknown.stderr
    done = tracker.json("starts", "exclude", runs[1])["starts"]
    assert sorted(one["idempotency_key"] for one in done) == ["b", "c"]
    assert "FLORA started nothing for it" in tracker("starts", "show", "c").stdout
    wrong = tracker("starts", "exclude", runs[1])
    assert wrong.returncode == 2
    assert f"may have become run {runs[1]}" in wrong.stderr


def test_what_can_be_said_of_a_start(tracker: Commands, stack: ExitStack) -> None:
    """One of --run and --none, and of a start whose outcome is not known."""
    simulate(tracker, stack, "--failures", "0%")
    run = tracker.json(*started(tracker, "a"))
    for status, arguments, said in (
        (2, ("resolve", "a"), "give one of --run RUN_ID and --none"),
        (2, ("resolve", "a", "--none", "--run", "run_1"), "give one of"),
        (2, ("resolve", "a", "--none"), "is known: started"),
        (1, ("show", "nobody"), "no start with idempotency key 'nobody'"),
        (2, ("list", "--state", "lost"), "'lost' is not a state"),
    ):
        done = tracker("starts", *arguments)
        assert done.returncode == status, done.stderr
        assert said in done.stderr
    shown = tracker("starts", "show", "a").stdout
    assert run["run_id"] in shown
    assert json.loads(tracker("starts", "show", "a", "--json").stdout)["error"] is None
