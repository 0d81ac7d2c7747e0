"""`tracker db prune`: old runs and bodies removed from the command line, and what is told then."""

import asyncio
from datetime import timedelta

import pytest

from tests.cli.conftest import Commands
from tests.cli.test_usage import one_line
from tests.store.making import callback, open_writer, quarantined, seen
from tracker.core.clock import utc_now
from tracker.core.run import Output, RunStatus
from tracker.store import migrate
from tracker.store.engine import Database

PRUNE = ("db", "prune", "--older-than", "90d")


async def _fill(url: str) -> None:
    """A run of each of two ages, with their callbacks, and a callback that nobody understood."""
    await migrate.upgrade(url)
    async with await Database.open(url) as db, open_writer(db) as writer:
        for run_id, days in (("old", 100), ("younger", 40)):
            at = utc_now() - timedelta(days=days)
            facts = {"created_at": at, "charged_cost": 1, "outputs": (Output("a", "text", "one"),)}
            await writer.submit(callback(run_id, at=at, body=b'{"as": "it came"}'))
            billed = at + timedelta(minutes=2)
            await writer.submit(seen(run_id, RunStatus.COMPLETED, at=billed, facts=facts))
        await writer.submit(quarantined("whd_odd", at=utc_now() - timedelta(days=400)))


@pytest.fixture
def filled(tracker: Commands) -> Commands:
    """The command line, with something to remove."""
    asyncio.run(_fill(f"sqlite:///{tracker.folder / 'tracker.db'}"))
    return tracker


def test_what_goes_is_told_by_table(filled: Commands) -> None:
    """Counting removes nothing; then just that is removed, quarantined callbacks only where their
    own option says so."""
    expected = {
        "runs": 1,
        "run_outputs": 1,
        "run_events": 2,
        "deliveries": 1,
        "bodies": 2,
        "starts": 0,
        "messages": 0,
        "message_attempts": 0,
        "sweeps": 0,
        "audit": 0,
    }
    counted = filled(*PRUNE, "--dry-run")
    assert [line.split() for line in counted.stdout.splitlines()][2:] == [
        [table, str(rows)] for table, rows in expected.items()
    ]
    assert "Nothing was removed" in counted.stderr
    assert filled.json(*PRUNE) == {"dry_run": False, "removed": expected}
    assert [run["run_id"] for run in filled.json("runs", "list")["runs"]] == ["younger"]
    removed = filled.json(*PRUNE, "--quarantined-older-than", "365d")["removed"]
    assert removed == dict.fromkeys(expected, 0) | {"deliveries": 1, "bodies": 1}


def test_a_removed_body_is_told(filled: Commands) -> None:
    """The callback is shown as before, with when its body was removed in its place, and a replay
    finds that nothing is to be done."""
    filled.json(*PRUNE)
    shown = filled("deliveries", "show", "whd_younger")
    assert (shown.returncode, shown.stderr) == (0, "Retention has removed its body.\n")
    fields = [line.split()[0] for line in shown.stdout.splitlines()]
    assert "body_removed_at" in fields
    assert "body" not in fields
    (replayed,) = filled.json("deliveries", "replay", "whd_younger")["deliveries"]
    assert replayed["reason"] == "it had been applied before"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "Missing option '--older-than'"),
        (("--older-than", "soon"), "'--older-than': must be a duration"),
        (("--older-than", "5d"), "TRACKER_HISTORY_SINCE (7d)"),
        (("--older-than", "90d", "--keys-older-than", "30d"), "--keys-older-than must not be"),
    ],
)
def test_wrong_ages_are_status_2(tracker: Commands, options: tuple[str, ...], said: str) -> None:
    """One line says what is wrong with them."""
    done = tracker("db", "prune", *options)
    assert done.returncode == 2
    assert said in one_line(done)
