"""`runs watch`, `runs explain` and `runs download` as real processes."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
import typer

from tests.cli.conftest import Commands, first_line, simulate
from tracker.cli.app import app
from tracker.cli.download import parse_size

START = ("runs", "start", "icon-pack", "--input", "prompt:text=tools")


@pytest.fixture
def quick(tracker: Commands, stack: ExitStack) -> Commands:
    """Commands beside a FLORA whose runs take a moment and never fail; nobody else polls."""
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "0%")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    return tracker


def settled_run(tracker: Commands) -> str:
    """A run that has ended and was read."""
    run: str = tracker.json(*START)["run_id"]
    while tracker.json("poll")["settled"] == 0:
        pass
    return run


def test_a_run_is_watched_and_explained(quick: Commands) -> None:
    """Nobody else polls, so the command does; it shows each change on stderr and ends with status,
    cost and outputs. Then it is explained."""
    run = quick.json(*START, "--idempotency-key", "k-7")["run_id"]
    done = quick("runs", "watch", run, run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$0.25") == 1
    assert done.stdout.count("/media/") == 4
    assert f"{run} completed, settled" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr

    lines = quick("runs", "watch", run, "--json-lines")
    [line] = [json.loads(line) for line in lines.stdout.splitlines()]
    assert (line["run_id"], line["status"], line["last_source"]) == (run, "completed", "poll")
    assert lines.stderr == ""

    story = quick("runs", "explain", run).stdout
    assert "stored with the idempotency key k-7" in story
    assert "A poll showed completed" in story
    assert story.rstrip().endswith("No further poll: the run is settled.")
    told = quick.json("runs", "explain", run)
    assert told["next_poll"]["why"] == "settled"
    assert {line["kind"] for line in told["story"]} >= {"start", "observation", "state", "next"}


def test_a_failed_run_is_status_1(tracker: Commands, stack: ExitStack) -> None:
    """The line says which run failed, and why; runs that nobody knows are named."""
    simulate(tracker, stack, "--run-seconds", "0.1", "--failures", "100%")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    run = settled_run(tracker)
    done = tracker("runs", "watch", run, "--json")
    assert done.returncode == 1
    [shown] = json.loads(done.stdout)["runs"]
    assert shown["status"] == "failed"
    error = ": ".join(filter(None, (shown["error_code"], shown["error_message"])))
    assert f"tracker: run {run} failed: {error}\n" in done.stderr
    missing = tracker("runs", "watch", run, "run_x", "run_y")
    assert missing.returncode == 1
    assert "run run_x, run_y are not known" in missing.stderr


def test_an_interrupt_leaves_the_run_tracked_and_says_so(
    tracker: Commands, stack: ExitStack
) -> None:
    """Ctrl-C is status 130, and the words tell how to go on."""
    simulate(tracker, stack, "--run-seconds", "600")
    arguments = (*START, "--wait", "--json")
    watching = stack.enter_context(tracker.running(*arguments, TRACKER_CALLBACK_GRACE="600"))
    line = first_line(watching)
    assert " pending " in line
    run = line.split()[0]
    again = stack.enter_context(tracker.running("runs", "watch", run))
    assert run in first_line(again)
    for process in (watching, again):
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=15)
        assert process.returncode == 130
        assert output == ""
        assert errors.splitlines()[-1] == (
            f"tracker: interrupted; run {run} stays tracked. "
            f"`tracker runs watch {run}` follows again"
        )


def test_a_terminal_shows_bars(quick: Commands) -> None:
    """On a terminal there is a bar for each run, and what was asked for stays clean on stdout."""
    run = settled_run(quick)
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tracker", "runs", "watch", run, "--json"],
        cwd=quick.folder,
        env={**quick._environ({}), "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
    )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 65536):
            shown += part
    except OSError:  # the process has ended, and with it the terminal
        pass
    output, _ = process.communicate(timeout=15)
    os.close(leader)
    assert process.returncode == 0
    assert json.loads(output)["runs"][0]["status"] == "completed"
    text = shown.decode()
    assert "\x1b[" in text
    assert "━" in text
    assert "completed" in text


def test_outputs_are_downloaded(quick: Commands) -> None:
    """Those of a local FLORA are there, once, with a manifest; otherwise, links to this machine are
    refused unless they are allowed."""
    run = quick.json(*START)["run_id"]
    early = quick("runs", "download", run)
    assert early.returncode == 1
    assert f"run {run} has not settled yet (pending): --watch waits for it" in early.stderr
    done = quick("runs", "download", run, "--watch", "--to", "out")
    assert done.returncode == 0, done.stderr
    away = {"FLORA_BASE_URL": "https://flora.test/api/v1"}
    refused = quick("runs", "download", run, **away)
    assert refused.returncode == 1
    assert refused.stderr.count("is not a public address (--allow-private") == 4
    assert "0 files downloaded to downloads (0 bytes), 4 downloads failed" in refused.stdout
    allowed = quick("runs", "download", run, "--allow-private", **away)
    assert allowed.stdout.startswith("4 files downloaded to downloads (")

    assert done.stdout.startswith("4 files downloaded to out (")
    folder = quick.folder / "out"
    assert len(list(folder.glob(f"{run}.*.png"))) == 4
    assert len((folder / "manifest.jsonl").read_text().splitlines()) == 4
    told = quick.json("runs", "download", "--all-settled", "--to", "out")
    assert {one["outcome"] for one in told["files"]} == {"present"}
    assert [one["position"] for one in told["files"]] == [0, 1, 2, 3]
    none = quick.json("runs", "download", "--all-settled", "--technique", "cctv-cam")
    assert none["files"] == []


def test_downloading_what_settles_goes_on_until_interrupted(
    quick: Commands, stack: ExitStack
) -> None:
    """A run that settles later is downloaded too; an interrupt reports what there is."""
    watching = stack.enter_context(quick.running("runs", "download", "--all-settled", "--watch"))
    run = settled_run(quick)
    lines = [watching.stderr.readline() for _ in range(4)]
    assert all(line.startswith(f"{run}.") for line in lines)
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=15)
    assert watching.returncode == 130
    assert "4 files downloaded" in errors
    assert "interrupted" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "give run ids, or --batch, or --all-settled"),
        ("run_1 --all-settled", "give run ids, or --batch, or --all-settled"),
        ("run_1 --technique t", "goes with --all-settled only"),
        ("run_1 --max-bytes lots", "'lots' is not a size"),
    ],
)
def test_wrong_usage_of_download_is_told(arguments: str, said: str) -> None:
    """Before anything is opened or made."""
    with pytest.raises(typer.BadParameter, match=said):
        app(["runs", "download", *arguments.split()], standalone_mode=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("2k", 2048), ("1.5 MiB", 1572864), ("2G", 2**31), ("3tb", 3 * 2**40), ("9 b", 9)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """Powers of 1024, with or without the B."""
    assert parse_size(text) == size


def test_batches_are_downloaded_by_row(quick: Commands) -> None:
    """Files begin with their row's number; an unknown batch is told."""
    (quick.folder / "sheet.csv").write_text("prompt\nhammer\nsaw\n")
    batch = quick.json("batch", "icon-pack", "sheet.csv")["batch"]["batch_id"]
    done = quick("runs", "download", "--batch", batch, "--watch")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (quick.folder / "downloads").glob("*.png"))
    assert [name[:8] for name in names] == ["001_icon"] * 4 + ["002_icon"] * 4
    unknown = quick("runs", "download", "--batch", "nope")
    assert unknown.returncode == 1
    assert "batch nope is not known" in unknown.stderr
