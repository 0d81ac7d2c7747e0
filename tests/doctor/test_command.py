"""The command: its exit status, its two forms, its bounds, and what it never shows."""

import asyncio
import json
import re
import time
from pathlib import Path
from threading import Event
from typing import get_args

import pytest

from tests.cli.conftest import Commands
from tests.doctor.conftest import look
from tests.doctor.pooler import saying_nothing
from tests.support.waiting import free_port
from tracker.operations.doctor import Level, Name, database, examination
from tracker.operations.doctor.examination import TimeLimits

DOCS = Path(__file__).parents[2] / "docs" / "doctor.md"
MARKED = "marked-secret-of-the-tests"


def test_a_broken_deployment_is_status_1_and_shows_no_secret(tracker: Commands) -> None:
    """With everything broken the report is whole, in both forms, and holds no secret."""
    tracker.environ |= {
        "TRACKER_DATABASE_URL": f"postgresql://u:{MARKED}@127.0.0.1:{free_port()}/x?password={MARKED}",
        "FLORA_API_KEY": f"sk_live_{MARKED}{'x' * 600}",
        "FLORA_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "FLORA_WEBHOOK_SECRET": f"whsec_{MARKED}",
        "TRACKER_API_TOKEN": MARKED,
        "TRACKER_PUBLIC_URL": f"http://127.0.0.1:{free_port()}",
    }
    done = tracker("doctor")
    assert done.returncode == 1
    assert done.stderr == ""
    assert "→ " in done.stdout
    assert re.search(r"^\d failed, \d+ warnings?, \d ok\.$", done.stdout.splitlines()[-1])
    as_json = tracker("doctor", "--json")
    report = json.loads(as_json.stdout)
    assert (as_json.returncode, report["level"]) == (1, "failed")
    failed = {one["name"] for one in report["findings"] if one["level"] == "failed"}
    assert failed == {"database", "key", "callbacks"}
    assert MARKED not in done.stdout + as_json.stdout + as_json.stderr


def test_settings_that_cannot_be_read_are_status_2(tracker: Commands) -> None:
    """As for every command; the report says which setting, and what it must be."""
    done = tracker("doctor", "--json", TRACKER_PUBLIC_URL="http://tracker.example.com")
    assert done.returncode == 2
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["name"] == "settings"
    assert "TRACKER_PUBLIC_URL must begin with https://" in finding["seen"]


async def test_whatever_hangs_the_report_comes_in_time() -> None:
    """Far ends that accept connections and say nothing are each given up; the limits are those of
    the command, made shorter."""
    usual = TimeLimits()
    assert max(usual.database, usual.flora_read, usual.delivery) <= 10
    assert max(usual.callbacks, usual.flora) + usual.work <= 30
    limits = TimeLimits(database=0.5, flora_read=0.5, delivery=0.5)
    async with saying_nothing() as port, asyncio.timeout(10):
        report = await look(
            limits,
            TRACKER_DATABASE_URL=f"postgresql://u@127.0.0.1:{port}/x",
            FLORA_API_KEY="sk_test_1",
            FLORA_WEBHOOK_SECRET="whsec_1",
            FLORA_BASE_URL=f"http://127.0.0.1:{port}",
            TRACKER_PUBLIC_URL=f"http://127.0.0.1:{port}",
        )
    assert "within 0.5 s" in report["database"].seen
    assert "no answer" in report["key"].seen
    assert "gets no answer" in report["callbacks"].seen
    assert report.level("worker") is Level.WARNING


async def test_a_fault_of_the_doctors_own_hides_nothing_else(
    monkeypatch: pytest.MonkeyPatch, sqlite_url: str
) -> None:
    """What breaks unforeseen is one line, and all other lines are there."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(database, "_sqlite", broken)
    report = await look(TRACKER_DATABASE_URL=sqlite_url)
    assert report["database"].seen == "The check itself failed: ZeroDivisionError: unforeseen."
    assert report.level("disk") is Level.OK


def test_a_thread_that_hangs_holds_nothing_up() -> None:
    """The loop is closed while a call in a thread goes on; what it would return is not waited for,
    and what another one raises comes through."""
    ended = Event()

    def fail() -> None:
        raise OSError("no such name")

    async def work() -> str:
        with pytest.raises(OSError, match="no such name"):
            await asyncio.to_thread(fail)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.to_thread(ended.wait)
        return await asyncio.to_thread(str, "done")

    began = time.monotonic()
    assert examination.run(work()) == "done"
    assert time.monotonic() - began < 10
    ended.set()


def test_every_line_is_documented_in_its_order() -> None:
    """docs/doctor.md has a section for each line that a report may have, and for no other."""
    sections = re.findall(r"^### `(.+)`$", DOCS.read_text(), re.MULTILINE)
    assert sections == list(get_args(Name))
