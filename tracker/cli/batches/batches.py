"""`tracker batches`, and the results of a batch: as a table, CSV or JSON lines."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.options import AS_JSON, CURSOR, argument, option
from tracker.cli.output import plain, print_json, print_table
from tracker.cli.setup import print_list, run_once
from tracker.core.errors import TrackerError
from tracker.core.formatting import money, plain_lines

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.starting.batches.rows import RowState
    from tracker.store.engine import Database
    from tracker.store.queries.batches import BatchCounts, BatchRow

app = typer.Typer(name="batches", help="List and show batches.", no_args_is_help=True)


class Results(StrEnum):
    """The format of results."""

    CSV = "csv"
    JSONL = "jsonl"
    TABLE = "table"


RESULTS: Final = option(
    "Format of the results. Default: by the ending of --output, else a table on a terminal and csv "
    "elsewhere."
)
OUTPUT: Final = option("Write the results to a file.", metavar="FILE")


@app.command("list")
def list_(
    limit: int = option("Maximum rows.", default=50, min=1, max=1000),
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List batches, newest first."""
    from tracker.store.queries import batches
    from tracker.views import batch_json

    async def find(database: "Database") -> tuple[list[dict[str, Any]], str | None]:
        found, next_cursor = await batches.list_batches(database, cursor=cursor, limit=limit)
        counts = await batches.batch_counts(database, [one.batch_id for one in found])
        return [batch_json(one, counts[one.batch_id]) for one in found], next_cursor

    print_list(
        "batches",
        find,
        dict,
        {
            "batch": "batch_id",
            "file": "name",
            "technique": "technique_id",
            "rows": "rows",
            "completed": "completed",
            "failed": "failed",
            "running": "active",
            "cost": lambda batch: money(batch["cost"]),
            "created": "created_at",
        },
        as_json=as_json,
        hide=("created", "technique", "running", "rows", "file"),
        named=True,
    )


@app.command()
def show(
    batch_id: str = argument("BATCH", "Batch id (bat_…)."),
    results: Results | None = RESULTS,
    output: Path | None = OUTPUT,
    as_json: bool = AS_JSON,
) -> None:
    """Show the result of each row of a batch."""
    from tracker.store.queries import batches

    check_output(results, output)

    async def work(services: "Services") -> "tuple[BatchRow, BatchCounts, list[RowState]] | None":
        found = await batches.get(services.database, batch_id)
        if found is None:
            return None
        return found, await services.batches.counts(found), await services.batches.rows(found)

    found = run_once(work)
    if found is None:
        raise TrackerError(
            f"batch {plain(batch_id)} is not known: `tracker batches list` shows all batches"
        )
    print_batch(*found, results=results, output=output, as_json=as_json)


def check_output(results: Results | None, output: Path | None) -> None:
    """Raise `BadParameter` where results cannot be written: before anything is paid."""
    from tracker.delivering import files

    if output is None:
        return
    if results is Results.TABLE:
        raise typer.BadParameter("a file takes csv or jsonl", param_hint="--results")
    if output.suffix.lower() in (".xlsx", ".xls", ".ods"):
        message = f"results are CSV or JSON lines: use {output.with_suffix('.csv')}, for Excel too"
        raise typer.BadParameter(message, param_hint="--output")
    # A file is replaced, so its directory has to be writable.
    written = output if files.is_special(output) else output.resolve().parent
    if output.is_dir() or not written.exists() or not os.access(written, os.W_OK):
        raise typer.BadParameter(f"{output} cannot be written", param_hint="--output")


def print_batch(
    batch: "BatchRow",
    counts: "BatchCounts",
    rows: "Sequence[RowState]",
    *,
    results: Results | None,
    output: Path | None,
    as_json: bool,
    more: Mapping[str, Any] | None = None,
    **csv_style: Any,
) -> None:
    """Print a batch as JSON, or its rows as results; write the results to `output` in any case.

    `more` is added to the JSON; `csv_style` are `delimiter` and `bom` of a CSV file.
    """
    from tracker.views import batch_json, row_json

    if as_json:
        rows_json = [row_json(row) for row in rows]
        print_json({"batch": batch_json(batch, counts), "rows": rows_json} | dict(more or {}))
    if output is not None or not as_json:
        show_rows(
            rows, results_format(results, output), output, columns=batch.columns or (), **csv_style
        )


def results_format(results: Results | None, output: Path | None) -> Results:
    """The format asked for, or that of the file's ending; else a table on a terminal, CSV
    elsewhere."""
    if results is not None:
        return results
    if output is not None:
        return Results.JSONL if output.suffix in (".jsonl", ".ndjson") else Results.CSV
    return Results.TABLE if sys.stdout.isatty() else Results.CSV


def show_rows(
    rows: "Sequence[RowState]",
    results: Results,
    output: Path | None,
    *,
    columns: Sequence[str] = (),
    **csv_style: Any,
) -> None:
    """Print the rows, or write them to a file; `columns` are the carried ones.

    A file is replaced as a whole. A link is followed; a device or pipe is written to.
    """
    from tracker.delivering import files
    from tracker.starting.batches.rows import csv_lines
    from tracker.views import row_json

    shown = [row_json(row) for row in rows]
    if results is Results.TABLE:
        print_table(
            (*columns, "row", "line", "key", "run", "status", "cost", "outputs", "error"),
            (
                (
                    *(row["carried"].get(name) for name in columns),
                    *(row[name] for name in ("row", "line", "key", "run_id", "status", "cost")),
                    " ".join(output["url"] for output in row["outputs"]),
                    row["error"],
                )
                for row in shown
            ),
            hide=("outputs", "key", "line", *columns[:0:-1], "cost"),
        )
        return
    if results is Results.JSONL:
        text = "".join(f"{json.dumps(row)}\n" for row in shown)
    else:
        text = "".join(csv_lines(rows, columns, **(csv_style if output else {})))
    if output is None:
        sys.stdout.write(plain_lines(text) if sys.stdout.isatty() else text)
        return
    try:
        files.write_whole(output, text)
    except OSError as error:
        raise TrackerError(f"{output} cannot be written: {error.strerror}") from error


def cost_text(counts: "BatchCounts") -> str:
    """The cost of a batch: a lower bound and the quotes while bills may still change."""
    if counts.cost_final:
        return money(counts.cost)
    quotes = f" ({money(counts.quoted)} quoted, not billed yet)" if counts.quoted else ""
    return f"at least {money(counts.cost)}{quotes}"
