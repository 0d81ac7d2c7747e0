"""`tracker endpoints` and `tracker messages` as commands."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from tests.cli.conftest import Commands
from tests.support.endpoint import SECRET, Receiver
from tests.support.webhooks import add_endpoint, add_message
from tracker.store.migrate import open_database


async def _fill(folder: Path) -> None:
    now = datetime.now(UTC)
    async with open_database(
        f"sqlite:///{folder / 'tracker.db'}", history_since=timedelta(days=1)
    ) as database:
        await add_endpoint(database, "shop", filters={"tag": "shop=1"})
        await add_endpoint(
            database,
            "crm",
            state="disabled",
            disabled_at=now,
            disabled_reason="it answered 410",
            last_error="status 410",
        )
        await add_message(
            database,
            "msg_1",
            "shop",
            500,
            204,
            event_at=now,
            created_at=now,
            delivered_at=now + timedelta(seconds=2),
        )
        await add_message(database, "msg_2", "crm", 410, created_at=now - timedelta(seconds=1))


@pytest.fixture
def filled(tracker: Commands) -> Commands:
    """A delivered message to one endpoint, and a pending one to another, which is disabled."""
    asyncio.run(_fill(tracker.folder))
    return tracker


def test_endpoints_are_listed_with_their_backlog(filled: Commands) -> None:
    """With health, backlog, delays of the last day and the last error."""
    crm, shop = filled.json("endpoints", "list")["endpoints"]
    assert (crm["endpoint_id"], crm["health"], crm["pending"]) == ("crm", "disabled", 1)
    assert crm["disabled_reason"] == "it answered 410"
    assert (shop["health"], shop["pending"], shop["delay_p95"]) == ("ok", 0, 2)
    assert shop["tag"] == "shop=1"
    table = filled("endpoints", "list").stdout
    assert "disabled" in table
    assert "2 s" in table


def test_an_endpoint_that_no_worker_has_used_is_named(filled: Commands) -> None:
    """A new one takes effect when the worker is restarted; until then it is in no list."""
    tables = "".join(
        f'[[endpoints]]\nid = "{name}"\n'
        f'url = "https://example.com"\nsecrets = ["whsec_{"A" * 32}"]\n'
        for name in ("shop", "new")
    )
    (filled.folder / "tracker.toml").write_text(tables)
    done = filled("endpoints", "list", "--json", TRACKER_CONFIG="tracker.toml")
    assert len(json.loads(done.stdout)["endpoints"]) == 2
    assert done.stderr == (
        "tracker: no process sends events to new yet: restart those with a worker\n"
    )


def test_messages_are_listed_and_shown(filled: Commands) -> None:
    """By endpoint, state, event and run; one with its body and attempts."""
    listed = filled.json("messages", "list")["messages"]
    assert [one["message_id"] for one in listed] == ["msg_1", "msg_2"]
    for arguments in (("--endpoint", "crm"), ("--state", "pending")):
        [one] = filled.json("messages", "list", *arguments)["messages"]
        assert one["message_id"] == "msg_2"
    assert filled.json("messages", "list", "--event", "run.lost")["messages"] == []
    shown = filled.json("messages", "show", "msg_1")
    assert [one["status"] for one in shown["attempt_log"]] == [500, 204]
    printed = filled("messages", "show", "msg_1").stdout
    assert "an answer" in printed
    assert '"run_id": "run_1"' in printed
    unknown = filled("messages", "show", "msg_9")
    assert (unknown.returncode, unknown.stderr) == (1, "tracker: message msg_9 is not known\n")


def test_messages_are_sent_again_and_endpoints_enabled(filled: Commands) -> None:
    """`resend` takes a delivered one too; `recover` takes an age or a time; unknown ones are
    status 1."""
    assert filled.json("endpoints", "enable", "crm") == {"endpoint_id": "crm", "state": "enabled"}
    filled.json("messages", "resend", "msg_1", "msg_2")
    assert {one["state"] for one in filled.json("messages", "list")["messages"]} == {"pending"}
    for since in ("24h", "2026-01-01T00:00Z"):
        again = filled.json("messages", "recover", "--endpoint", "crm", "--since", since)
        assert again == {"endpoint_id": "crm", "failed": 0}
    for arguments in (
        ("endpoints", "enable", "nobody"),
        ("endpoints", "test", "crm"),
        ("messages", "resend", "msg_9"),
        ("messages", "recover", "--endpoint", "nobody", "--since", "1h"),
    ):
        unknown = filled(*arguments)
        assert unknown.returncode == 1, arguments
        assert len(unknown.stderr.splitlines()) == 1, unknown.stderr
    early = filled("messages", "recover", "--endpoint", "crm", "--since", "0001-01-01T00:00+23:00")
    assert (early.returncode, "within the years 1 to 9999" in early.stderr) == (2, True)
    wrong = filled("messages", "recover", "--endpoint", "crm", "--since", "soon")
    assert wrong.returncode == 2
    for arguments, said in (
        (("endpoints", "enable", "crm"), "crm is enabled; workers send what waits for it"),
        (("messages", "resend", "msg_1"), "1 message due now;"),
        (("messages", "recover", "--endpoint", "crm", "--since", "1h"), "0 failed messages due"),
    ):
        assert said in filled(*arguments).stdout


async def test_a_test_event_is_sent(tracker: Commands) -> None:
    """It is signed; an answer that is not 2xx is status 1."""
    async with Receiver() as receiver:
        settings = (
            f'[[endpoints]]\nid = "crm"\nurl = "{receiver.url}"\n'
            f'secrets = ["{SECRET}"]\nallow_private = true\n'
        )
        (tracker.folder / "tracker.toml").write_text(settings)
        send = partial(
            asyncio.to_thread, tracker, "endpoints", "test", "crm", TRACKER_CONFIG="tracker.toml"
        )
        done = await send()
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("crm answered 200 in ")
        shown = json.loads((await send("--json")).stdout)
        assert (shown["endpoint_id"], shown["status"], shown["error"]) == ("crm", 200, None)
        receiver.status = 500
        failed = await send()
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.startswith("tracker: crm failed after ")
    assert {(one.event, one.verified) for one in receiver.got} == {("tracker.test", True)}
