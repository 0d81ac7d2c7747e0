"""`tracker batch`: start a run for each row of a file, once each."""

import asyncio
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tracker.cli.batches import (
    OutputOption,
    ResultsOption,
    check_output,
    cost_text,
    print_batch,
)
from tracker.cli.output import JsonFlag, note, plain, print_json, print_table
from tracker.cli.progress import Screen, cell, screen
from tracker.cli.setup import (
    TagOption,
    TechniqueArgument,
    WorkspaceOption,
    flora_deadline,
    parsed_tags,
    run_once,
)
from tracker.core.errors import TrackerError
from tracker.core.formatting import counted, money
from tracker.core.tags import check_key

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from tracker.services import Services
    from tracker.starting.batch import BatchOutcome, BatchProgress
    from tracker.starting.batch_rows import BatchPlan
    from tracker.starting.sheet import ColumnMapping, Sheet, SheetProblem

_NAMED: Final = 20
"""How many rows that did not complete are named on stderr; the results hold all of them."""
_STATUS_SECONDS: Final = 5.0


class FileFormat(StrEnum):
    """The format of a file of rows."""

    CSV = "csv"
    JSONL = "jsonl"


def _parse_amount(text: str) -> Decimal:
    try:
        amount = Decimal(text.strip().removeprefix("$"))
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or amount < 0:
        raise typer.BadParameter(f"{text!r} is not an amount of USD")
    return amount


def batch(
    technique: TechniqueArgument,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="CSV or JSON lines in UTF-8; - reads stdin.")
    ],
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="INPUT=COLUMN",
            help="Column of an input, where their names differ. Repeatable.",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be started, and its cost.")
    ] = False,
    max_cost: Annotated[
        Decimal | None,
        typer.Option(
            metavar="USD",
            parser=_parse_amount,
            help="Start nothing if the rows could cost more than this.",
        ),
    ] = None,
    wait_for_budget: Annotated[
        bool,
        typer.Option(
            "--wait-for-budget",
            help="If a budget is used up, wait until it starts again, then continue.",
        ),
    ] = False,
    tag: TagOption = None,
    tag_column: Annotated[
        list[str] | None,
        typer.Option(
            "--tag-column",
            metavar="[KEY=]COLUMN",
            help="Column whose cells tag the runs of their rows. Repeatable.",
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Concurrent requests to FLORA. Default: TRACKER_API_CONCURRENCY.", min=1, max=20
        ),
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Start rows again whose columns map to other inputs since the technique changed.",
        ),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Run every row once more, and pay for it once more.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Start rows again that failed temporarily: once, after a wait where advised.",
        ),
    ] = False,
    retry_all: Annotated[
        bool, typer.Option("--retry-all", help="Start every row again whose run failed.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Report invalid rows and start the others.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until all runs have ended.")
    ] = True,
    format_: Annotated[
        FileFormat | None,
        typer.Option("--format", help="Format of FILE. Default: by its ending, else csv."),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(metavar="C", help="CSV delimiter: , or ; or tab.")
    ] = None,
    results: ResultsOption = None,
    output: OutputOption = None,
    as_json: JsonFlag = False,
) -> int:
    """Start a run for each row of a file.

    Each row is started once, however often the command is repeated. Columns are matched to the
    technique's inputs by name. An invalid row refuses the whole file before anything is paid. Exit
    status 1 if a row did not complete.
    """
    from tracker.starting.sheet import SheetRefused

    if again + retry_failed + retry_all > 1:
        raise typer.BadParameter(
            "cannot be combined with one another", param_hint="--again, --retry-failed, --retry-all"
        )
    mappings = [_mapping(text) for text in map_ or []]
    tags, tag_columns = parsed_tags(tag), dict(_tag_column(text) for text in tag_column or [])
    check_output(results, output)
    sheet = _read(file, format_, delimiter)
    name = "stdin" if file == "-" else Path(file).name

    async def work(services: "Services") -> "tuple[BatchPlan, bool, BatchOutcome | None]":
        from tracker.starting.batch_rows import Retry

        retry = Retry.FAILED if retry_failed else Retry.ALL if retry_all else None
        async with flora_deadline(services):
            plan, skipped = await services.batches.plan(
                technique,
                sheet,
                name=name,
                explicit=mappings,
                workspace_id=workspace,
                again=again,
                retry=retry,
                skip_bad_rows=skip_bad_rows,
                accept_changes=accept_changes,
                tags=tags,
                tag_columns=tag_columns,
            )
        _report_problems(name, skipped)
        if plan.unmapped:
            note(f"Columns that match no input: {', '.join(filter(None, plan.unmapped))}")
        if retry is not None:
            for row in plan.to_change:
                note(f"line {row.entry.line}: change the input: {row.why or ''}")
        _check_cost(plan, max_cost)
        if dry_run:
            return plan, bool(skipped), None
        note(_intention(plan))
        try:
            with screen(_columns) as shown:
                outcome = await services.batches.run(
                    plan,
                    concurrency=concurrency or services.settings.tracker_api_concurrency,
                    wait=wait,
                    on_progress=_BatchScreen(shown, name).show,
                    max_cost=max_cost,
                    wait_for_budget=wait_for_budget,
                )
        except asyncio.CancelledError:
            note("tracker: interrupted; started runs stay tracked. Repeat the command to continue")
            raise
        return plan, bool(skipped), outcome

    try:
        plan, skipped, outcome = run_once(
            work, needs_key=True, concurrency=concurrency, actor="batch"
        )
    except SheetRefused as refused:
        _report_problems(name, refused.problems)
        if as_json:
            print_json(
                {
                    "problems": [
                        {"line": one.line, "column": one.column, "message": one.message}
                        for one in refused.problems
                    ]
                }
            )
        raise
    if outcome is None:
        _print_plan(plan, as_json=as_json)
        return 0
    print_batch(
        *(outcome.batch, outcome.counts, outcome.rows),
        results=results,
        output=output,
        as_json=as_json,
    )
    return max(_exit_status(outcome, waited=wait), int(skipped))


def _mapping(text: str) -> "ColumnMapping":
    from tracker.starting.sheet import ColumnMapping

    name, equals, column = text.partition("=")
    input_id, colon, type_ = name.partition(":")
    if not (equals and input_id and column) or (colon and not type_):
        raise typer.BadParameter(
            f"{text!r} is not INPUT=COLUMN or INPUT:TYPE=COLUMN", param_hint="--map"
        )
    return ColumnMapping(input_id, column.strip(), type_ or None)


def _tag_column(text: str) -> tuple[str, str]:
    """A tag's key and column, from `KEY=COLUMN`, or `COLUMN` where that is a valid key."""
    key, equals, column = text.partition("=")
    try:
        return check_key(key), column if equals else key
    except ValueError as error:
        advice = "" if equals else f"; KEY={text} gives the tag another name"
        raise typer.BadParameter(f"{error}{advice}", param_hint="--tag-column") from error


def _read(file: str, format_: FileFormat | None, delimiter: str | None) -> "Sheet":
    """Read a file or stdin. Raises `BadParameter` where it cannot be read at all."""
    from tracker.starting.sheet import read_csv, read_jsonl

    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise typer.BadParameter(
            f"{file} cannot be read: {error.strerror}", param_hint="FILE"
        ) from error
    ending = "" if file == "-" else Path(file).suffix.lower()
    if format_ is FileFormat.JSONL or (format_ is None and ending in (".jsonl", ".ndjson")):
        return read_jsonl(data)
    names = {None: "\t" if ending == ".tsv" else ",", "tab": "\t", "\\t": "\t"}
    delimiter = names.get(delimiter, delimiter or "")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise typer.BadParameter("must be one character, or tab", param_hint="--delimiter")
    return read_csv(data, delimiter=delimiter)


def _report_problems(name: str, problems: "Sequence[SheetProblem]") -> None:
    for problem in problems:
        note(f"{name}: {problem}")


def _check_cost(plan: "BatchPlan", limit: Decimal | None) -> None:
    """Raise `TrackerError` where the plan could cost more than `limit`."""
    if limit is None or not plan.missing:
        return
    if plan.cost is None:
        raise TrackerError(
            f"FLORA shows no price for {plan.technique.technique_id}, so --max-cost cannot be "
            "checked; nothing was started"
        )
    if plan.cost > limit:
        raise TrackerError(
            f"starting {counted(len(plan.missing), 'row')} could cost {money(plan.cost)}, more "
            f"than --max-cost {money(limit)}; nothing was started"
        )


def _intention(plan: "BatchPlan") -> str:
    """What starting the batch does, in a sentence."""
    missing, rows = len(plan.missing), len(plan.rows)
    if not missing:
        return f"Nothing to start: {counted(rows, 'row')}, all started before."
    price = "price unknown" if plan.cost is None else f"at most {money(plan.cost)}"
    before = f"; {rows - missing} started before" if rows > missing else ""
    return f"To start: {missing} of {counted(rows, 'row')}, {price}{before}."


def _print_plan(plan: "BatchPlan", *, as_json: bool) -> None:
    """Print what a dry run found."""
    from tracker.views import number_json

    starts = [
        {
            "row": row.entry.position,
            "line": row.entry.line,
            "key": row.entry.key,
            "inputs": row.inputs,
        }
        for row in plan.missing
    ]
    if as_json:
        print_json(
            {
                "batch_id": plan.batch.batch_id,
                "technique_id": plan.batch.technique_id,
                "rows": len(plan.rows),
                "to_start": len(starts),
                "run_cost": number_json(plan.technique.run_cost),
                "cost": number_json(plan.cost),
                "starts": starts,
            }
        )
        return
    print_table(
        ("row", "line", "key", "inputs"),
        (
            (
                *(row.entry.position, row.entry.line, row.entry.key),
                " ".join(f"{one['id']}={one['value']}" for one in row.inputs),
            )
            for row in plan.missing
        ),
    )
    typer.echo(_intention(plan))


class _BatchScreen:
    """The progress of a batch: one bar on a terminal; elsewhere a line now and then."""

    def __init__(self, screen: Screen, name: str) -> None:
        self._screen = screen
        self._name = name
        self._stage: tuple[bool, bool] | None = None

    def show(self, progress: "BatchProgress") -> None:
        """Show how far the batch is."""
        counts, text = progress.counts, progress_text(progress)
        if self._screen.has_bars:
            self._screen.bar(
                self._name, done=counts.ended, total=counts.rows, text=lambda: (text, "")
            )
            return
        stage = (progress.left == 0, counts.active == 0)
        self._screen.status(text, seconds=_STATUS_SECONDS, now=stage != self._stage)
        self._stage = stage


def _columns() -> "Sequence[ProgressColumn]":
    from rich.progress import BarColumn, MofNCompleteColumn

    return BarColumn(), MofNCompleteColumn(), cell("text")


def progress_text(progress: "BatchProgress") -> str:
    """The progress of a batch in words: counts, cost, and what it waits for."""
    counts = progress.counts
    shown = {
        "running": counts.active,
        "completed": counts.completed,
        "failed": counts.failed,
        "lost": counts.lost,
        "could not be started": progress.errors,
    }
    parts = [
        f"{counts.started} of {counts.rows} started",
        *(f"{count} {name}" for name, count in shown.items() if count),
        cost_text(counts),
    ]
    if progress.left and progress.paused:
        parts.append(f"rate-limited by FLORA for {progress.paused:.0f} s")
    if progress.doubt:
        parts.append(f"waiting for the outcome of {progress.doubt} unanswered starts")
    if progress.held:
        parts.append(f"next start in {progress.held:.0f} s")
    if (over := progress.over_budget) is not None and over.renews_at is not None:
        renews = f"{over.renews_at:%Y-%m-%d %H:%M}"
        parts.append(f"waiting for the budget {over.budget}, which starts again at {renews} UTC")
    return ", ".join(parts)


def _exit_status(outcome: "BatchOutcome", *, waited: bool) -> int:
    """0 where all rows completed (not `waited`: were started); else 1. Reports the others."""
    bad = [row for row in outcome.rows if not (row.done if waited else row.started)]
    # Rows that were never reached are covered by the reason why the command stopped.
    named = [row for row in bad if row.why] if outcome.stopped else bad
    for row in named[:_NAMED]:
        run = "" if row.record is None else f"run {row.record.run.run_id} "
        why = f": {row.why}" if row.why else ""
        note(f"tracker: line {row.entry.line}: {run}{row.status}{why}")
    if len(named) > _NAMED:
        note(f"tracker: and {counted(len(named) - _NAMED, 'row')} more: see the results")
    counts = outcome.counts
    if outcome.stopped is not None:
        from tracker.starting.batch import spans

        left = [row.entry.line for row in outcome.rows if not row.started]
        if left:
            note(f"tracker: not started: {spans(left)}")
        note(
            f"tracker: stopped: {plain(outcome.stopped).rstrip('.')}. {counts.unstarted} of "
            f"{counted(counts.rows, 'row')} not started; repeat the command to continue"
        )
    note(
        f"Batch {outcome.batch.batch_id}: {counts.completed} of {counted(counts.rows, 'row')} "
        f"completed, {cost_text(counts)}."
    )
    return 1 if bad or outcome.stopped is not None else 0
