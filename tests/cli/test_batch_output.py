"""The results of a batch, in each of their forms."""

import csv
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from tracker.cli.batch import progress_text
from tracker.cli.batches import Results, report_outcome, results_format, show_rows
from tracker.cli.output import Screen
from tracker.cli.runs import RunScreen
from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import Details, Output, Precedence, RunError, RunState
from tracker.polling.follow import RunUpdate
from tracker.starting.batches import BatchOutcome, BatchProgress
from tracker.starting.rows import RowState, carried_names, csv_lines
from tracker.store.queries.batches import BatchCounts, BatchEntry, BatchRow
from tracker.store.queries.starts import StartRow, StartState

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def start(number: int, state: StartState, **facts: object) -> StartRow:
    values = {"workspace_id": "default", "technique_id": "tech_1", "fingerprint": "f"}
    inputs = [{"id": "prompt", "type": "text", "value": f'say, "{number}"\nor so'}]
    return StartRow(
        **values,
        idempotency_key=f"row-{number}",
        inputs=inputs,
        state=state,
        created_at=NOW,
        **facts,  # type: ignore[arg-type]
    )


def record(number: int, precedence: Precedence, **facts: object) -> Record:
    run = RunState(run_id=f"run_{number}", precedence=precedence, details=Details.READ, **facts)  # type: ignore[arg-type]
    return Record(run=run, source=Source.START, first_seen_at=NOW)


def rows() -> list[RowState]:
    """A row of each kind."""
    outputs = (Output("o1", "text", "\x1b[2Jsaid\nso"), Output("o2", "imageUrl", "https://a/b.png"))
    refusal = {"code": "bad", "message": "No.", "fields": [{"field": "inputs", "message": "why"}]}
    given: list[dict[str, object]] = [
        {
            "start": start(1, StartState.STARTED, run_id="run_1"),
            "records": [
                record(1, Precedence.COMPLETED, charged_cost=Decimal("0.25"), outputs=outputs)
            ],
        },
        {
            "start": start(2, StartState.STARTED, run_id="run_2"),
            "records": [record(2, Precedence.FAILED, error=RunError("model_timeout", "Too slow."))],
        },
        {"start": start(3, StartState.REFUSED, error=refusal), "error": "refused"},
        {"start": start(4, StartState.UNRESOLVED, error={"status": 409}), "error": "nobody knows"},
        {},
        {"start": start(6, StartState.STARTED, run_id="run_6")},
        {"start": start(7, StartState.SENT, error={"message": "cut"})},
    ]
    return [
        RowState(
            entry=BatchEntry(
                position=number,
                line=number + 1,
                digest=str(number),
                inputs=[{"id": "prompt", "type": "text", "value": "never sent"}],
            ),
            **facts,  # type: ignore[arg-type]
        )
        for number, facts in enumerate(given, 1)
    ]


EXPECTED = [
    ("1", "run_1", "completed", "0.25", ""),
    ("2", "run_2", "failed", "", "model_timeout: Too slow."),
    ("3", "", "refused", "", "bad: No.; inputs: why"),
    ("4", "", "unresolved", "", "nobody knows"),
    ("5", "", "not_started", "", ""),
    ("6", "run_6", "forgotten", "", ""),
    ("7", "", "sending", "", "cut"),
]


@pytest.mark.parametrize(("quotes", "total"), [((1, 2), 3), ((1, None), None), ((), None)])
def test_a_row_has_a_quote_once_each_of_its_runs_has_one(
    quotes: tuple[int | None, ...], total: int | None
) -> None:
    """Part of a price would look like all of it."""
    records = [
        record(number, Precedence.RUNNING, quoted_cost=quote and Decimal(quote))
        for number, quote in enumerate(quotes)
    ]
    assert replace(rows()[0], records=records).quoted_cost == total


def test_csv_has_a_column_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row is one record, whatever its texts hold; columns that it lacks are empty."""
    show_rows(rows(), Results.CSV, None)
    shown = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert list(shown[0]) == [
        *("row", "line", "key", "run_id", "status", "cost", "cost_final", "quoted_cost"),
        *("retry_advice", "error"),
        *("input.prompt", "output.1", "output.2"),
    ]
    names = ("row", "run_id", "status", "cost", "error")
    assert [tuple(row[name] for name in names) for row in shown] == EXPECTED
    assert shown[0]["input.prompt"] == 'say, "1"\nor so'
    assert shown[0]["output.1"] == "\x1b[2Jsaid\nso"
    assert shown[4]["input.prompt"] == "never sent"
    assert shown[5]["output.2"] == ""


def test_carried_columns_come_first_with_their_own_names() -> None:
    """In the order of the sheet; a column with the name of a result is `sheet.` and that name."""
    given = [replace(row, entry=replace(row.entry, carried={"SKU": "17"})) for row in rows()]
    given[0].entry.carried["status"] = "ordered"
    text = "".join(csv_lines(given, ["SKU", "status", "client"], delimiter=";", bom=True))
    assert text.startswith("\ufeffSKU;sheet.status;client;row;line;key;run_id;status;")
    shown = list(csv.DictReader(io.StringIO(text[1:], newline=""), delimiter=";"))
    assert [(row["SKU"], row["client"], row["status"]) for row in shown] == [
        ("17", "", row[2]) for row in EXPECTED
    ]
    assert [row["sheet.status"] for row in shown] == ["ordered", *[""] * 6]
    assert carried_names(["error", "sheet.error"]) == ["sheet.sheet.error", "sheet.error"]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ('=HYPERLINK("https://a")', '\'=HYPERLINK("https://a")'),
        ("+49 170 1", "'+49 170 1"),
        ("@sum", "'@sum"),
        ("\t=1", "'\t=1"),
        ("\n=1", "'\n=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-17.5", "-17.5"),
        ("tea - 1", "tea - 1"),
    ],
)
def test_no_cell_is_a_formula(cell: str, written: str) -> None:
    """What a spreadsheet would compute gets an apostrophe in front; numbers stay numbers."""
    row = replace(rows()[0], entry=replace(rows()[0].entry, carried={"note": cell}))
    _, shown = csv.reader(io.StringIO("".join(csv_lines([row], ["note"])), newline=""))
    assert shown[0] == written


def test_json_lines_have_the_inputs_and_outputs_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """One object on each line, in ASCII."""
    show_rows(rows(), Results.JSONL, None)
    lines = capsys.readouterr().out.splitlines()
    shown = [json.loads(line) for line in lines]
    assert [one["status"] for one in shown] == [row[2] for row in EXPECTED]
    assert shown[0]["cost"] == 0.25
    assert shown[0]["outputs"][1] == {
        "output_id": "o2",
        "type": "imageUrl",
        "url": "https://a/b.png",
    }
    assert shown[0]["key"] == "row-1"


def test_a_table_obeys_nobodys_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters of outputs and errors are shown, not sent to the terminal."""
    show_rows(rows(), Results.TABLE, None)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[2Jsaid\\x0aso https://a/b.png" in shown


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    """The results replace a file only once they are written; nothing else is left."""
    file = tmp_path / "results.jsonl"
    file.write_text("before")
    show_rows(rows(), Results.JSONL, file)
    assert len(file.read_text().splitlines()) == 7
    assert list(tmp_path.iterdir()) == [file]


class Terminal(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_form_follows_the_file() -> None:
    """What is asked for, else by the ending, else a table on a terminal and CSV elsewhere."""
    assert results_format(Results.JSONL, Path("a.csv")) is Results.JSONL
    assert results_format(None, Path("a.ndjson")) is Results.JSONL
    assert results_format(None, Path("a.txt")) is Results.CSV
    assert results_format(None, None) is Results.CSV
    with redirect_stdout(Terminal()):
        assert results_format(None, None) is Results.TABLE


def test_progress_fits_the_terminal() -> None:
    """Counts that are not zero, what is waited for and the cost, in at most 79 columns; what does
    not fit is left out."""
    counts = BatchCounts(rows=9, started=5, active=2, completed=2, failed=1, unresolved=1)
    counts.cost = Decimal("0.500000")
    progress = BatchProgress(counts=counts, left=3, errors=1, paused=4.6)
    assert progress_text(progress) == (
        "5 of 9 started, 2 running, 1 failed, 1 not startable, paused for 5 s, $0.50"
    )
    assert "3 in doubt" in progress_text(BatchProgress(counts=counts, doubt=3))
    for active, awaited in ((0, True), (1, False)):
        missing = BatchProgress(counts=replace(counts, active=active, called_back=2))
        assert ("2 callbacks missing" in progress_text(missing)) == awaited
    assert "next start in 80 s" in progress_text(BatchProgress(counts=counts, held=80.0))
    large = BatchCounts(rows=20_000, started=20_000, active=1500, completed=15_000, failed=3500)
    large.cost, large.not_final = Decimal("12345.25"), 1
    busy = BatchProgress(counts=large, doubt=12, held=80.0, errors=7)
    for width in (50, 79):
        assert len(progress_text(busy, 60_000, width=width)) <= width
    assert progress_text(busy, width=50) == "15000 of 20000 completed, 1500 running"


def test_a_row_of_unknown_outcome_is_not_called_not_started(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """FLORA may have started it: it counts as unresolved or in doubt."""
    batch = BatchRow(
        batch_id="bat_1", workspace_id="ws_1", technique_id="tech_1", name="a", created_at=NOW
    )
    counts = BatchCounts(rows=9, started=5, completed=5, unresolved=1, doubt=2)
    report_outcome(BatchOutcome(batch=batch, rows=[], counts=counts), waited=True, seconds=1.0)
    said = capsys.readouterr().err
    assert "5 of 9 rows completed, 1 unresolved, 2 in doubt, 1 not started" in said


def test_an_end_is_shown_with_what_brought_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Not with the read of the details after it, which is a poll however the end came."""
    ended = replace(record(1, Precedence.COMPLETED), ended_via=Source.CALLBACK)
    RunScreen(Screen(), lambda: NOW).show([RunUpdate(ended, Source.POLL)])
    assert capsys.readouterr().err.rstrip().endswith("  callback")


def test_a_run_that_was_created_later_than_now_has_taken_no_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """FLORA's clock may be ahead."""
    late = record(1, Precedence.PENDING, created_at=NOW + timedelta(minutes=20))
    RunScreen(Screen(), lambda: NOW).show([RunUpdate(late, Source.START)])
    assert "  0 ms  " in capsys.readouterr().err
