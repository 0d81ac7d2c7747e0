"""`tracker runs`: start, track, list and show runs."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

import typer

from tracker.cli.options import (
    AS_JSON,
    CURSOR,
    LIMIT,
    OF_WORKSPACE,
    RUN_ID,
    TAGS,
    TECHNIQUE,
    WORKSPACE,
    checked,
    flag,
    option,
    parse_value,
    parsed_tags,
    repeatable,
)
from tracker.cli.output import note, plain, print_fields, print_json, print_with_inputs
from tracker.cli.runs import download, watch
from tracker.cli.setup import flora_deadline, print_list, run_on_database, run_once
from tracker.core.budget import parse_tag
from tracker.core.errors import FloraError, TrackerError
from tracker.core.formatting import money
from tracker.core.run import RetryAdvice, RunStatus, Tracking

if TYPE_CHECKING:
    from tracker.core.record import Record
    from tracker.services import Services
    from tracker.starting.resolve import TrackedRun
    from tracker.store.engine import Database

app = typer.Typer(name="runs", help="Start, track, list and show runs.", no_args_is_help=True)


@app.command()
def start(
    technique: str = TECHNIQUE,
    inputs: list[str] = repeatable(
        "--input", "ID=VALUE", "Value of an input. ID:TYPE=VALUE saves asking FLORA for its type."
    ),
    workspace: str | None = WORKSPACE,
    tag: list[str] = TAGS,
    idempotency_key: str | None = option(
        "Repeating the command with the same key starts no run.", metavar="K"
    ),
    wait: bool = flag("--wait", "Wait for the end; exit status 1 if the run fails."),
    as_json: bool = AS_JSON,
) -> int:
    """Start a run and track it."""
    form = "ID=VALUE or ID:TYPE=VALUE"
    values = [parse_value(text, form, "--input") for text in inputs]
    tags = parsed_tags(tag)

    async def work(services: "Services") -> "Record":
        from tracker.core.errors import StartPending
        from tracker.starting.start import StartRequest

        async with flora_deadline(services):
            request = StartRequest(
                technique=technique,
                inputs=await services.catalogue.typed_inputs(technique, values, workspace),
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
            note("A run was started with this key before; no new one was started.")
        if not wait:
            return started.record
        (ended,) = await watch.follow(services, [started.record.run.run_id])
        return ended

    record = run_once(work, needs_key=True)
    _print_run(record, as_json=as_json)
    return watch.exit_status([record]) if wait else 0


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

    async def find(database: "Database") -> "tuple[list[Record], str | None]":
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
            "cost": lambda run: _charged(run["charged_cost"]),
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
        raise watch.unknown([run_id])
    _print_run(record, as_json=as_json)


app.command()(watch.watch)
app.command()(watch.explain)
app.command()(download.download)


def _charged(cost: float | None) -> str | None:
    return None if cost is None else money(cost)


def _print_run(record: "Record", *, as_json: bool) -> None:
    from tracker.views import run_json

    run = run_json(record)
    if as_json:
        print_json(run)
        return
    outputs = run.pop("outputs")
    if (advice := record.run.retry_advice) is not None:
        run["retry_advice"] = f"{advice}: {advice.sentence}"
    print_with_inputs(run)
    for output in outputs:
        print_fields({f"output {output['output_id']}": f"{output['type']}  {output['url']}"})
