"""`tracker batch` and `tracker batches`, as processes, against the simulator."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openpyxl
import pytest
import typer

from tests.cli.conftest import Commands, set_faults, simulate
from tests.support.waiting import START_SECONDS, eventually
from tracker.cli.app import app

ROOT = Path(__file__).parents[2]
PROMPTS = ["garden tools", "kitchen tools", "garden tools"]
SHEET = "".join(f"{line}\n" for line in ["prompt,note", *(f"{prompt},x" for prompt in PROMPTS)])


@pytest.fixture
def flora(tracker: Commands, stack: ExitStack) -> Commands:
    """The command line, with a FLORA whose runs are short and complete, and a sheet."""
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "0%")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    (tracker.folder / "icons.csv").write_text(SHEET)
    return tracker


def begun(tracker: Commands) -> list[dict[str, Any]]:
    """The runs that FLORA knows."""
    root = tracker.environ["FLORA_BASE_URL"].removesuffix("/api/v1")
    runs: list[dict[str, Any]] = httpx.get(f"{root}/simulator/runs").json()["runs"]
    return runs


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(io.StringIO(path.read_text(), newline="")))


def piped(tracker: Commands, *arguments: str, given: str) -> "subprocess.CompletedProcess[str]":
    """A command that reads stdin."""
    file = tracker.folder / "stdin"
    file.write_text(given)
    return tracker(*arguments, prepare=partial(_read_from, file))


def _read_from(file: Path) -> None:
    os.dup2(os.open(file, os.O_RDONLY), 0)


def test_a_sheet_becomes_runs_and_results(flora: Commands) -> None:
    """Planned, kept to its limit, started, followed, repeated for nothing, listed and shown."""
    planned = flora.json("batch", "icon-pack", "icons.csv", "--dry-run")
    assert (planned["to_start"], planned["run_cost"], planned["cost"]) == (3, 0.25, 0.75)
    assert [one["line"] for one in planned["starts"]] == [2, 3, 4]
    dear = flora("batch", "icon-pack", "icons.csv", "--max-cost", "0.74")
    assert dear.returncode == 1
    assert "starting 3 rows could cost $0.75, more than --max-cost $0.74" in dear.stderr
    assert begun(flora) == []

    limit = ("--max-cost", "$0.75")
    done = flora("batch", "icon-pack", "icons.csv", *limit, "--output", "results.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Columns carried into the results: note" in done.stderr
    assert "Line 4 repeats line 2: it is a run of its own, $0.25 more" in done.stderr
    assert "3 of 3 completed, $0.75 so far" in done.stderr
    assert "3 of 3 rows completed, at least $0.75, " in done.stderr
    rows = read(flora.folder / "results.csv")
    assert [(row["note"], row["input.prompt"]) for row in rows] == [("x", one) for one in PROMPTS]
    assert {(row["status"], row["cost"]) for row in rows} == {("completed", "0.25")}
    assert {row["run_id"] for row in rows} == {run["run_id"] for run in begun(flora)}
    assert all(row[f"output.{number}"].startswith("http") for row in rows for number in range(1, 5))

    again = flora.json("batch", "icon-pack", "icons.csv", "--max-cost", "0")
    assert len(begun(flora)) == 3
    assert [row["run_id"] for row in again["rows"]] == [row["run_id"] for row in rows]
    assert [row["key"] for row in again["rows"]] == [one["key"] for one in planned["starts"]]

    (listed,) = flora.json("batches", "list")["batches"]
    assert listed == again["batch"]
    assert (listed["name"], listed["completed"], listed["cost"]) == ("icons.csv", 3, 0.75)
    assert flora.json("batches", "show", listed["batch_id"]) == again


def test_a_wrong_sheet_is_refused_whole(flora: Commands) -> None:
    """Every problem is a line with its place, exit status 1, and nothing is started; on request
    the other rows are."""
    (flora.folder / "faces.csv").write_text("face\nhttps://a.example/1.png\nftp://b\nx,y\n")
    done = flora("batch", "cctv-cam", "faces.csv", "--json")
    assert done.returncode == 1
    assert [one["line"] for one in json.loads(done.stdout)["problems"]] == [3, 4]
    assert done.stderr.splitlines() == [
        "faces.csv: line 3, column 'face': face must be an https link",
        "faces.csv: line 4: the line has more cells than the header, which has 1",
        "tracker: 2 problems in the sheet; nothing was started",
    ]
    assert begun(flora) == []
    some = flora("batch", "cctv-cam", "faces.csv", "--skip-bad-rows", "--no-wait", "--json")
    assert some.returncode == 1
    (row,) = json.loads(some.stdout)["rows"]
    assert (row["row"], row["line"], row["status"]) == (1, 2, "pending")
    assert "line 3, column 'face'" in some.stderr


def products(path: Path) -> None:
    """A workbook with two products."""
    book = openpyxl.Workbook()
    for row in ("SKU", "prompt", "client"), ("0001", "Café für Zürich", "A"), ("0002", "Tee", "B"):
        book.active.append(row)
    book.save(path)


SHEETS = {
    "excel.csv": "SKU;prompt;client\r\n0001;Café für Zürich;A\r\n0002;Tee;B\r\n".encode("cp1252"),
    "unicode.txt": "SKU\tprompt\tclient\n0001\tCafé für Zürich\tA\n0002\tTee\tB\n".encode("utf-16"),
    "plain.csv": "SKU,prompt,client\n0001,Café für Zürich,A\n0002,Tee,C\n".encode(),
}


def test_every_sheet_of_excel_is_read(flora: Commands) -> None:
    """A workbook, `;` with cp1252, and UTF-16 with tabs are the same rows; the columns that are no
    input are in the results, in the sheet's own form, and start nothing again when they change."""
    products(flora.folder / "products.xlsx")
    for name, content in SHEETS.items():
        (flora.folder / name).write_bytes(content)
    done = flora("batch", "icon-pack", "products.xlsx", "--output", "results.csv")
    assert done.returncode == 0, done.stderr
    text = (flora.folder / "results.csv").read_text("utf-8")
    assert text.startswith("\ufeffSKU,client,row,line,")
    assert [line.split(",")[:2] for line in text.splitlines()[1:]] == [["0001", "A"], ["0002", "B"]]
    for name, detected in {
        "excel.csv": "delimiter ';', encoding cp1252 (Windows), as in 'Café für Zürich'",
        "unicode.txt": "delimiter tab, encoding UTF-16",
        "plain.csv": None,
    }.items():
        done = flora("batch", "icon-pack", name, "--output", "results.csv")
        assert done.returncode == 0, done.stderr
        assert (f"{name}: read with {detected}" in done.stderr) == bool(detected)
        assert "Nothing to start: 2 rows, all started before for $0.50 so far" in done.stderr
    (batch,) = flora.json("batches", "list")["batches"]
    shown = flora.json("batches", "show", batch["batch_id"])
    assert shown["batch"]["columns"] == ["SKU", "client"]
    assert [row["carried"]["client"] for row in shown["rows"]] == ["A", "C"]
    flora("batch", "icon-pack", "excel.csv", "--output", "results.csv")
    assert (flora.folder / "results.csv").read_text("utf-8").startswith("\ufeffSKU;client;row;")
    assert len(begun(flora)) == 2


def test_one_command_from_a_workbook_to_named_files(flora: Commands) -> None:
    """Runs are started, followed and downloaded; files bear the cell of a column and are numbered
    in FLORA's order. Repeated, the command pays nothing and fetches only what is missing."""
    products(flora.folder / "products.xlsx")
    command = ("batch", "icon-pack", "products.xlsx", "--download", "out")
    named = (*command, "--name-by", "sku", "--yes")
    done = flora(*named)
    assert done.returncode == 0, done.stderr
    expected = [f"{sku}_icon_{number}.png" for sku in ("0001", "0002") for number in range(1, 5)]
    out = flora.folder / "out"
    assert sorted(path.name for path in out.glob("*.png")) == expected
    assert "8 files in out (" in done.stderr
    rows = {row["SKU"]: row for row in csv.DictReader(io.StringIO(done.stdout))}
    for line in (out / "manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        sku, _, number = entry["file"].removesuffix(".png").split("_")
        assert entry["run_id"] == rows[sku]["run_id"]
        assert entry["position"] == int(number) - 1

    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "0002_icon_3.png").unlink()
    again = flora.json(*named)
    outcomes = Counter(file["outcome"] for file in again["downloads"]["files"])
    assert outcomes == {"present": 7, "fetched": 1}
    assert sorted(path.name for path in out.glob("*.png")) == expected
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert {name for name in expected if before[name] != after[name]} == {"0002_icon_3.png"}

    numbered = flora(*command[:3], "--download", "rows")
    assert numbered.returncode == 0, numbered.stderr
    assert (flora.folder / "rows" / "001_icon_1.png").exists()
    batch = again["batch"]["batch_id"]
    more = ("--to", "rows", "--name-by", "SKU")
    assert flora("runs", "download", "--batch", batch, *more).returncode == 0
    assert sorted(path.name for path in (flora.folder / "rows").glob("*.png")) == expected
    assert len(begun(flora)) == 2


def test_results_do_not_depend_on_the_folder_for_downloads(flora: Commands) -> None:
    """It may be gone, or in use, when the runs have ended: what was paid for is reported, and
    repeating the command fetches the files."""
    out = flora.folder / "out"
    command = ("batch", "icon-pack", "icons.csv", "--download", "out", "--output", "results.csv")

    def replace_when_the_first_run_begins() -> None:
        while not begun(flora):
            time.sleep(0.02)
        out.rename(flora.folder / "away")
        out.write_text("")

    replacing = threading.Thread(target=replace_when_the_first_run_begins)
    replacing.start()
    done = flora(*command)
    replacing.join()
    assert done.returncode == 1
    assert "not downloaded: out cannot be written to" in done.stderr
    assert [row["status"] for row in read(flora.folder / "results.csv")] == ["completed"] * 3
    out.unlink()
    assert flora(*command).returncode == 0
    assert len([*out.glob("*.png")]) == 12
    assert len(begun(flora)) == 3


def test_downloads_are_checked_before_anything_is_paid(flora: Commands) -> None:
    """A folder that cannot be written to and an unknown column start nothing."""
    (flora.folder / "file").write_text("")
    for arguments, said in (
        (("--download", "file"), "file cannot be written to"),
        (("--download", "out", "--name-by", "sku"), "no column 'sku' to name files by; it has"),
    ):
        done = flora("batch", "icon-pack", "icons.csv", *arguments)
        assert done.returncode in (1, 2)
        assert said in done.stderr
    assert begun(flora) == []


def test_sheets_come_in_several_forms(flora: Commands) -> None:
    """JSON lines, other delimiters and other names of columns, all from stdin, may mean one row."""
    runs = []
    for arguments, text in (
        (("--format", "jsonl"), '{"prompt": "tea"}\n'),
        (("--delimiter", ";", "--map", "prompt=words"), "words;prompt\ntea;coffee\n"),
    ):
        done = piped(flora, "batch", "icon-pack", "-", *arguments, "--no-wait", given=text)
        assert done.returncode == 0, done.stderr
        (row,) = csv.DictReader(io.StringIO(done.stdout))
        runs.append(row["run_id"])
    assert len(set(runs)) == 1
    assert len(begun(flora)) == 1


def test_runs_that_fail_are_status_1(tracker: Commands, stack: ExitStack) -> None:
    """One line for each cause, with its count, its lines and what to do, and the next command."""
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "100%", "--seed", "2")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    (tracker.folder / "icons.csv").write_text(SHEET)
    done = tracker("batch", "icon-pack", "icons.csv", "--results", "jsonl")
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["status"] for row in rows} == {"failed"}
    lines = done.stderr.splitlines()
    for error in {row["error"] for row in rows}:
        count = sum(row["error"] == error for row in rows)
        assert [
            line for line in lines if line.startswith(f"tracker: {count} failed: {error} (line")
        ]
    retried = [row for row in rows if row["retry_advice"] in ("retry_now", "retry_later")]
    totals = f": 0 of 3 rows completed, 3 failed ({len(retried)} can be retried), "
    assert any(totals in line for line in lines)
    assert lines[lines.index("Next:") + 1].startswith(
        f"  tracker batch icon-pack icons.csv --results jsonl --retry-failed  # {len(retried)} row"
    )
    left_out = [row["line"] for row in rows if row["retry_advice"] == "change_input"]
    done = tracker("batch", "icon-pack", "icons.csv", "--retry-failed", "--dry-run")
    assert left_out
    told = [line for line in done.stderr.splitlines() if line.startswith("Not retried: ")]
    assert len(told) == len({row["error"] for row in rows if row["line"] in left_out})
    assert all("; change the input)" in line for line in told)
    (tracker.folder / "icons.csv").write_text(f"{SHEET}one more,x\n")
    done = tracker("batch", "icon-pack", "icons.csv", "--retry-all", "--only-failed", "--dry-run")
    last = done.stdout.splitlines()[-1]
    assert last == "To start: 3 of 4 rows, at most $0.75; 1 row without a run left out."


async def test_rows_that_are_left_out_on_request_are_no_failure(
    tracker: Commands, stack: ExitStack
) -> None:
    """Status 0 once all that was asked for has completed, and the command that starts the rest."""
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "100%", "--seed", "2")
    tracker.environ["TRACKER_POLL_INTERVAL"] = "0.1"
    (tracker.folder / "icons.csv").write_text(SHEET)
    assert tracker("batch", "icon-pack", "icons.csv").returncode == 1
    (tracker.folder / "icons.csv").write_text(f"{SHEET}one more,x\n")
    set_faults(tracker, failures=0.0)
    only = ("batch", "icon-pack", "icons.csv", "--retry-all", "--only-failed")
    for _ in range(2):
        done = tracker(*only)
        assert done.returncode == 0, done.stderr
        assert "tracker: 1 row without a run left out (line 5)" in done.stderr
        assert "stopped" not in done.stderr
        assert "  tracker batch icon-pack icons.csv  # starts the rest" in done.stderr
    done = tracker("batch", "icon-pack", "icons.csv")
    assert (done.returncode, done.stdout.count("completed")) == (0, 4)


async def test_what_is_never_billed_is_no_cost(tracker: Commands, stack: ExitStack) -> None:
    """The quote of a failed run counts until FLORA has shown that it is billed nothing."""
    given = ("--set", "quotes=1", "--set", "refund=absent")
    simulate(tracker, stack, "--run-seconds", "0.2", "--failures", "100%", *given)
    tracker.environ |= {"TRACKER_POLL_INTERVAL": "0.1", "TRACKER_COST_RECHECK": "1"}
    (tracker.folder / "icons.csv").write_text(SHEET)
    assert tracker("batch", "icon-pack", "icons.csv").returncode == 1

    def is_final() -> bool:
        tracker("poll")
        (batch,) = tracker.json("batches", "list")["batches"]
        return bool(batch["cost_final"])

    await eventually(is_final, timeout=START_SECONDS)
    done = tracker("batch", "icon-pack", "icons.csv", "--dry-run")
    assert done.stdout.splitlines()[-1] == "Nothing to start: 3 rows, all started before."


async def test_an_interrupt_is_status_130_and_loses_nothing(flora: Commands) -> None:
    """Ctrl-C leaves what is started tracked; the next command starts the rest, and pays it once."""
    rows = [f"icon {number}" for number in range(40)]
    (flora.folder / "many.csv").write_text("\n".join(["prompt", *rows]))
    # All of them take half a minute, in which an interrupt is never too late.
    set_faults(flora, slow_starts=1, slow_seconds=0.8)
    arguments = ("batch", "icon-pack", "many.csv", "--json")
    with flora.running(*arguments, "--concurrency", "1") as process:
        await eventually(lambda: len(begun(flora)) >= 3, timeout=START_SECONDS)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
    assert "Repeat the command to continue" in errors.splitlines()[-1]
    assert len(begun(flora)) < 40
    set_faults(flora, slow_starts=0)
    done = flora(*arguments, "--concurrency", "8", "--no-wait")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["batch"]["started"] == len(begun(flora)) == 40


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gone.csv", "gone.csv cannot be read: No such file"),
        ("icons.csv --map prompt", "'prompt' is not INPUT=COLUMN"),
        ("icons.csv --map :text=a", "is not INPUT=COLUMN"),
        ("icons.csv --max-cost cheap", "'cheap' is not an amount of USD"),
        ("icons.csv --max-cost nan", "is not an amount of USD"),
        ("icons.csv --delimiter ab", "must be one character, or tab"),
        ("icons.csv --again --retry-failed", "cannot be combined with one another"),
        ("icons.csv --retry-all --retry-failed", "cannot be combined with one another"),
        ("icons.csv --only-failed", "goes with --retry-failed or --retry-all only"),
        ("icons.csv --output no/where.csv", "cannot be written"),
        ("icons.csv --output a.xlsx", "use a.csv, for Excel too"),
        ("icons.csv --output a.csv --results table", "takes csv or jsonl"),
        ("icons.csv --encoding klingon", "'klingon' is not known"),
        ("icons.csv --download out --no-wait", "waits for the runs"),
        ("icons.csv --name-by SKU", "goes with --download only"),
        ("icons.csv --concurrency 0", "greater than or equal to 1"),
    ],
)
def test_wrong_usage_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    """Before settings are read, FLORA is asked or anything is kept; it is status 2."""
    (tmp_path / "icons.csv").write_text(SHEET)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.BadParameter) as wrong:
        app(["batch", "icon-pack", *arguments.split()], standalone_mode=False)
    assert said in wrong.value.format_message()
    assert wrong.value.exit_code == 2
    assert [one.name for one in tmp_path.iterdir()] == ["icons.csv"]


def test_an_unknown_batch_is_status_1(tracker: Commands) -> None:
    """And says where the known ones are listed."""
    done = tracker("batches", "show", "bat_gone")
    assert done.returncode == 1
    assert "`tracker batches list`" in done.stderr


def test_what_the_page_shows_works(flora: Commands) -> None:
    """The commands of docs/work.md on batches, as they stand there, one after the other."""
    shutil.copytree(ROOT / "examples", flora.folder / "examples")
    page = (ROOT / "docs" / "work.md").read_text(encoding="utf-8")
    section = page.split("\n## Batches\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.S)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert len(commands) == 3
    said = []
    for program, *arguments in commands:
        assert program == ".venv/bin/tracker"
        done = flora(*arguments)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "To start: 4 of 4 rows, at most $1.00." in said[0]
    rows, sheet = read(flora.folder / "results.csv"), read(ROOT / "examples" / "icons.csv")
    assert [row["input.prompt"] for row in rows] == [row["prompt"] for row in sheet]
    assert {row["status"] for row in rows} == {"completed"}
    assert len(begun(flora)) == 4
    assert "icons.csv" in said[2]
