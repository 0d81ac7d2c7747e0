"""`tracker runs`: start, track, list and show runs."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

import typer

from tracker.cli import download, inputs, watching
from tracker.cli.arguments import RunId, TagOption, parsed_tags
from tracker.cli.errand import note, patience, run_once
from tracker.cli.follow import exit_status, follow
from tracker.cli.output import JsonFlag, print_fields, print_json, print_table
from tracker.core.errors import TrackerError
from tracker.core.retry import RetryAdvice
from tracker.core.run import RunStatus, Tracking

if TYPE_CHECKING:
    from tracker.core.record import Record
    from tracker.services import Services
    from tracker.starting.start import Started, StartRequest
    from tracker.starting.track import Tracked

app = typer.Typer(name="runs", help="Start, track, list and show runs.", no_args_is_help=True)


Workspace = Annotated[
    str | None,
    typer.Option("--workspace", metavar="W", help="Workspace id, where several are configured."),
]


@app.command()
def start(
    technique: Annotated[str, typer.Argument(metavar="TECHNIQUE", help="Its id or its slug.")],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="ID=VALUE",
            help="An input, once for each. ID:TYPE=VALUE spares asking FLORA for its type.",
        ),
    ] = None,
    workspace: Workspace = None,
    tag: TagOption = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="K", help="The same key again gives the same run, not another one."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the run's end; exit status 1 if it fails.")
    ] = False,
    as_json: JsonFlag = False,
) -> int:
    """Start a run and track it."""
    parsed = inputs.parse(given or [])
    tags = parsed_tags(tag)

    async def work(services: "Services") -> "Record":
        from tracker.starting.start import StartRequest

        async with patience(services):
            request = StartRequest(
                technique=technique,
                inputs=await inputs.typed(services, technique, workspace, parsed),
                workspace_id=workspace,
                # The second attempt has to have the first one's.
                idempotency_key=idempotency_key or f"trk-{uuid4()}",
                started_by="cli",
                tags=tags,
            )
        started = await _started(services, request, wait=wait)
        if started.replayed:
            note("This key had started the run before; nothing new was started.")
        if not wait:
            return started.record
        (ended,) = await follow(services, [started.record.run.run_id])
        return ended

    record = run_once(work, needs_key=True)
    _print_run(record, as_json=as_json)
    return exit_status([record]) if wait else 0


@app.command()
def track(
    run_id: RunId,
    technique: Annotated[
        str | None, typer.Option(metavar="T", help="Its technique, if you know it.")
    ] = None,
    workspace: Workspace = None,
    as_json: JsonFlag = False,
) -> None:
    """Track a run that was started elsewhere."""

    async def work(services: "Services") -> "Tracked":
        async with patience(services):
            tracked = await services.tracker.track(
                run_id, technique=technique, workspace_id=workspace
            )
            return replace(tracked, record=await services.poller.read_now(tracked.record))

    tracked = run_once(work)
    if tracked.known:
        note("The run was tracked already.")
    if tracked.record.last_error:
        note(f"It could not be read yet: {tracked.record.last_error}")
    _print_run(tracked.record, as_json=as_json)


@app.command("list")
def list_(
    status: Annotated[
        str | None,
        typer.Option(
            metavar="S", help=f"Only runs of this status: {', '.join(RunStatus)}, or FLORA's word."
        ),
    ] = None,
    technique: Annotated[
        str | None, typer.Option(metavar="T", help="Only runs of this technique (tech_…).")
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="W", help="Only runs of this workspace.")
    ] = None,
    project: Annotated[
        str | None, typer.Option(metavar="P", help="Filter by project (prj_…).")
    ] = None,
    tag: Annotated[str | None, typer.Option(metavar="KEY=VALUE", help="Filter by tag.")] = None,
    tracking: Annotated[
        Tracking | None, typer.Option(help="Only runs that the tracker stands to so.")
    ] = None,
    retry_advice: Annotated[
        RetryAdvice | None, typer.Option(help="Only failed runs with this advice.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many at most.", min=1, max=100)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List runs, newest first."""
    wanted = parsed_tags(None if tag is None else [tag])

    async def work(services: "Services") -> "tuple[list[Record], str | None]":
        from tracker.store.queries import runs as read

        return await read.list_runs(
            services.database,
            status=status,
            technique_id=technique,
            workspace_id=workspace,
            project_id=project,
            tag=next((f"{key}={value}" for key, value in wanted.items()), None),
            tracking=tracking,
            retry_advice=retry_advice,
            cursor=cursor,
            limit=limit,
        )

    records, next_cursor = run_once(work)
    shown = [_json(record) for record in records]
    if as_json:
        print_json({"runs": shown, "meta": {"next_cursor": next_cursor}})
        return
    columns = ("run_id", "technique_id", "status", "progress", "tracking", "charged_cost")
    titles = ("run", "technique", "status", "progress", "tracking", "cost", "outputs", "created")
    print_table(
        titles,
        [
            (*(run[name] for name in columns), len(run["outputs"]), run["created_at"][:19] + "Z")
            for run in shown
        ],
    )
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")


@app.command()
def show(run_id: RunId, as_json: JsonFlag = False) -> None:
    """Show all that is known of a run."""

    async def work(services: "Services") -> "Record | None":
        from tracker.store.queries import runs as read

        return await read.get_run(services.database, run_id)

    record = run_once(work)
    if record is None:
        raise TrackerError(
            f"run {run_id} is not known here: `tracker runs track {run_id}` would track it"
        )
    _print_run(record, as_json=as_json)


async def _started(services: "Services", request: "StartRequest", *, wait: bool) -> "Started":
    """Start it. With `wait`, a start in doubt is waited for until it is known what it did."""
    from tracker.core.errors import StartPending

    try:
        return await services.starter.start(request)
    except StartPending as error:
        if not wait:
            raise
        note(f"{error}. Waiting")
    return await services.starter.start(request, wait=math.inf)


watching.add_to(app)
download.add_to(app)


def _json(record: "Record") -> dict[str, Any]:
    from tracker.views import run_json

    return run_json(record)


def _print_run(record: "Record", *, as_json: bool) -> None:
    run = _json(record)
    if as_json:
        print_json(run)
        return
    outputs = run.pop("outputs")
    if (advice := record.run.retry_advice) is not None:
        run["retry_advice"] = f"{advice}: {advice.sentence}"
    given = run.pop("inputs") or []
    run["tags"] = ", ".join(f"{key}={value}" for key, value in run["tags"].items())
    print_fields(run)
    for one in given:
        print_fields({f"input {one.get('id')}": f"{one.get('value')}"})
    for output in outputs:
        print_fields({f"output {output['output_id']}": f"{output['type']}  {output['url']}"})
