"""`tracker audit list`: what was done from the command line, and by whom."""

from contextlib import ExitStack

from tests.cli.conftest import Commands, simulate
from tracker.store.queries.audit import Action


def test_what_commands_do_is_listed(tracker: Commands, stack: ExitStack) -> None:
    """A start, a batch and a prune, newest first, each with the user; and within bounds."""
    simulate(tracker, stack, "--failures", "0%")
    tracker.environ["SUDO_USER"] = "alice"
    sheet = tracker.folder / "prompts.csv"
    sheet.write_text("prompt\ntrees\n")
    given = ("--input", "prompt=tools", "--idempotency-key", "order-17")
    run = tracker.json("runs", "start", "icon-pack", *given)
    assert tracker("batch", "icon-pack", str(sheet), "--no-wait").returncode == 0
    tracker.json("db", "prune", "--older-than", "90d")
    shown = tracker.json("audit", "list", "--since", "1h")
    assert [(one["action"], one["actor"]) for one in shown["entries"]] == [
        ("prune", "cli:alice"),
        ("start", "batch:alice"),
        ("start", "cli:alice"),
    ]
    assert shown["entries"][-1]["detail"]["idempotency_key"] == "order-17"
    assert shown["entries"][-1]["detail"]["technique_id"] == run["technique_id"]
    assert shown["meta"] == {"next_cursor": None}
    first = tracker.json("audit", "list", "--action", "start", "--limit", "1")
    assert first["entries"][0]["actor"] == "batch:alice"
    cursor = first["meta"]["next_cursor"]
    rest = tracker.json("audit", "list", "--action", "start", "--cursor", cursor)
    assert [one["actor"] for one in rest["entries"]] == ["cli:alice"]
    table = tracker("audit", "list").stdout
    assert "order-17" in table
    help_text = tracker("audit", "list", "--help").stdout
    assert all(action in help_text for action in Action)
    wrong = tracker("audit", "list", "--action", "dance")
    assert (wrong.returncode, "'dance' is not an action" in wrong.stderr) == (2, True)
