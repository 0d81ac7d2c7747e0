"""`tracker runs`: start, track, list, show, watch and explain runs."""

import asyncio
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import typer

from tracker.cli.command import (
    AS_JSON,
    CURSOR,
    LIMIT,
    OF_WORKSPACE,
    RUN_ID,
    RUN_IDS,
    TAGS,
    TECHNIQUE,
    WORKSPACE,
    checked,
    flag,
    flora_deadline,
    option,
    parse_value,
    parsed_tags,
    print_list,
    repeatable,
    run_on_database,
    run_once,
)
from tracker.cli.output import (
    Screen,
    note,
    plain,
    print_fields,
    print_json,
    print_table,
    print_with_inputs,
    screen,
)
from tracker.core.clock import Clock
from tracker.core.errors import FloraError, StoreError, TrackerError
from tracker.core.formatting import counted, duration, money
from tracker.core.record import Record
from tracker.core.run import RetryAdvice, RunStatus, Tracking
from tracker.core.starts import parse_tag

if TYPE_CHECKING:
    from tracker.core.observation import Source
    from tracker.polling.follow import More, RunUpdate
    from tracker.services import Services
    from tracker.starting.resolve import TrackedRun
    from tracker.store.engine import Database

_STYLES: Final = {"completed": "green", "failed": "red", "running": "yellow", "pending": "dim"}
_TIME: Final = "%Y-%m-%d %H:%M:%S"
_TIME_WIDTH: Final = len("2026-01-01 00:00:00")

app = typer.Typer(name="runs", help="Start, track, list and show runs.", no_args_is_help=True)


@app.command()
def start(
    technique: str = TECHNIQUE,
    inputs: list[str] = repeatable(
        "--input", "ID=VALUE", "Value of an input. ID:TYPE=VALUE if the technique names no type."
    ),
    workspace: str | None = WORKSPACE,
    tag: list[str] = TAGS,
    idempotency_key: str | None = option(
        "Repeating the command with the same key starts no run.", metavar="K"
    ),
    wait: bool = flag("--wait", "Wait for the end of its runs; exit status 1 if one fails."),
    as_json: bool = AS_JSON,
) -> int:
    """Start a run and track it."""
    form = "ID=VALUE or ID:TYPE=VALUE"
    values = [parse_value(text, form, "--input") for text in inputs]
    tags = parsed_tags(tag)

    async def work(services: "Services") -> list[Record]:
        from tracker.core.errors import StartPending
        from tracker.starting.start import StartRequest
        from tracker.store.queries import starts

        request = StartRequest(
            technique=technique,
            inputs=[{"id": id_, "type": type_, "value": value} for id_, type_, value in values],
            workspace_id=workspace,
            # Made once: a second attempt has to use the first one's.
            idempotency_key=f"trk-{uuid4()}" if idempotency_key is None else idempotency_key,
            started_by="cli",
            tags=tags,
        )
        try:
            started = await services.starter.start(request)
        except StartPending as error:
            if not wait:
                raise
            note(f"{error}. Waiting")
            started = await services.starter.start(request, wait=math.inf)
        if started.replayed:
            note("A run was started with this key before; a new one needs another key.")
        if not wait:
            return [started.record]
        run_id = started.record.run.run_id
        ended = await follow(services, [run_id], more=partial(_further_runs, services, run_id))
        with suppress(StoreError):  # the runs have ended all the same
            start = await starts.of_run(services.database, run_id)
            if start is not None and start.missing_runs:
                note(
                    f"tracker: there may be {counted(start.missing_runs, 'further run')} of this "
                    "start, which only callbacks to TRACKER_PUBLIC_URL name"
                )
        return ended

    first, *others = run_once(work, needs_key=True)
    _print_run(first, *others, as_json=as_json)
    return exit_status([first, *others]) if wait else 0


@app.command()
def track(
    run_id: str = RUN_ID,
    technique: str | None = option("The run's technique, if you know it.", metavar="T"),
    workspace: str | None = WORKSPACE,
    force: bool = flag("--force", "Track it though FLORA does not know it, or cannot be asked."),
    as_json: bool = AS_JSON,
) -> None:
    """Track a run that was started elsewhere.

    FLORA is asked first: a run that it does not know is refused, and nothing is stored.
    """
    from tracker.core.errors import NotTracked

    async def work(services: "Services") -> "TrackedRun":
        async with flora_deadline(services):
            if not force:
                return await services.tracker.track_shown(
                    run_id, technique=technique, workspace_id=workspace
                )
            tracked = await services.tracker.track(
                run_id, technique=technique, workspace_id=workspace
            )
            return replace(tracked, record=await services.poller.read_now(tracked.record))

    try:
        tracked = run_once(work)
    except (NotTracked, FloraError) as error:
        if force:  # it may be stored
            raise
        raise TrackerError(f"{error}; nothing was stored (--force tracks it anyway)") from error
    if tracked.known:
        note("The run was tracked already.")
    if tracked.record.last_error:
        note(f"FLORA has not shown it yet: {tracked.record.last_error}")
    _print_run(tracked.record, as_json=as_json)


@app.command()
def forget(
    run_id: str = RUN_ID,
    force: bool = flag("--force", "Remove it though FLORA has shown it."),
    as_json: bool = AS_JSON,
) -> None:
    """Stop tracking a run, and remove it with its outputs and timeline.

    It is meant for a run that FLORA never showed, or that is lost. A run that FLORA lists is
    tracked again with the next page of the history that shows it.
    """
    from tracker.views import run_json

    record = run_once(lambda services: services.tracker.forget(run_id, force=force))
    if as_json:
        print_json({"forgotten": run_json(record)})
        return
    typer.echo(f"Run {plain(run_id)} is not tracked any more.")
    if record.run.charged_cost is not None:
        cost = money(record.run.charged_cost)
        note(f"Its cost of {cost} does not count in spending and budgets any more.")


@app.command("list")
def list_(
    status: str | None = option(
        f"Filter by status: {', '.join(RunStatus)}, or another of FLORA's.", metavar="S"
    ),
    technique: str | None = option("Filter by technique (id or slug).", metavar="T"),
    workspace: str | None = OF_WORKSPACE,
    project: str | None = option("Filter by project (prj_…).", metavar="P"),
    tag: str | None = option("Filter by tag.", metavar="KEY=VALUE"),
    tracking: Tracking | None = option("Filter by tracking state."),
    retry_advice: RetryAdvice | None = option("Filter failed runs by advice."),
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List runs, newest first."""
    from tracker.store.queries import techniques
    from tracker.store.queries.runs import list_runs
    from tracker.views import run_json

    wanted_tag = None if tag is None else "=".join(checked(parse_tag, tag, "--tag"))

    async def find(database: "Database") -> tuple[list[Record], str | None]:
        return await list_runs(
            database,
            status=status,
            technique_id=await techniques.id_of(database, technique),
            workspace_id=workspace,
            project_id=project,
            tag=wanted_tag,
            tracking=tracking,
            retry_advice=retry_advice,
            cursor=cursor,
            limit=limit,
        )

    print_list(
        "runs",
        find,
        run_json,
        {
            "run": "run_id",
            "technique": "technique_id",
            "status": "status",
            "progress": "progress",
            "tracking": "tracking",
            "cost": "charged_cost",
            "outputs": lambda run: len(run["outputs"]),
            "created": "created_at",
        },
        as_json=as_json,
        hide=("outputs", "progress", "tracking", "created", "technique", "cost"),
        named=True,
    )


@app.command()
def show(run_id: str = RUN_ID, as_json: bool = AS_JSON) -> None:
    """Show a run with its inputs and outputs."""
    from tracker.store.queries.runs import get_run

    record = run_on_database(lambda database: get_run(database, run_id))
    if record is None:
        raise unknown([run_id])
    _print_run(record, as_json=as_json)


@app.command()
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


@app.command()
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


async def _further_runs(services: "Services", run_id: str) -> tuple[Sequence[str], bool]:
    """The known runs of the start of this first one, and whether there may be others later: an
    input with several values makes a run for each."""
    from tracker.store.queries import starts

    start = await starts.of_run(services.database, run_id)
    if start is None:
        return (), False
    known = (await starts.runs_of(services.database, [start]))[start.idempotency_key]
    return [one.run.run_id for one in known], start.gets_runs(known, services.clock())


def _print_run(record: Record, *others: Record, as_json: bool = False) -> None:
    """Print a run, and the other runs of its start."""
    from tracker.views import run_json

    run = run_json(record)
    if as_json:
        further = {"further_runs": [run_json(other) for other in others]} if others else {}
        print_json(run | further)
        return
    outputs = run.pop("outputs")
    if (advice := record.run.retry_advice) is not None:
        run["retry_advice"] = f"{advice}: {advice.sentence}"
    print_with_inputs(run)
    for output in outputs:
        print_fields({f"output {output['output_id']}": f"{output['type']}  {output['url']}"})
    for other in others:
        typer.echo()
        _print_run(other)


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
    services: "Services",
    run_ids: Sequence[str],
    *,
    more: "More | None" = None,
    json_lines: bool = False,
) -> list[Record]:
    """Show progress on stderr until all runs are settled or lost; return them in this order, and
    then those that `more` gave. With `json_lines`, each change is a line of JSON on stdout instead.
    """
    from tracker.views import run_json

    known: dict[str, Record] = {}
    waits = False

    async def further(more: "More", shown: Screen) -> tuple[Sequence[str], bool]:
        """What `more` gives; say once if nothing else is waited for."""
        nonlocal waits
        found, may_grow = await more()
        ended = {key for key, one in known.items() if one.tracking is not Tracking.ACTIVE}
        if may_grow and not waits and ended.issuperset([*run_ids, *found]):
            waits = True
            shown.notice("waiting up to two minutes for callbacks that name further runs")
        return found, may_grow

    try:
        with screen(transient=False) as shown:
            runs = RunScreen(shown, services.clock)
            async with (
                services.signals,
                aclosing(
                    services.follower.follow(
                        run_ids, more=more and partial(further, more, shown), notify=shown.notice
                    )
                ) as changes,
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
    others = [run_id for run_id in known if run_id not in run_ids]
    return [known[run_id] for run_id in [*run_ids, *others] if run_id in known]


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
        for record, last in observed:
            run_id, state = record.run.run_id, _state(record)
            # What brought the end, as `ended_via` has it, not the read of the details after it.
            source = record.ended_via or last
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
    # FLORA's clock may be ahead.
    elapsed = max(timedelta(), (record.settled_at or clock()) - record.created_at)
    return _took(record) or duration(elapsed)


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
