"""What `tracker batch` reports: problems of the sheet, the price, progress, totals, next steps."""

import asyncio
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.batches.batches import cost_text
from tracker.cli.output import BAR_WIDTH, Screen, note, plain, print_json, print_table
from tracker.core.formatting import counted, duration, line_numbers, money
from tracker.core.run import RetryAdvice

if TYPE_CHECKING:
    from tracker.delivering.files import FileKey
    from tracker.delivering.saving import DownloadResult
    from tracker.starting.batches.batches import BatchOutcome, BatchProgress
    from tracker.starting.batches.rows import BatchPlan, RowState
    from tracker.starting.sheets.sheet import SheetProblem

_NAMED: Final = 20
"""How many causes are named; the results hold every row."""
_REPEATS: Final = 5
"""How many repeated rows are named."""
_STATUS_SECONDS: Final = 5.0
_WIDTH: Final = 79
_NAME: Final = 16
_ONCE: Final = ("--again", "--retry-failed", "--retry-all", "--yes", "-y", "--no-wait", "--json")
"""Options that the command for the next step does not repeat."""
_ADVICE: Final[dict[str, str]] = {
    RetryAdvice.RETRY_NOW: "can be retried",
    RetryAdvice.RETRY_LATER: "can be retried later",
    RetryAdvice.CHANGE_INPUT: "change the input",
    RetryAdvice.NOT_RETRYABLE: "a retry does not help",
}


def report_problems(name: str, problems: "Sequence[SheetProblem]") -> None:
    """One line on stderr for each cause, with the lines of the sheet that have it."""
    from tracker.starting.sheets.sheet import problem_lines

    _note_causes(name, problem_lines(problems))


def _note_causes(prefix: str, lines: Sequence[str], advice: str = "") -> None:
    for line in lines[:_NAMED]:
        note(f"{prefix}: {line}")
    if len(lines) > _NAMED:
        note(f"{prefix}: {counted(len(lines) - _NAMED, 'more cause')}{advice}")


def report_plan(plan: "BatchPlan", *, retried: bool) -> None:
    """What is carried, renamed and repeated, and what a retry leaves out, on stderr."""
    from tracker.starting.batches.rows import carried_names

    columns = plan.batch.columns or []
    if columns:
        note(f"Columns carried into the results: {', '.join(columns)}")
    for column, name in zip(columns, carried_names(columns), strict=True):
        if column != name:
            note(f"In the results, the column {column!r} is called {name!r}")
    for line in _repetitions(plan):
        note(line)
    for line in _causes(plan.to_change)[:_NAMED] if retried else ():
        note(f"Not retried: {line}")


def _repetitions(plan: "BatchPlan") -> list[str]:
    """A line for each row that is to start and whose inputs are those of rows before it."""
    alike: defaultdict[str, list[Any]] = defaultdict(list)
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
    if not missing:
        return f"Nothing to start: {counted(rows, 'row')}, all started before{_spent(plan)}."
    price = "price unknown" if plan.cost is None else f"at most {money(plan.cost)}"
    before = f"; {rows - missing:,} started before{_spent(plan)}" if rows > missing else ""
    return f"To start: {missing:,} of {counted(rows, 'row')}, {price}{before}."


def _spent(plan: "BatchPlan") -> str:
    """What the runs that were started before cost: bills, else quotes."""
    runs = [one.record.run for one in plan.rows if one.record is not None]
    costs = [run.quoted_cost if run.charged_cost is None else run.charged_cost for run in runs]
    known = [cost for cost in costs if cost is not None]
    return f" for {money(sum(known, Decimal(0)))} so far" if known else ""


async def confirmed(plan: "BatchPlan") -> bool:
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
    parts.append(money(counts.cost) if counts.cost_final else f"{money(counts.cost)} so far")
    if files is not None:
        parts.append(counted(files, "file"))
    for part in parts:
        if len(text) + 2 + len(part) <= width:
            text += f", {part}"
    return text


def report_outcome(outcome: "BatchOutcome", *, waited: bool, seconds: float) -> bool:
    """A line for each cause of failure, and the totals, on stderr.

    Whether a row did not complete (not `waited`: was not started).
    """
    counts = outcome.counts
    not_started = counts.unstarted - counts.unresolved - counts.doubt
    bad = [row for row in outcome.rows if not (row.done if waited else row.started)]
    if outcome.stopped is not None:
        left = [row.entry.line for row in outcome.rows if row.start is None or row.start.is_fresh]
        if left:
            note(f"tracker: not started: {line_numbers(left)}")
        note(
            f"tracker: stopped: {plain(outcome.stopped).rstrip('.')}. {not_started:,} of "
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
        f"Batch {outcome.batch.batch_id}: {', '.join(parts)}, {cost_text(counts)}, "
        f"{duration(seconds)}."
    )
    return bool(bad) or outcome.stopped is not None


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
