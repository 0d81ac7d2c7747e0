"""`tracker db copy`: a move to another database, and a backup, from the command line."""

import asyncio
import json
from contextlib import ExitStack

import httpx
import pytest

from tests.cli.conftest import Commands, simulate
from tests.cli.test_usage import one_line
from tests.store.every_value import every_value, everything, fill
from tests.support.databases import Background
from tests.support.waiting import START_SECONDS, eventually, free_port

PASSWORD = "geheim+/%41"
QUOTED = "geheim%2B%2F%2541"


@pytest.fixture
def full(tracker: Commands, sqlite_url: str, background: Background) -> Commands:
    """The command line, with a `tracker.db` that has rows in every table."""
    background.run(fill(sqlite_url, every_value()))
    return tracker


def test_a_copy_is_told(full: Commands, postgres_url: str, background: Background) -> None:
    """What went where and how much, as JSON and as a table; how it goes, on stderr; and a second
    time that the target is not empty any more."""
    done = full("db", "copy", "--to", postgres_url, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["from"] == "sqlite:///tracker.db"
    assert told["to"] == postgres_url
    assert told["tables"] == dict.fromkeys(every_value(), 3)
    assert told["compared"] == 3 * len(every_value())
    assert not told["migrated"]
    assert "runs: 3 of 3 rows" in done.stderr.splitlines()
    refused = full("db", "copy", "--to", postgres_url)
    assert refused.returncode == 1
    assert one_line(refused).endswith("and was not touched: name an empty one\n")

    back = full("db", "copy", TRACKER_DATABASE_URL=postgres_url, TRACKER_COPY_TO="sqlite:///b.db")
    assert back.returncode == 0, back.stderr
    assert ["runs", "3"] in [line.split() for line in back.stdout.splitlines()]
    assert "`tracker reconcile`" in back.stderr
    copied = background.run(everything(f"sqlite:///{full.folder / 'b.db'}"))
    assert copied == background.run(everything(postgres_url))


@pytest.mark.parametrize(
    ("to", "status", "said"),
    [
        ("postgresql://u:{}@[h/d", 2, "--to must be sqlite:///FILE or postgresql://"),
        ("sqlite:///tracker.db", 2, "cannot be copied to itself"),
        ("postgresql://u:{}@127.0.0.1:{port}/d", 1, "--to postgresql://u:***@127.0.0.1"),
        ("postgresql://u@127.0.0.1:{port}/d?password={}", 1, "--to postgresql://u@127.0.0.1"),
        ("sqlite:////nowhere/b.db", 1, "--to sqlite:////nowhere/b.db: the database file cannot"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    to: str, status: int, said: str, tracker: Commands, sqlite_url: str
) -> None:
    """It says what is wrong, and shows no password."""
    done = tracker("db", "copy", "--to", to.format(QUOTED, port=free_port()))
    assert done.returncode == status
    assert said in one_line(done)
    assert "TRACKER_DATABASE_URL" not in done.stderr
    for secret in (PASSWORD, QUOTED, "geheim"):
        assert secret not in done.stdout + done.stderr


def test_an_error_names_what_the_database_came_from(tracker: Commands, sqlite_url: str) -> None:
    """The variable or the file of the source, and the variable of the target."""
    dead = f"postgresql://u:geheim@127.0.0.1:{free_port()}/d"
    (tracker.folder / "tracker.toml").write_text(f'tracker_database_url = "{dead}"')
    for environ, said in (
        ({"TRACKER_DATABASE_URL": dead}, "tracker: TRACKER_DATABASE_URL postgresql://u:***@"),
        (
            {"TRACKER_CONFIG": "tracker.toml"},
            "tracker: tracker_database_url in tracker.toml: postgresql://u:***@",
        ),
        ({"TRACKER_COPY_TO": dead}, "tracker: TRACKER_COPY_TO postgresql://u:***@"),
    ):
        to = () if "TRACKER_COPY_TO" in environ else ("--to", "sqlite:///b.db")
        done = tracker("db", "copy", *to, **environ)
        assert done.returncode == 1
        line = one_line(done)
        assert line.startswith(said)
        assert line.count("TRACKER_") <= 1
        assert "geheim" not in line


def test_a_run_that_ends_during_the_move_is_settled(
    tracker: Commands, stack: ExitStack, postgres_url: str, background: Background
) -> None:
    """Of what happens while nobody listens, nothing is lost: `tracker reconcile` on the target
    settles the run that ended and finds the one that someone else started, and a key that was used
    before starts nothing again."""
    simulate(tracker, stack, "--run-seconds", "0.5", "--failures", "0%")
    start = ("runs", "start", "icon-pack", "--input", "prompt=a cat")
    moved = tracker.json(*start, "--idempotency-key", "order-7")
    assert moved["tracking"] == "active"
    tracker.json("db", "copy", "--to", postgres_url)
    tracker.environ["TRACKER_DATABASE_URL"] = postgres_url
    root, key = tracker.environ["FLORA_BASE_URL"], tracker.environ["FLORA_API_KEY"]
    headers = {"Authorization": f"Bearer {key}"}
    flora = httpx.Client(headers=headers, trust_env=False, timeout=20)
    with flora:
        body = {"inputs": [{"id": "prompt", "type": "text", "value": "a dog"}], "mode": "async"}
        late = flora.post(f"{root}/techniques/icon-pack/runs", json=body).json()

        def ended() -> bool:
            runs = flora.get(f"{root.removesuffix('/api/v1')}/simulator/runs").json()["runs"]
            return {run["status"] for run in runs} == {"completed"}

        asyncio.run(eventually(ended))
    tracker.json("reconcile")
    runs = background.run(everything(postgres_url))["runs"]
    assert {run["run_id"]: run["source"] for run in runs} == {
        moved["run_id"]: "start",
        late["run_id"]: "history",
    }
    for run in runs:
        assert (run["status"], run["tracking"]) == ("completed", "settled")
        assert run["output_count"] > 0
    assert tracker.json(*start, "--idempotency-key", "order-7")["run_id"] == moved["run_id"]


def test_a_backup_can_be_restored(
    full: Commands, empty_postgres_url: str, background: Background
) -> None:
    """A copy that is made while the tracker serves is a whole database, which is copied back to
    where a server has been lost."""
    port = str(free_port())
    with full.running("serve", "--no-worker", "--port", port):

        def ready() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).is_success
            except httpx.TransportError:
                return False

        asyncio.run(eventually(ready, timeout=START_SECONDS))
        full.json("db", "copy", "--to", "sqlite:///backup.db")
    backup = f"sqlite:///{full.folder / 'backup.db'}"
    saved = background.run(everything(backup))
    # Rollups are compacted when it starts, and the clock keeps rows of its own beside the leases.
    counts = {name: len(rows) for name, rows in saved.items() if "tall" not in name}
    assert counts.pop("leases") >= 3
    assert counts == dict.fromkeys(counts, 3)
    full.json("db", "copy", "--to", empty_postgres_url, TRACKER_DATABASE_URL=backup)
    assert background.run(everything(empty_postgres_url)) == saved
