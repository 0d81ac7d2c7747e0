"""What a newer version has stored is printed as it is, and makes no command fail."""

import asyncio

import pytest

from tests.cli.conftest import Commands
from tests.support import next_year
from tests.support.next_year import NEW
from tests.support.shares import share_of

SHOWN = (
    "runs list",
    "runs show run_ended",
    "runs show run_open",
    "runs explain run_ended",
    "runs explain run_open",
    "starts show row-new",
    "batches show bat_1",
    "techniques show tech_1",
    "deliveries list",
    "deliveries show whd_1",
    "endpoints list",
    "messages list",
    "messages show msg_1",
    "audit list",
)
REST = (
    "runs list --status failed",
    "starts list",
    "batches list",
    "techniques list",
    "spending",
    "spending --by technique",
    "db current",
)


@pytest.fixture
def filled(tracker: Commands, database_url: str) -> Commands:
    """The commands, on a database that a newer version has written to."""
    asyncio.run(next_year.fill(database_url))
    tracker.environ["TRACKER_DATABASE_URL"] = database_url
    return tracker


def test_no_command_fails(filled: Commands, thorough: bool) -> None:
    """Each prints what it reads, for people and as JSON; those about one row print its
    words."""
    failed = {}
    commands = [(command, more) for more in ("", " --json") for command in (*SHOWN, *REST)]
    for command, more in share_of(commands, of=2, thorough=thorough):
        done = filled(*f"{command}{more}".split())
        if done.returncode or (command in SHOWN and NEW not in done.stdout):
            failed[command + more] = done.stdout + done.stderr
    assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items())


def test_the_statistics_are_counted_anew(filled: Commands) -> None:
    """From runs whose source and state are unknown. Retention leaves what it does not know, a
    person settles no start of a newer version, and the doctor reports what it finds."""
    done = filled("db", "recount")
    assert done.returncode == 0, done.stderr
    done = filled("starts", "resolve", "row-new", "--none")
    assert f"left to a newer version of the tracker, which calls it {NEW}" in done.stderr
    ages = [word for name in ("", "keys-", "audit-") for word in (f"--{name}older-than", "7d")]
    done = filled("db", "prune", *ages)
    assert done.returncode == 0, done.stderr
    done = filled("doctor", "--json")
    assert "Traceback" not in done.stdout + done.stderr
