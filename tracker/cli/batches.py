"""`tracker batches`, and what is shown of a batch: its plan, results, totals and next steps."""

import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.command import AS_JSON, CURSOR, argument, option, print_list, run_once
from tracker.cli.output import note, plain, print_json, print_table
from tracker.core.errors import TrackerError
from tracker.core.formatting import counted, duration, line_numbers, money, plain_lines
from tracker.core.run import RetryAdvice

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.starting.batches import BatchOutcome
    from tracker.starting.rows import BatchPlan, RowState
    from tracker.starting.sheet import SheetProblem
    from tracker.store.engine import Database
    from tracker.store.queries.batches import BatchCounts, BatchRow

_NAMED: Final = 20
"""How many causes are named; the results hold every row."""
_REPEATS: Final = 5
"""How many repeated rows are named."""
_ONCE: Final = (
    *("--again", "--retry-failed", "--retry-all", "--only-failed"),
    *("--yes", "-y", "--no-wait", "--json"),
)
"""Options that the command for the next step does not repeat."""
_ADVICE: Final[dict[str, str]] = {
    RetryAdvice.RETRY_NOW: "can be retried",
    RetryAdvice.RETRY_LATER: "can be retried later",
    RetryAdvice.CHANGE_INPUT: "change the input",
    RetryAdvice.NOT_RETRYABLE: "a retry does not help",
}

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
            "started": "started",
            "completed": "completed",
            "failed": "failed",
            "running": "active",
            "cost": "cost",
            "created": "created_at",
        },
        as_json=as_json,
        hide=("created", "technique", "running", "started", "rows", "file"),
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
    from tracker.starting.rows import csv_lines
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


def report_problems(name: str, problems: "Sequence[SheetProblem]") -> None:
    """One line on stderr for each cause, with the lines of the sheet that have it."""
    from tracker.starting.sheet import problem_lines

    _note_causes(name, problem_lines(problems))


def _note_causes(prefix: str, lines: Sequence[str], advice: str = "") -> None:
    for line in lines[:_NAMED]:
        note(f"{prefix}: {line}")
    if len(lines) > _NAMED:
        note(f"{prefix}: {counted(len(lines) - _NAMED, 'more cause')}{advice}")


def report_plan(plan: "BatchPlan", *, retried: bool) -> None:
    """What is carried, renamed and repeated, and what a retry leaves out, on stderr."""
    from tracker.starting.rows import carried_names

    columns = plan.batch.columns or []
    if columns:
        note(f"Columns carried into the results: {', '.join(columns)}")
    for column, name in zip(columns, carried_names(columns), strict=True):
        if column != name:
            note(f"In the results, the column {column!r} is called {name!r}")
    if plan.changed is not None:
        note(f"Results as started: {plan.changed}")
    for line in _repetitions(plan):
        note(line)
    if plan.paid_again:
        rows = counted(plan.paid_again, "failed row has", "failed rows have")
        note(f"{rows} completed runs: all runs of a row are started and paid again")
    for line in _causes(plan.to_change)[:_NAMED] if retried else ():
        note(f"Not retried: {line}")


def _repetitions(plan: "BatchPlan") -> list[str]:
    """A line for each row that is to start and whose inputs are those of rows before it."""
    alike: defaultdict[str, list[RowState]] = defaultdict(list)
    for row in plan.rows:
        alike[repr(row.inputs)].append(row)
    found = []
    for first, *others in alike.values():
        again = [row for row in others if not row.started]
        if again:
            costs = [plan.cost_of(row) for row in again]
            price = "" if None in costs else f", {money(sum(filter(None, costs)))} more"
            verb, each = (
                ("repeats", "it is a run") if len(again) == 1 else ("repeat", "each is a run")
            )
            lines = line_numbers([row.entry.line for row in again])
            found.append(
                f"{lines.capitalize()} {verb} line {first.entry.line}: {each} of its own{price}"
            )
    if len(found) > _REPEATS:
        rest = len(found) - _REPEATS
        found[_REPEATS:] = [f"{counted(rest, 'more row is', 'more rows are')} repeated"]
    return found


def intention(plan: "BatchPlan") -> str:
    """What starting the batch does, in a sentence."""
    missing, rows = len(plan.missing), len(plan.rows)
    if not missing and not plan.left_out:
        return f"Nothing to start: {counted(rows, 'row')}, all started before{_spent(plan)}."
    price = "price unknown" if plan.cost is None else f"at most {money(plan.cost)}"
    started = rows - missing - plan.left_out
    before = f"; {started:,} started before{_spent(plan)}" if started else ""
    left = f"; {counted(plan.left_out, 'row')} without a run left out" if plan.left_out else ""
    return f"To start: {missing:,} of {counted(rows, 'row')}, {price}{before}{left}."


def _spent(plan: "BatchPlan") -> str:
    """What the runs that were started before cost: bills, and quotes of those not billed yet."""
    records = [record for row in plan.rows for record in row.records]
    costs = [one.run.charged_cost for one in records]
    costs += [
        one.run.quoted_cost
        for one in records
        if one.run.charged_cost is None and not one.cost_final
    ]
    known = [cost for cost in costs if cost is not None]
    return f" for {money(sum(known, Decimal(0)))} so far" if known else ""


def print_plan(plan: "BatchPlan", *, as_json: bool) -> None:
    """Print what a dry run found."""
    if as_json:
        from tracker.views import plan_json

        starts = [
            {
                "row": row.entry.position,
                "line": row.entry.line,
                "key": row.entry.key,
                "inputs": row.inputs,
            }
            for row in plan.missing
        ]
        more = {"technique_id": plan.batch.technique_id, "starts": starts}
        print_json(plan_json(plan) | more)
        return
    print_table(
        ("row", "line", "key", "inputs"),
        (
            (
                *(row.entry.position, row.entry.line, row.entry.key),
                " ".join(f"{one['id']}={one['value']}" for one in row.inputs or ()),
            )
            for row in plan.missing
        ),
    )
    typer.echo(intention(plan))


def report_outcome(outcome: "BatchOutcome", *, waited: bool, seconds: float) -> bool:
    """A line for each cause of failure, and the totals, on stderr.

    Whether a row did not complete (not `waited`: was not started), other than those left out on
    request.
    """
    from tracker.starting.rows import RowsLeftOut

    counts = outcome.counts
    not_started = counts.unstarted - counts.unresolved - counts.doubt
    bad = [row for row in outcome.rows if not (row.done if waited else row.started)]
    untried = [row.entry.line for row in outcome.rows if _is_untried(row)]
    left_out = isinstance(outcome.stopped, RowsLeftOut)
    stopped = None if left_out else outcome.stopped
    if untried and left_out:
        rows = f"{counted(len(untried), 'row')} without a run"
        note(f"tracker: {rows} left out ({line_numbers(untried)})")
        bad = [row for row in bad if not _is_untried(row)]
    if stopped is not None:
        if untried:
            note(f"tracker: not started: {line_numbers(untried)}")
        note(
            f"tracker: stopped: {plain(stopped).rstrip('.')}. {not_started:,} of "
            f"{counted(counts.rows, 'row')} not started; repeat the command to continue"
        )
        # Rows that were never reached are covered by the reason why the command stopped.
        bad = [row for row in bad if row.why]
    _note_causes("tracker", _causes(bad), advice=": see the results")
    retryable = sum(row.retryable for row in bad)
    parts = [f"{counts.completed:,} of {counted(counts.rows, 'row')} completed"]
    parts += [
        f"{count:,} {name}"
        for name, count in {
            "running": counts.active,
            f"failed ({retryable:,} can be retried)" if retryable else "failed": counts.failed,
            "not found at FLORA": counts.lost,
            "unresolved": counts.unresolved,
            "in doubt": counts.doubt,
            "not started": not_started,
        }.items()
        if count
    ]
    note(
        f"Batch {outcome.batch.batch_id}: {', '.join(parts)}, {_cost_text(counts)}, "
        f"{duration(seconds)}."
    )
    return bool(bad) or stopped is not None


def _is_untried(row: "RowState") -> bool:
    return row.start is None or row.start.is_fresh


def _causes(rows: "Iterable[RowState]") -> list[str]:
    """A line for each cause for which rows did not complete, the most frequent first."""
    causes: defaultdict[tuple[str, str, str], list[RowState]] = defaultdict(list)
    for row in rows:
        run = None if row.record is None else row.record.run
        code = run.error.code if run is not None and run.error is not None else ""
        advice = "" if row.advice is None else _ADVICE[row.advice]
        causes[row.status, code or (row.why or ""), advice].append(row)
    found = []
    for (status, code, advice), alike in sorted(causes.items(), key=lambda one: -len(one[1])):
        why = alike[0].why or ""
        why = why if why.startswith(code) else code
        lines = line_numbers([row.entry.line for row in alike])
        advised = f"; {advice}" if advice else ""
        found.append(f"{len(alike):,} {status}{f': {why}' if why else ''} ({lines}{advised})")
    return found


def report_next_steps(
    outcome: "BatchOutcome", plan: "BatchPlan", *, shown: bool, downloaded: bool
) -> None:
    """The commands for the next step, ready to paste, on stderr. `shown` is whether the results are
    at hand, `downloaded` whether the files are."""
    arguments = [word for word in sys.argv[1:] if word not in _ONCE]
    repeated = "" if "-" in arguments else shlex.join(["tracker", *arguments])
    batch_id = outcome.batch.batch_id
    steps = []
    if outcome.stopped is not None and repeated:
        steps.append(f"{repeated}  # starts the rest")
    retried = [row for row in outcome.rows if row.retryable]
    if retried and repeated:
        costs = [plan.cost_of(row) for row in retried]
        price = "" if None in costs else f", up to {money(sum(filter(None, costs)))}"
        steps.append(f"{repeated} --retry-failed  # {counted(len(retried), 'row')}{price}")
    if outcome.counts.unresolved:
        unresolved = counted(outcome.counts.unresolved, "unresolved start")
        steps.append(f"tracker starts list --state unresolved  # {unresolved}: resolve each")
    if outcome.counts.completed and not downloaded:
        named = [shlex.join(["--name-by", column]) for column in (outcome.batch.columns or [])[:1]]
        steps.append(" ".join(["tracker runs download --batch", batch_id, "--to out", *named]))
    if not shown:
        steps.append(f"tracker batches show {batch_id} --output results.csv")
    if steps:
        note("Next:")
    for step in steps:
        note(f"  {step}")


def _cost_text(counts: "BatchCounts") -> str:
    """The cost of a batch: a lower bound and the quotes while bills may still change."""
    if counts.cost_final:
        return money(counts.cost)
    quotes = f" ({money(counts.quoted)} quoted, not billed yet)" if counts.quoted else ""
    return f"at least {money(counts.cost)}{quotes}"
