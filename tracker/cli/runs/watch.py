"""`tracker runs watch` and `explain`, and `--wait`: follow runs until they are settled."""

import asyncio
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.options import AS_JSON, RUN_ID, RUN_IDS, flag
from tracker.cli.output import Screen, note, plain, print_json, print_table, screen
from tracker.cli.setup import run_once
from tracker.core.clock import Clock
from tracker.core.errors import TrackerError
from tracker.core.formatting import duration, money
from tracker.core.record import Record
from tracker.core.run import RunStatus, Tracking

if TYPE_CHECKING:
    from tracker.core.observation import Source
    from tracker.polling.follow import RunUpdate
    from tracker.services import Services

_STYLES: Final = {"completed": "green", "failed": "red", "running": "yellow", "pending": "dim"}
_TIME: Final = "%Y-%m-%d %H:%M:%S"
_TIME_WIDTH: Final = len("2026-01-01 00:00:00")


def watch(
    run_ids: list[str] = RUN_IDS,
    as_json: bool = AS_JSON,
    json_lines: bool = flag("--json-lines", "Print a line of JSON on stdout for each change."),
) -> int:
    """Show the progress of runs until they are settled. Exit status 1 if one fails.

    Interrupting the command does not stop the runs: they stay tracked.
    """

    from tracker.views import run_json

    async def work(services: "Services") -> list[Record]:
        await require_known(services, run_ids)
        return await follow(services, run_ids, json_lines=json_lines)

    records = run_once(work)
    if as_json and not json_lines:
        print_json({"runs": [run_json(record) for record in records]})
    elif not json_lines:
        _print_results(records)
    return exit_status(records)


def explain(run_id: str = RUN_ID, as_json: bool = AS_JSON) -> None:
    """Explain a run: how it became known, what was observed when, and when it is polled next."""
    from tracker.views import explanation_json

    explanation = run_once(lambda services: services.explainer.explain(run_id))
    if explanation is None:
        raise unknown([run_id])
    if as_json:
        print_json(explanation_json(explanation))
        return
    typer.echo(f"Run {plain(run_id)} (times are UTC)\n")
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for sentence in explanation.sentences:
        left = "" if sentence.at is None else f"{sentence.at:{_TIME}}"
        for line in textwrap.wrap(plain(sentence.text), max(columns - _TIME_WIDTH - 2, 40)) or [""]:
            typer.echo(f"{left:<{_TIME_WIDTH}}  {line}")
            left = ""


async def require_known(services: "Services", run_ids: Sequence[str]) -> None:
    """Raise `TrackerError`, naming them, where runs are not in the database."""
    from tracker.store.queries import runs as read

    found = await read.get_runs(services.database, run_ids)
    if missing := [run_id for run_id in run_ids if run_id not in found]:
        raise unknown(missing)


def unknown(run_ids: Sequence[str]) -> TrackerError:
    """The error for runs that are not in the database."""
    verb = "is" if len(run_ids) == 1 else "are"
    return TrackerError(
        f"run {', '.join(run_ids)} {verb} not known: `tracker runs track {run_ids[0]}` tracks it"
    )


async def follow(
    services: "Services", run_ids: Sequence[str], *, json_lines: bool = False
) -> list[Record]:
    """Show progress on stderr until all runs are settled or lost; return them in this order.

    With `json_lines`, each change is a line of JSON on stdout instead.
    """
    from tracker.views import run_json

    known: dict[str, Record] = {}
    try:
        with screen(transient=False) as shown:
            runs = RunScreen(shown, services.clock)
            async with (
                services.signals,
                aclosing(services.follower.follow(run_ids, notify=shown.notice)) as changes,
            ):
                async for observed in changes:
                    known |= {record.run.run_id: record for record, _ in observed}
                    if not json_lines:
                        runs.show(observed)
                        continue
                    for record, source in observed:
                        line: dict[str, Any] = {**run_json(record), "last_source": str(source)}
                        typer.echo(json.dumps(line, separators=(",", ":")))
    except asyncio.CancelledError:
        active = [plain(key) for key, one in known.items() if one.tracking is Tracking.ACTIVE]
        if active:
            which = f"run {active[0]} stays" if len(active) == 1 else f"{len(active)} runs stay"
            again = " ".join(active[:3]) + (" …" if len(active) > 3 else "")
            note(
                f"tracker: interrupted; {which} tracked. `tracker runs watch {again}` follows again"
            )
        raise
    return [known[run_id] for run_id in run_ids if run_id in known]


def exit_status(records: Iterable[Record]) -> int:
    """0 where all runs completed, else 1, with a line on stderr for each that did not."""
    status = 0
    for record in records:
        run = record.run
        if run.status is RunStatus.COMPLETED and run.settled:
            continue
        error = filter(None, (run.error.code, run.error.message)) if run.error else ()
        note(f"tracker: run {run.run_id} {run.status}: {': '.join(error) or record.tracking}")
        status = 1
    return status


class RunScreen:
    """The progress of runs: a bar for each on a terminal, a line for each change elsewhere."""

    def __init__(self, screen: Screen, clock: Clock) -> None:
        self._screen = screen
        self._clock = clock
        self._states: dict[str, str] = {}

    def show(self, observed: "Iterable[RunUpdate]") -> None:
        for record, source in observed:
            run_id, state = record.run.run_id, _state(record)
            if self._screen.has_bars:
                self._show_bar(record, source)
            # A line for each change of the run, not of its source or of the time it takes.
            elif self._states.get(run_id) != state:
                self._states[run_id] = state
                self._screen.line(f"{run_id} {state}  {_elapsed(record, self._clock)}  {source}")

    def _show_bar(self, record: Record, source: "Source | str") -> None:
        run = record.run
        error = f"  {plain(record.last_error)}" if record.last_error else ""
        self._screen.bar(
            run.run_id,
            done=100 if record.tracking is Tracking.SETTLED else run.progress,
            total=100,
            text=lambda task: (
                (f"{plain(run.status):<9}", _STYLES.get(run.status, "")),
                f" {task.percentage:3.0f} %  {_elapsed(record, self._clock)}  ",
                (f"{source}{error}", "dim"),
            ),
        )


def _state(record: Record) -> str:
    """Status and progress, with what is missing or went wrong."""
    run = record.run
    if record.tracking is Tracking.SETTLED:
        return f"{run.status}, settled"
    if record.tracking is Tracking.LOST:
        return f"{run.status}, not found at FLORA"
    words = f"{run.status} {run.progress:g} %"
    if run.precedence.ended:
        words += ", fetching results"
    return words if record.last_error is None else f"{words} ({record.last_error})"


def _took(record: Record) -> str | None:
    """How long the run took at FLORA; `None` where that is not known."""
    end = record.run.completed_at
    return None if end is None else duration(end - record.created_at)


def _elapsed(record: Record, clock: Clock) -> str:
    return _took(record) or duration((record.settled_at or clock()) - record.created_at)


def _print_results(records: Sequence[Record]) -> None:
    print_table(
        ("run", "status", "cost", "took", "source of the end"),
        [
            (
                one.run.run_id,
                one.run.status if one.run.settled else f"{one.run.status}, {one.tracking}",
                _cost(one),
                _took(one),
                one.ended_via,
            )
            for one in records
        ],
    )
    rows = [
        (plain(one.run.run_id), plain(output.output_id), plain(output.type), plain(output.url))
        for one in records
        for output in one.run.outputs or ()
    ]
    if rows:
        typer.echo()
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for *cells, link in rows:  # not a table, which would fold the links
        padded = (f"{text:<{width}}" for text, width in zip(cells, widths, strict=True))
        typer.echo("  ".join([*padded, link]))


def _cost(record: Record) -> str | None:
    run = record.run
    if run.charged_cost is not None:
        return money(run.charged_cost)
    if run.quoted_cost is None or record.cost_final:
        return None
    return f"not billed yet ({money(run.quoted_cost)} quoted)"
