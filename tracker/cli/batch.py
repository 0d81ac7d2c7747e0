"""`tracker batch`: a run for each row of a sheet, once each."""

import asyncio
import sys
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracker.cli import batch_progress
from tracker.cli.arguments import TagOption, parsed_tags
from tracker.cli.batch_output import OutputOption, ResultsOption, check_output, form, show_rows
from tracker.cli.batch_report import (
    exit_status,
    intention,
    keep_to,
    outcome_json,
    problem_json,
    show_plan,
    tell_changes,
    tell_problems,
)
from tracker.cli.errand import note, patience, run_once
from tracker.cli.output import JsonFlag, plain, print_json
from tracker.core.tags import check_key
from tracker.starting.sheet import Mapping, Sheet, SheetRefused, read_csv, read_jsonl

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.starting.batch import Outcome
    from tracker.starting.batch_rows import Plan


class Format(StrEnum):
    """How a sheet is written."""

    CSV = "csv"
    JSONL = "jsonl"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(batch)


def batch(
    technique: Annotated[str, typer.Argument(metavar="TECHNIQUE", help="Its id or its slug.")],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="CSV or JSON lines in UTF-8; - is stdin.")
    ],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="INPUT=COLUMN",
            help="Which column is which input, where the names do not say it. Repeatable.",
        ),
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(metavar="W", help="Workspace id, where several are configured."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be started, and its cost.")
    ] = False,
    max_cost: Annotated[
        str | None,
        typer.Option(metavar="USD", help="Start nothing where it could cost more than this."),
    ] = None,
    wait_for_budget: Annotated[
        bool,
        typer.Option(
            "--wait-for-budget",
            help="Where a budget is used up, wait until it begins anew, and go on.",
        ),
    ] = False,
    tag: TagOption = None,
    tag_column: Annotated[
        list[str] | None,
        typer.Option(
            "--tag-column",
            metavar="[KEY=]COLUMN",
            help="A column whose cells are tags of their rows' runs. Repeatable.",
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Requests at a time; else TRACKER_API_CONCURRENCY.", min=1, max=20),
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Start rows anew whose columns are read otherwise since the technique changed.",
        ),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Run every row once more, and pay once more.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Start rows again that failed temporarily: once, or after a wait.",
        ),
    ] = False,
    retry_all: Annotated[
        bool, typer.Option("--retry-all", help="Start every row again whose run failed.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Report wrong rows and start the others.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until all runs have ended.")
    ] = True,
    format_: Annotated[
        Format | None, typer.Option("--format", help="How FILE is written; else by its ending.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(metavar="C", help="What parts CSV cells: , or ; or tab.")
    ] = None,
    results: ResultsOption = None,
    output: OutputOption = None,
    as_json: JsonFlag = False,
) -> int:
    """Start a run for each row of a sheet, once each however often the command is repeated.

    The columns are the technique's inputs. A sheet that is wrong is refused whole, before anything
    is paid. Exit status 1 where a row did not complete.
    """
    if again + retry_failed + retry_all > 1:
        raise typer.BadParameter(
            "cannot be combined with one another", param_hint="--again, --retry-failed, --retry-all"
        )
    mappings = [_mapping(text) for text in given or []]
    tags, tag_columns = parsed_tags(tag), dict(_tag_column(text) for text in tag_column or [])
    limit = None if max_cost is None else _amount(max_cost)
    check_output(results, output)
    sheet = _read(file, format_, delimiter)
    name = "stdin" if file == "-" else Path(file).name

    async def work(services: "Services") -> "tuple[Plan, bool, Outcome | None]":
        from tracker.starting.batch_rows import Retry

        retry = Retry.FAILED if retry_failed else Retry.ALL if retry_all else None
        async with patience(services):
            plan, skipped = await services.batches.plan(
                technique,
                sheet,
                name=name,
                given=mappings,
                workspace_id=workspace,
                again=again,
                retry=retry,
                skip_bad_rows=skip_bad_rows,
                accept_changes=accept_changes,
                tags=tags,
                tag_columns=tag_columns,
            )
        tell_problems(name, skipped)
        if plan.unmapped:
            note(f"Columns that are no input: {plain(', '.join(filter(None, plan.unmapped)))}")
        if retry is not None:
            tell_changes(plan)
        keep_to(limit, plan)
        if dry_run:
            return plan, bool(skipped), None
        note(intention(plan))
        seats = concurrency or services.settings.tracker_api_concurrency
        try:
            with batch_progress.shown(name) as tell:
                outcome = await services.batches.run(
                    plan,
                    concurrency=seats,
                    wait=wait,
                    tell=tell,
                    max_cost=limit,
                    wait_for_budget=wait_for_budget,
                )
        except asyncio.CancelledError:
            note("tracker: interrupted; what is started stays tracked. Repeat the command to go on")
            raise
        return plan, bool(skipped), outcome

    try:
        plan, skipped, outcome = run_once(
            work, needs_key=True, concurrency=concurrency, actor="batch"
        )
    except SheetRefused as refused:
        tell_problems(name, refused.problems)
        if as_json:
            print_json({"problems": [problem_json(one) for one in refused.problems]})
        raise
    if outcome is None:
        show_plan(plan, as_json=as_json)
        return 0
    if as_json:
        print_json(outcome_json(outcome.batch, outcome.tally, outcome.rows))
    if output is not None or not as_json:
        show_rows(outcome.rows, form(results, output), output)
    return max(exit_status(outcome, waited=wait), int(skipped))


def _mapping(text: str) -> Mapping:
    name, equals, column = text.partition("=")
    input_id, colon, type_ = name.partition(":")
    if not (equals and input_id and column) or (colon and not type_):
        raise typer.BadParameter(
            f"{text!r} is not INPUT=COLUMN or INPUT:TYPE=COLUMN", param_hint="--map"
        )
    return Mapping(input_id, column.strip(), type_ or None)


def _tag_column(text: str) -> tuple[str, str]:
    """The key of a tag and its column, from `KEY=COLUMN`, or `COLUMN` where that can be a key."""
    key, equals, column = text.partition("=")
    try:
        return check_key(key), column if equals else key
    except ValueError as error:
        advice = "" if equals else f"; KEY={text} gives the tag another name"
        raise typer.BadParameter(f"{error}{advice}", param_hint="--tag-column") from error


def _amount(text: str) -> Decimal:
    try:
        amount = Decimal(text.strip().removeprefix("$"))
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or amount < 0:
        raise typer.BadParameter(f"{text!r} is not an amount of USD", param_hint="--max-cost")
    return amount


def _read(file: str, format_: Format | None, delimiter: str | None) -> Sheet:
    """The sheet, from stdin or a file. Raises `BadParameter` where it cannot be read at all."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise typer.BadParameter(
            f"{file} cannot be read: {error.strerror}", param_hint="FILE"
        ) from error
    ending = "" if file == "-" else Path(file).suffix.lower()
    if format_ is Format.JSONL or (format_ is None and ending in (".jsonl", ".ndjson")):
        return read_jsonl(data)
    parted = {None: "\t" if ending == ".tsv" else ",", "tab": "\t", "\\t": "\t"}
    delimiter = parted.get(delimiter, delimiter or "")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise typer.BadParameter("must be one character, or tab", param_hint="--delimiter")
    return read_csv(data, delimiter=delimiter)
