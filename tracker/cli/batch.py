"""`tracker batch`: start a run for each row of a file, once each, and keep the outputs as files."""

import asyncio
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from tracker.cli.batches import (
    OUTPUT,
    RESULTS,
    Results,
    check_output,
    intention,
    print_batch,
    print_plan,
    report_next_steps,
    report_outcome,
    report_plan,
    report_problems,
)
from tracker.cli.command import (
    AS_JSON,
    TAGS,
    TECHNIQUE,
    WORKSPACE,
    argument,
    checked,
    flag,
    flora_deadline,
    option,
    parse_value,
    parsed_tags,
    repeatable,
    run_once,
)
from tracker.cli.download import ALLOW_PRIVATE, NAME_BY, report_files, report_json
from tracker.cli.output import BAR_WIDTH, Screen, note, print_json, screen
from tracker.core.errors import TrackerError
from tracker.core.formatting import counted, money, parse_usd
from tracker.core.starts import check_tag_key
from tracker.starting.sheet import Sheet, SheetFormat, SheetRefused, read_sheet

if TYPE_CHECKING:
    from tracker.delivering.files import FileKey
    from tracker.delivering.saving import DownloadResult
    from tracker.services import Services
    from tracker.starting.batches import BatchOutcome, BatchProgress
    from tracker.starting.plan import ColumnMapping
    from tracker.starting.rows import BatchPlan

_STATUS_SECONDS: Final = 5.0
_WIDTH: Final = 79
_NAME: Final = 16
"""Characters of a sheet's name beside its bar."""


def batch(
    technique: str = TECHNIQUE,
    file: str = argument("FILE", "Excel (.xlsx), CSV or JSON lines; - reads stdin."),
    map_: list[str] = repeatable(
        "--map", "INPUT=COLUMN", "Column of an input, where their names differ."
    ),
    workspace: str | None = WORKSPACE,
    dry_run: bool = flag("--dry-run", "Only show what would be started, and its cost."),
    max_cost: Decimal | None = option(
        "Start nothing if the rows could cost more than this.",
        metavar="USD",
        parser=lambda text: checked(parse_usd, text),
    ),
    wait_for_budget: bool = flag(
        "--wait-for-budget", "If a budget is used up, wait until it starts again, then continue."
    ),
    tag: list[str] = TAGS,
    tag_column: list[str] = repeatable(
        "--tag-column", "[KEY=]COLUMN", "Column whose cells tag the runs of their rows."
    ),
    concurrency: int | None = option(
        "Concurrent requests to FLORA. Default: TRACKER_API_CONCURRENCY.", min=1, max=20
    ),
    accept_changes: bool = flag(
        "--accept-changes",
        "Start rows again whose columns map to other inputs since the technique changed.",
    ),
    again: bool = flag("--again", "Run every row once more, and pay for it once more."),
    retry_failed: bool = flag(
        "--retry-failed",
        "Start rows again that failed temporarily: once, after a wait where advised.",
    ),
    retry_all: bool = flag("--retry-all", "Start every row again whose run failed."),
    only_failed: bool = flag(
        "--only-failed", "With --retry-failed or --retry-all: leave out rows without a run."
    ),
    skip_bad_rows: bool = flag("--skip-bad-rows", "Report invalid rows and start the others."),
    wait: bool = option("Wait until all runs have ended.", "--wait/--no-wait", default=True),
    yes: bool = flag("--yes", "Start without asking. Only a terminal is asked.", "-y"),
    download: Path | None = option(
        "Save the outputs as files here, as the runs end.", metavar="DIR"
    ),
    name_by: str | None = NAME_BY,
    allow_private: bool = ALLOW_PRIVATE,
    format_: SheetFormat | None = option(
        "Format of FILE. Default: by content and ending, else csv.", "--format"
    ),
    sheet_name: str | None = option(
        "Sheet of a workbook. Default: the first.", "--sheet", metavar="NAME"
    ),
    delimiter: str | None = option(
        "CSV delimiter: one character or tab. Default: detected.", metavar="C"
    ),
    encoding: str | None = option("Encoding, such as cp1252. Default: detected.", metavar="NAME"),
    results: Results | None = RESULTS,
    output: Path | None = OUTPUT,
    as_json: bool = AS_JSON,
) -> int:
    """Start a run for each row of a file.

    Each row is started once, however often the command is repeated. Columns are matched to the
    technique's inputs by name. An invalid row refuses the whole file before anything is paid. Exit
    status 1 if a row did not complete.
    """
    from tracker.delivering.downloads import DownloadOptions, DownloadReport
    from tracker.delivering.files import DownloadDirectory
    from tracker.delivering.saving import naming_column
    from tracker.starting.rows import Retry
    from tracker.views import values_of

    if again + retry_failed + retry_all > 1:
        raise typer.BadParameter(
            "cannot be combined with one another", param_hint="--again, --retry-failed, --retry-all"
        )
    if only_failed and not (retry_failed or retry_all):
        raise typer.BadParameter(
            "goes with --retry-failed or --retry-all only", param_hint="--only-failed"
        )
    if download is not None and not wait:
        raise typer.BadParameter("waits for the runs: leave out --no-wait", param_hint="--download")
    if name_by is not None and download is None:
        raise typer.BadParameter("goes with --download only", param_hint="--name-by")
    mappings = [_mapping(text) for text in map_]
    tags, tag_columns = parsed_tags(tag), dict(_tag_column(text) for text in tag_column)
    check_output(results, output)
    sheet = _read(file, format_, delimiter, encoding, sheet_name)
    name = "stdin" if file == "-" else Path(file).name
    if sheet.detected:
        note(f"{name}: read with {sheet.detected}")
    retry = Retry.FAILED if retry_failed else Retry.ALL if retry_all else None
    files = DownloadReport()

    async def plan_rows(services: "Services") -> "tuple[BatchPlan, bool]":
        """The plan, and whether rows are skipped; all is checked that can be known now."""
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
        plan = replace(plan, only_failed=only_failed)
        report_problems(name, skipped)
        report_plan(plan, retried=retry is not None)
        if name_by is not None:
            naming_column(plan.batch, name_by)
        plan.check_cost(max_cost, name="--max-cost")
        return plan, bool(skipped)

    async def launch(services: "Services", plan: "BatchPlan") -> "BatchOutcome":
        """Start the rows and follow their runs, with downloads if they are wanted."""
        if download is not None:
            with DownloadDirectory(download):
                pass  # it can be written to: known before anything is paid
        with screen() as shown:
            display = BatchScreen(shown, name, downloads=download is not None, waits=wait)
            running = services.batches.run(
                plan,
                concurrency=services.settings.tracker_api_concurrency,
                wait=wait,
                on_progress=display.show,
                max_cost=max_cost,
                wait_for_budget=wait_for_budget,
            )
            if download is None:
                return await running
            async with services.signals:
                return await services.downloader.alongside(
                    running,
                    plan.batch.batch_id,
                    DownloadOptions(
                        to=download,
                        allow_private=allow_private or services.settings.flora_is_local,
                    ),
                    files,
                    begun=display.begun,
                    name_by=name_by,
                    on_result=display.show_file,
                )

    async def work(services: "Services") -> "tuple[BatchPlan, bool, BatchOutcome | None]":
        """As `plan_rows`, with the outcome where anything was to be started."""
        plan, skipped = await plan_rows(services)
        if dry_run:
            return plan, skipped, None
        note(intention(plan))
        if not (yes or await _confirmed(plan)):
            raise TrackerError("nothing was started")
        try:
            return plan, skipped, await launch(services, plan)
        except asyncio.CancelledError:
            note("tracker: interrupted; started runs stay tracked. Repeat the command to continue")
            raise

    began = time.monotonic()
    try:
        plan, skipped, outcome = run_once(
            work, needs_key=True, concurrency=concurrency, actor="batch"
        )
    except SheetRefused as refused:
        report_problems(name, refused.problems)
        if as_json:
            problems = [values_of(one, "line", "column", "message") for one in refused.problems]
            print_json({"problems": problems})
        raise
    if outcome is None:
        print_plan(plan, as_json=as_json)
        return 0
    print_batch(
        outcome.batch,
        outcome.counts,
        outcome.rows,
        results=results,
        output=output,
        as_json=as_json,
        # The program that wrote the sheet can read the results.
        delimiter=sheet.delimiter,
        bom=sheet.bom,
        more={} if download is None else {"downloads": report_json(files, download)},
    )
    failed = report_outcome(outcome, waited=wait, seconds=time.monotonic() - began)
    if download is not None:
        failed |= report_files(files, download)
    at_hand = output is not None or as_json or not sys.stdout.isatty()
    report_next_steps(outcome, plan, shown=at_hand, downloaded=download is not None)
    return int(failed or skipped)


def _mapping(text: str) -> "ColumnMapping":
    from tracker.starting.plan import ColumnMapping

    form = "INPUT=COLUMN or INPUT:TYPE=COLUMN"
    input_id, type_, column = parse_value(text, form, "--map")
    if not column:
        raise typer.BadParameter(f"{text!r} is not {form}", param_hint="--map")
    return ColumnMapping(input_id, column.strip(), type_)


def _tag_column(text: str) -> tuple[str, str]:
    """A tag's key and column, from `KEY=COLUMN`, or `COLUMN` where that is a valid key."""
    key, equals, column = text.partition("=")
    try:
        return check_tag_key(key), column if equals else key
    except ValueError as error:
        advice = "" if equals else f"; KEY={text} gives the tag another name"
        raise typer.BadParameter(f"{error}{advice}", param_hint="--tag-column") from error


def _read(
    file: str,
    file_format: SheetFormat | None,
    delimiter: str | None,
    encoding: str | None,
    sheet_name: str | None,
) -> Sheet:
    """Read a file or stdin. Raises `BadParameter` where it cannot be read at all."""
    delimiter = "\t" if delimiter in ("tab", "\\t") else delimiter
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise typer.BadParameter("must be one character, or tab", param_hint="--delimiter")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise typer.BadParameter(
            f"{file} cannot be read: {error.strerror}", param_hint="FILE"
        ) from error
    ending = "" if file == "-" else Path(file).suffix.lower()
    if file_format is None and ending in (".jsonl", ".ndjson"):
        file_format = SheetFormat.JSONL
    try:
        return read_sheet(
            data,
            file_format=file_format,
            delimiter=delimiter or ("\t" if ending == ".tsv" else None),
            encoding=encoding,
            sheet_name=sheet_name,
        )
    except LookupError as error:
        raise typer.BadParameter(f"{encoding!r} is not known", param_hint="--encoding") from error


async def _confirmed(plan: "BatchPlan") -> bool:
    """Ask on the terminal whether to start the rows; without a terminal, yes.

    Anything but y or yes is no. The wait for the answer can be interrupted.
    """
    if not plan.missing or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    price = "price unknown" if plan.cost is None else f"up to {money(plan.cost)}"
    typer.echo(f"Start {counted(len(plan.missing), 'run')}, {price}? [y/N] ", err=True, nl=False)
    answered = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), answered.set)
    try:
        await answered.wait()
    except asyncio.CancelledError:
        typer.echo(err=True)
        note("tracker: interrupted; nothing was started")
        raise
    finally:
        loop.remove_reader(sys.stdin.fileno())
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class BatchScreen:
    """The progress of a batch: one bar on a terminal; elsewhere a line now and then.

    `begun` is set when the batch is stored; `waits` is whether the command waits for its runs.
    """

    def __init__(
        self, screen: Screen, name: str, *, downloads: bool = False, waits: bool = True
    ) -> None:
        self._screen = screen
        self._waits = waits
        self._name = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
        self._phase: tuple[bool, bool] | None = None
        self._said_doubt = False
        self._progress: BatchProgress | None = None
        self._files: set[FileKey] | None = set() if downloads else None
        self.begun = asyncio.Event()

    def show_file(self, result: "DownloadResult") -> None:
        """Count a file that is there."""
        if self._files is not None and result.entry is not None:
            self._files.add(result.job.key)
            if self._progress is not None and self._screen.has_bars:
                self.show(self._progress)

    def show(self, progress: "BatchProgress") -> None:
        self.begun.set()
        self._progress = progress
        files = None if self._files is None else len(self._files)
        counts = progress.counts
        only_doubt = progress.doubt and not (progress.left or counts.active)
        if only_doubt and self._waits and not self._said_doubt:
            self._said_doubt = True
            self._screen.notice(
                f"waiting for {counted(progress.doubt, 'start')} in doubt: see `tracker starts "
                "list`. If you interrupt the command, a running worker resolves them"
            )
        if self._screen.has_bars:
            text = progress_text(progress, files, width=_WIDTH - _NAME - BAR_WIDTH - 2)
            done, total = counts.ended, counts.rows
            self._screen.bar(self._name, done=done, total=total, text=lambda _: [text])
            return
        phase = (progress.left == 0, counts.active == 0)
        text = progress_text(progress, files)
        self._screen.status(text, seconds=_STATUS_SECONDS, now=phase != self._phase)
        self._phase = phase


def progress_text(
    progress: "BatchProgress", files: int | None = None, *, width: int = _WIDTH
) -> str:
    """The progress of a batch in at most `width` characters; what does not fit is left out, the
    least important first."""
    counts = progress.counts
    if progress.left:
        text = f"{counts.started} of {counts.rows} started"
    else:
        text = f"{counts.completed} of {counts.rows} completed"
    shown = {
        "running": counts.active,
        "failed": counts.failed,
        "lost": counts.lost,
        "not startable": progress.errors,
    }
    parts = [f"{count} {name}" for name, count in shown.items() if count]
    if (over := progress.over_budget) is not None and over.renews_at is not None:
        parts.append(f"waiting for the budget {over.budget} until {over.renews_at:%m-%d %H:%M} UTC")
    elif progress.left and progress.paused:
        parts.append(f"paused for {progress.paused:.0f} s")
    elif progress.held:
        parts.append(f"next start in {progress.held:.0f} s")
    if progress.doubt:
        parts.append(f"{progress.doubt} in doubt")
    if counts.called_back and not (progress.left or counts.active):
        parts.append(f"{counted(counts.called_back, 'callback')} missing")
    parts.append(money(counts.cost) if counts.cost_final else f"{money(counts.cost)} so far")
    if files is not None:
        parts.append(counted(files, "file"))
    for part in parts:
        if len(text) + 2 + len(part) <= width:
            text += f", {part}"
    return text
