"""`tracker spending`, and commands that meet a budget, as processes."""

import csv
import io
from contextlib import ExitStack

from tests.cli.conftest import Commands, simulate


def test_commands_keep_to_a_budget_and_show_it(tracker: Commands, stack: ExitStack) -> None:
    """A start beyond it ends with status 1 and one line; a sheet's rows are tagged by a column;
    what was spent is a table, CSV and JSON that agree."""
    simulate(tracker, stack, "--failures", "0%", "--run-seconds", "600")
    tracker.environ["TRACKER_BUDGET_MONTH"] = "0.60"
    sheet = tracker.folder / "icons.csv"
    sheet.write_text("prompt,Cost centre\na,red\nb,blue\nc,red\n")
    arguments = (
        "batch",
        "icon-pack",
        str(sheet),
        "--no-wait",
        "--tag",
        "order=7",
        "--tag",
        "by==1+1",
    )
    wrong = tracker(*arguments, "--tag-column", "Cost centre")
    assert wrong.returncode == 2
    assert "KEY=Cost centre gives the tag another name" in wrong.stderr
    done = tracker(*arguments, "--tag-column", "team=Cost centre")
    assert done.returncode == 1
    assert "stopped: the budget month:workspace_id=ws_simulator has $0.10 of" in done.stderr
    start = tracker("runs", "start", "icon-pack", "--input", "prompt=d")
    assert (start.returncode, start.stdout) == (1, "")
    assert start.stderr.count("\n") == 1 or "Nothing was sent" in start.stderr
    assert "starts again at" in start.stderr

    found = tracker.json("spending", "--by", "tag:team")
    assert {(one["of"], one["runs"], one["quoted"]) for one in found["spending"]} == {
        ("red", 1, 0.25),
        ("blue", 1, 0.25),
    }
    (budget,) = found["budgets"]
    assert (budget["quoted"], budget["left"]) == (0.5, 0.1)
    # A tag that a spreadsheet would compute is text there.
    for tag, shown in (("order", "7"), ("by", "'=1+1")):
        rows = csv.DictReader(
            io.StringIO(tracker("spending", "--by", f"tag:{tag}", "--csv").stdout)
        )
        assert [(row["of"], row["runs"], row["quoted"]) for row in rows] == [(shown, "2", "0.5")]
    for since, begin in (("2026-11-01", "2026-11-01"), ("2026-11-01T18:00+02:00", "2026-11-01")):
        assert tracker.json("spending", "--since", since)["since"] == begin
    wrong = tracker("spending", "--since", "yesterday")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    table = tracker("spending").stdout
    assert "$0.50" in table
    assert "month:workspace_id=ws_simulator" in table
