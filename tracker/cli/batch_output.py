"""What became of a batch's rows: as a table, as CSV or as JSON lines, on stdout or in a file."""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tracker.cli.output import print_table
from tracker.core.errors import TrackerError
from tracker.core.plain import plain_lines
from tracker.delivering import files

if TYPE_CHECKING:
    from tracker.starting.batch_rows import RowState
    from tracker.store.queries.batches import BatchCounts, BatchRow

_COLUMNS: Final = (
    *("row", "line", "key", "run_id", "status", "cost", "cost_final", "quoted_cost"),
    *("retry_advice", "error"),
)
_CENT: Final = Decimal("0.01")


class Results(StrEnum):
    """In which form the rows are shown."""

    CSV = "csv"
    JSONL = "jsonl"
    TABLE = "table"


ResultsOption = Annotated[
    Results | None,
    typer.Option(help="Form of the results; else by the file's ending, or a table on a terminal."),
]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the results there, not to stdout.")
]


def form(given: Results | None, output: Path | None) -> Results:
    """The form that was asked for, or that the file's ending means; else a table on a terminal and
    CSV elsewhere."""
    if given is not None:
        return given
    if output is not None:
        return Results.JSONL if output.suffix in (".jsonl", ".ndjson") else Results.CSV
    return Results.TABLE if sys.stdout.isatty() else Results.CSV


def check_output(results: Results | None, output: Path | None) -> None:
    """Raise `BadParameter` where the results could not be written so: before anything is paid."""
    if output is None:
        return
    if results is Results.TABLE:
        raise typer.BadParameter("a file takes csv or jsonl", param_hint="--results")
    # A file is replaced, so that its folder has to be writable.
    written = output if files.is_special(output) else output.resolve().parent
    if output.is_dir() or not written.exists() or not os.access(written, os.W_OK):
        raise typer.BadParameter(f"{output} cannot be written", param_hint="--output")


def show_rows(rows: "Sequence[RowState]", results: Results, output: Path | None) -> None:
    """Show the rows on stdout, or write them to a file, which is whole or as it was before. A link
    is followed; a device or a pipe is written to."""
    if results is Results.TABLE:
        _print_table(rows)
        return
    text = _jsonl(rows) if results is Results.JSONL else _csv(rows)
    if output is None:
        sys.stdout.write(plain_lines(text) if sys.stdout.isatty() else text)
        return
    try:
        files.write_whole(output, text)
    except OSError as error:
        raise TrackerError(f"{output} cannot be written: {error.strerror}") from error


def row_json(row: "RowState") -> dict[str, Any]:
    """A row as JSON values; the cost in USD."""
    from tracker.views import number_json

    run = None if row.record is None else row.record.run
    return {
        "row": row.entry.position,
        "line": row.entry.line,
        "key": row.entry.key,
        "run_id": None if row.start is None else row.start.run_id,
        "status": row.status,
        "cost": None if run is None else number_json(run.charged_cost),
        "cost_final": row.record is not None and row.record.cost_final,
        "quoted_cost": None if run is None else number_json(run.quoted_cost),
        "retry_advice": row.advice,
        "error": row.why,
        "inputs": row.inputs,
        "outputs": [
            {"output_id": one.output_id, "type": one.type, "url": one.url}
            for one in (run.outputs if run is not None else None) or ()
        ],
    }


def batch_json(batch: "BatchRow", tally: "BatchCounts") -> dict[str, Any]:
    """A batch as JSON values: which it is, and how many of its rows stand how."""
    from tracker.views import number_json, time_json

    return {
        "batch_id": batch.batch_id,
        "technique_id": batch.technique_id,
        "name": batch.name,
        "created_at": time_json(batch.created_at),
        "finished_at": None if batch.finished_at is None else time_json(batch.finished_at),
        "rows": tally.rows,
        "started": tally.started,
        "completed": tally.completed,
        "failed": tally.failed,
        "active": tally.active,
        "lost": tally.lost,
        "refused": tally.refused,
        "unresolved": tally.unresolved,
        "cost": number_json(tally.cost),
        "cost_final": tally.cost_final,
        "quoted": number_json(tally.quoted),
    }


def dollars(cost: Decimal) -> str:
    """An amount of USD, with its cents and whatever is smaller."""
    cents = cost.quantize(_CENT)
    return f"{cents if cents == cost else cost.normalize():f} USD"


def cost_words(tally: "BatchCounts") -> str:
    """What a batch's runs cost: at least so much while bills may still change, and the quotes."""
    if tally.cost_final:
        return dollars(tally.cost)
    quotes = f" ({dollars(tally.quoted)} quoted, not billed yet)" if tally.quoted else ""
    return f"at least {dollars(tally.cost)}{quotes}"


def _print_table(rows: "Sequence[RowState]") -> None:
    shown = [row_json(row) for row in rows]
    print_table(
        ("row", "line", "key", "run", "status", "cost", "outputs", "error"),
        [
            (
                *(one[name] for name in ("row", "line", "key", "run_id", "status", "cost")),
                " ".join(output["url"] for output in one["outputs"]),
                one["error"],
            )
            for one in shown
        ],
    )


def _csv(rows: "Sequence[RowState]") -> str:
    """One column for each input, and as many for outputs as the row with the most of them has."""
    shown = [row_json(row) for row in rows]
    inputs = dict.fromkeys(one["id"] for row in shown for one in row["inputs"] or ())
    most = max((len(row["outputs"]) for row in shown), default=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *_COLUMNS,
            *(f"input.{name}" for name in inputs),
            *(f"output.{number}" for number in range(1, most + 1)),
        ]
    )
    for row in shown:
        asked = row["inputs"] or ()
        writer.writerow(
            [
                *(row[name] for name in _COLUMNS),
                *("\n".join(o["value"] for o in asked if o["id"] == name) for name in inputs),
                *(output["url"] for output in row["outputs"]),
                *[""] * (most - len(row["outputs"])),
            ]
        )
    return text.getvalue()


def _jsonl(rows: "Sequence[RowState]") -> str:
    return "".join(f"{json.dumps(row_json(row))}\n" for row in rows)
