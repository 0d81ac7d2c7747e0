"""The commands at work, against the simulator and both databases."""

import asyncio
import json
import signal
import sqlite3
import time
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Commands, first_line, set_faults, simulate
from tests.support.waiting import NO_SWEEPS, START_SECONDS, eventually, free_port
from tracker.store import migrate

FACE = "face=https://example.com/a.png?x=1"


def until_due(tracker: Commands, run_id: str) -> None:
    """Wait until a run is to be polled: a command may be quicker than that."""
    due = datetime.fromisoformat(tracker.json("runs", "show", run_id)["next_check_at"])
    time.sleep(max((due - datetime.now(UTC)).total_seconds(), 0))


def test_one_shot_commands_do_the_whole_job(new_tracker: Commands, stack: ExitStack) -> None:
    """Without any server: started once, found, polled, settled, listed and shown."""
    simulate(new_tracker, stack, "--run-seconds", "0.2", "--failures", "0%")
    new_tracker.environ["TRACKER_POLL_INTERVAL"] = "0.4"

    start = ("runs", "start", "cctv-cam", "--input", FACE, "--idempotency-key", "k1")
    run = new_tracker.json(*start)
    assert run["inputs"] == [
        {"id": "face", "type": "imageUrl", "value": "https://example.com/a.png?x=1"}
    ]
    again = new_tracker(*start, "--json")
    assert json.loads(again.stdout)["run_id"] == run["run_id"]
    assert "started with this key before" in again.stderr

    until_due(new_tracker, run["run_id"])
    polled = new_tracker("poll")
    assert polled.stdout.splitlines()[-1].split() == ["1", "0", "1", "1", "0"], polled.stdout

    key = {"Authorization": f"Bearer {new_tracker.environ['FLORA_API_KEY']}"}
    begun = httpx.post(
        f"{new_tracker.environ['FLORA_BASE_URL']}/techniques/icon-pack/runs",
        json={"inputs": [{"id": "prompt", "type": "text", "value": "x"}], "mode": "async"},
        headers=key,
    ).json()
    elsewhere = begun["run_id"]
    while httpx.get(begun["poll_url"], headers=key).json()["status"] != "completed":
        time.sleep(0.05)
    (sweep,) = new_tracker.json("reconcile", "--since", "1h")["sweeps"]
    assert (sweep["items"], sweep["discovered"], sweep["error"]) == (2, 1, None)

    tracked = new_tracker("runs", "track", elsewhere, "--json")
    assert json.loads(tracked.stdout)["run_id"] == elsewhere
    assert "tracked already" in tracked.stderr

    listed = new_tracker.json("runs", "list")
    assert [one["run_id"] for one in listed["runs"]] == [elsewhere, run["run_id"]]
    assert {one["tracking"] for one in listed["runs"]} == {"settled"}
    for technique in ("cctv-cam", "tech_cctv-cam"):
        of_one = new_tracker.json("runs", "list", "--technique", technique)
        assert of_one["runs"] == listed["runs"][1:]
    page = new_tracker("runs", "list", "--limit", "1")
    assert elsewhere in page.stdout
    assert run["run_id"] not in page.stdout
    assert "  $0." in page.stdout
    assert "--cursor" in page.stderr

    shown = new_tracker.json("runs", "show", run["run_id"])
    assert shown == listed["runs"][1]
    assert shown["charged_cost"] == 0.15
    assert shown["outputs"][0]["url"].startswith("http://127.0.0.1")
    assert shown["outputs"][0]["url"] in new_tracker("runs", "show", run["run_id"]).stdout


def test_starts_tell_what_is_wrong_with_them(tracker: Commands, stack: ExitStack) -> None:
    """What does not fit the technique is status 2, FLORA's own refusal 1; each names the fields."""
    simulate(tracker, stack)
    for status, arguments, said in (
        (1, ("nonesuch", "--input", "a=b"), "404 not_found"),
        (2, ("cctv-cam", "--input", "nose=x"), "no input 'nose' (it has face); inputs.face: is"),
        (
            2,
            ("wireframe", "--input", "photo:imageUrl=no link"),
            "technique wireframe: photo must be",
        ),
        (2, ("book-drop", "--input", "title=Dune"), "inputs.manuscript: is required, and is doc"),
        # This input takes the id of an element too, so that only FLORA can tell.
        (1, ("cctv-cam", "--input", "face=no link"), "inputs[0].value: must be an http"),
        (2, ("cctv-cam", "--input", FACE, "--workspace", "ws_x"), "ws_x is not configured"),
        # A variable of a script that is not set.
        (2, ("cctv-cam", "--input", FACE, "--workspace", ""), "--workspace': must not be empty"),
        (2, ("cctv-cam", "--input", FACE, "--idempotency-key", ""), "key: must be 1 to 255"),
    ):
        done = tracker("runs", "start", *arguments)
        assert done.returncode == status, done.stderr
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr


def test_a_named_workspace_is_the_keys_own_or_nothing_is_started(
    tracker: Commands, stack: ExitStack, tmp_path: Path
) -> None:
    """Also where FLORA_WORKSPACE_ID is not set, and nothing has learnt the id yet."""
    simulate(tracker, stack)
    tracker.environ["FLORA_WORKSPACE_ID"] = ""
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("face\nhttps://example.com/a.png\n")
    for command in (
        ("runs", "start", "cctv-cam", "--input", FACE),
        ("batch", "cctv-cam", str(sheet), "--yes", "--no-wait"),
        ("runs", "track", "run_1"),
    ):
        done = tracker(*command, "--workspace", "ws_x")
        assert done.returncode == 2, done.stderr
        assert done.stderr == "tracker: workspace ws_x is not configured here\n"
    assert tracker.json("runs", "list")["runs"] == []


def test_a_refused_key_is_status_1(tracker: Commands, stack: ExitStack) -> None:
    """Whatever asks FLORA says that the key is refused, and the due run stays due."""
    simulate(tracker, stack)
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    run = tracker.json("runs", "start", "cctv-cam", "--input", FACE)
    until_due(tracker, run["run_id"])
    tracker.environ["FLORA_API_KEY"] = "sk_test_revoked"
    for command in ("poll", "reconcile"):
        done = tracker(command, "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)
        assert "401" in done.stderr.splitlines()[-1]
        assert "sk_test_revoked" not in done.stderr
    (run,) = tracker.json("runs", "list", "--tracking", "active")["runs"]
    assert run["next_check_at"] is not None


def test_waiting_ends_with_the_run(tracker: Commands, stack: ExitStack) -> None:
    """`serve` takes the callback, `runs start --wait` follows: 0 for a completed run, else 1."""
    simulate(tracker, stack, "--run-seconds", "0.3", "--failures", "50%", "--seed", "2")
    _serve(tracker, stack)
    asyncio.run(eventually(lambda: _count(tracker, "sweeps WHERE finished_at IS NOT NULL")))
    seen = []
    for _ in range(2):
        done = tracker("runs", "start", "cctv-cam", "--input", FACE, "--wait", "--json")
        run = json.loads(done.stdout)
        assert run["tracking"] == "settled"
        assert run["callback_at"] is not None
        assert done.returncode == (0 if run["status"] == "completed" else 1)
        if done.returncode == 1:
            assert f"run {run['run_id']} failed: {run['error_code']}" in done.stderr
        seen.append(run["status"])
    assert sorted(seen) == ["completed", "failed"]


def _wait_for(url: str) -> None:
    """Wait until `url` answers 200."""

    def answers() -> bool:
        try:
            return httpx.get(url, timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    asyncio.run(eventually(answers, timeout=START_SECONDS))


def test_waiting_works_without_a_server(tracker: Commands, stack: ExitStack) -> None:
    """Where nobody else polls, `--wait` does; an interrupt ends it with status 130."""
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "0%")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    done = tracker("runs", "start", "cctv-cam", "--input", FACE, "--wait", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["ended_via"] == "poll"


def test_an_interrupt_is_status_130(tracker: Commands, stack: ExitStack) -> None:
    """Ctrl-C while waiting leaves no traceback, and the run stays tracked."""
    simulate(tracker, stack, "--run-seconds", "600")
    arguments = ("runs", "start", "cctv-cam", "--input", FACE, "--wait")
    waiting = stack.enter_context(tracker.running(*arguments))
    assert " pending " in first_line(waiting)
    waiting.send_signal(signal.SIGINT)
    output, errors = waiting.communicate(timeout=15)
    assert waiting.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
    assert _count(tracker, "runs") == 1


def _count(tracker: Commands, rows: str) -> int:
    """How many such rows the database has."""
    with closing(sqlite3.connect(tracker.folder / "tracker.db")) as database:
        (count,) = database.execute(f"SELECT count(*) FROM {rows}").fetchone()
    return int(count)


def test_the_schema_is_brought_up_to_date(new_tracker: Commands) -> None:
    """On SQLite `db upgrade` goes from nothing to the newest migration, once."""
    at = new_tracker.json("db", "current")
    assert at["current"] is None
    assert new_tracker.json("db", "upgrade") == {"before": None, "current": at["newest"]}
    assert new_tracker("db", "current").stdout.split() == [
        *("current", at["newest"]),
        *("newest", at["newest"]),
    ]
    assert "already" in new_tracker("db", "upgrade").stdout


def test_postgresql_is_migrated_only_when_told(tracker: Commands, empty_postgres_url: str) -> None:
    """On an old schema the services refuse and say which command helps."""
    tracker.environ["TRACKER_DATABASE_URL"] = empty_postgres_url
    for command in (["runs", "list"], ["serve", "--port", "0"]):
        done = tracker(*command)
        assert done.returncode == 1
        assert "tracker db upgrade" in done.stderr
        assert "Traceback" not in done.stderr
    tracker.json("db", "upgrade")
    assert tracker.json("runs", "list") == {"runs": [], "meta": {"next_cursor": None}}


@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        ("0009", "run `tracker reconcile --since 1d` and `tracker db recount`"),
        ("0019", "run `tracker db recount`"),
        ("0020", None),
    ],
)
def test_an_upgrade_says_what_is_to_be_run_after_it(
    new_tracker: Commands, before: str, wanted: str | None
) -> None:
    """Where older processes, which go on meanwhile, do not count for the new schema."""
    asyncio.run(migrate.upgrade(f"sqlite:///{new_tracker.folder}/tracker.db", before))
    done = new_tracker("db", "upgrade")
    assert done.returncode == 0
    assert (wanted in done.stderr) if wanted else (done.stderr == "")


def test_a_worker_serves_its_health(tracker: Commands, stack: ExitStack) -> None:
    """`worker --port` answers /healthz and nothing of the API, and stops when told."""
    port = free_port()
    worker = stack.enter_context(tracker.running("worker", "--port", str(port)))
    _wait_for(f"http://127.0.0.1:{port}/healthz")
    assert httpx.get(f"http://127.0.0.1:{port}/api/runs").status_code == 404
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=15)
    assert worker.returncode == 0


def test_verify_tells_what_is_missing(tracker: Commands, stack: ExitStack) -> None:
    """Before the first sweep every run of the history is missing: status 1, as a table and as JSON;
    after it there is nothing to tell. A page that cannot be read is status 1 for both commands."""
    preset = ("--set", "history=3", "--set", "history_seconds=86400")
    simulate(tracker, stack, "--failures", "0%", *preset)
    tracker("db", "upgrade")
    shown, printed = tracker("verify", "--since", "7d"), tracker("verify", "--json")
    assert (shown.returncode, printed.returncode) == (1, 1)
    assert shown.stdout.count("missing") == 3
    assert "3 runs compared, 3 differences" in shown.stderr
    (found,) = json.loads(printed.stdout)["workspaces"]
    assert (found["ok"], found["compared"], len(found["differences"])) == (False, 3, 3)
    spoilt = found["differences"][0]["run_id"]

    (swept,) = tracker.json("reconcile")["sweeps"]
    assert (swept["discovered"], swept["gaps"], swept["generations_error"]) == (3, [], None)
    (same,) = tracker.json("verify")["workspaces"]
    assert (same["ok"], same["differences"], same["compared"]) == (True, [], 3)

    set_faults(tracker, bad_runs=[spoilt])
    again = tracker("reconcile", "--since", "7d")
    assert (again.returncode, tracker("verify").returncode) == (1, 1)
    assert "incomplete" in again.stdout
    assert "could not read technique runs created from" in again.stderr


def test_a_second_service_on_one_sqlite_file_warns(tracker: Commands, stack: ExitStack) -> None:
    """SQLite carries one long-running process, and one-shots beside it. A second service works, and
    says so; once the first has ended, however it did, there is nothing to say."""
    port = free_port()
    first = stack.enter_context(tracker.running("worker", "--port", str(port)))
    _wait_for(f"http://127.0.0.1:{port}/healthz")
    assert "database.shared" in _log_of_a_worker(tracker, stack)
    assert "database.shared" not in tracker("runs", "list").stderr
    first.send_signal(signal.SIGKILL)
    assert "database.shared" not in first.communicate(timeout=15)[1]
    assert "database.shared" not in _log_of_a_worker(tracker, stack)


def _log_of_a_worker(tracker: Commands, stack: ExitStack) -> str:
    """What a worker logs from its start to its end."""
    port = free_port()
    worker = stack.enter_context(tracker.running("worker", "--port", str(port)))
    _wait_for(f"http://127.0.0.1:{port}/healthz")
    worker.send_signal(signal.SIGTERM)
    return str(worker.communicate(timeout=30)[1])


def test_all_runs_of_a_start_are_waited_for(tracker: Commands, stack: ExitStack) -> None:
    """Those that FLORA's answer does not name, too; the first run is printed as it always was."""
    simulate(tracker, stack, "--run-seconds", "0.5", "--failures", "0%")
    set_faults(tracker, run_per_value=True)
    _serve(tracker, stack)
    values = [f"image=https://a.example/{name}.png" for name in "abc"]
    inputs = [f"--input={value}" for value in (*values, "reference=https://a.example/r.png")]
    start = ("runs", "start", "color-transfer", "--wait", "--idempotency-key", "order-1")
    done = tracker(*start, *inputs, "--json")
    assert done.returncode == 0, done.stderr
    assert "further" not in done.stderr
    first = json.loads(done.stdout)
    runs = [first, *first.pop("further_runs")]
    assert {run["tracking"] for run in runs} == {"settled"}
    stored = tracker.json("runs", "list")["runs"]
    assert sorted(run["run_id"] for run in runs) == sorted(run["run_id"] for run in stored)
    assert len(runs) == 3
    text = tracker(*start, inputs[-1], *inputs[:-1]).stdout  # their order makes no other request
    assert all(run["run_id"] in text for run in runs)


def test_a_wait_says_that_callbacks_of_further_runs_are_missing(
    tracker: Commands, stack: ExitStack
) -> None:
    """While it waits for them; and at once where no callback can come, after the run."""
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "0%", "--drop", "100%")
    set_faults(tracker, run_per_value=True)
    tracker.environ |= {"TRACKER_POLL_INTERVAL": "0.1", "TRACKER_CALLBACK_GRACE": "0.1"}
    inputs = [f"--input=image=https://a.example/{name}.png" for name in "abc"]
    inputs.append("--input=reference=https://a.example/r.png")
    start = ("runs", "start", "color-transfer", *inputs, "--wait")
    done = tracker(*start)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "tracker: there may be 2 further runs of this start, which only callbacks to "
        "TRACKER_PUBLIC_URL name"
    )
    _serve(tracker, stack)
    waiting = stack.enter_context(tracker.running(*start))
    line = ""
    while "waiting" not in line:
        line = waiting.stderr.readline()
        assert line
    assert line == "tracker: waiting up to two minutes for callbacks that name further runs\n"
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=30)
    assert waiting.returncode == 130


def _serve(tracker: Commands, stack: ExitStack) -> None:
    """A server that FLORA's callbacks reach."""
    port = free_port()
    tracker.environ["TRACKER_PUBLIC_URL"] = f"http://127.0.0.1:{port}"
    tracker.environ["TRACKER_RECONCILE_CRON"] = NO_SWEEPS
    server = stack.enter_context(tracker.running("serve", "--port", str(port)))
    assert server.returncode is None
    _wait_for(f"http://127.0.0.1:{port}/readyz")
