"""`tracker starts`: list starts whose outcome is not known, and resolve them by hand."""

import shlex
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import typer

from tracker.cli.command import (
    AS_JSON,
    CURSOR,
    LIMIT,
    OF_WORKSPACE,
    argument,
    check_not_empty,
    flag,
    flora_deadline,
    option,
    print_list,
    run_once,
)
from tracker.cli.output import note, print_fields, print_json, print_table, print_with_inputs
from tracker.core.formatting import money

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker.core.record import Record
    from tracker.services import Services
    from tracker.store.queries.starts import StartRow

    PossibleRuns = dict[str, Record | None] | None

app = typer.Typer(
    name="starts", help="List and resolve starts whose outcome is not known.", no_args_is_help=True
)

KEY: Final = argument("KEY", "Idempotency key of the start.")
OF_SEVERAL: Final = option(
    "Where several workspaces have used the key.", metavar="W", callback=check_not_empty
)


@app.command("list")
def list_(
    state: list[str] | None = option(
        "Filter by state: stored, sent, in_doubt or unresolved. Repeatable. "
        "Default: all but stored.",
        metavar="STATE",
    ),
    workspace: str | None = OF_WORKSPACE,
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List starts whose outcome is not known, newest first."""
    from tracker.store.queries.starts import LISTED, list_starts
    from tracker.views import start_json

    if wrong := [one for one in state or () if one not in LISTED]:
        raise typer.BadParameter(f"{wrong[0]!r} is not a state", param_hint="--state")

    print_list(
        "starts",
        partial(list_starts, states=state, workspace_id=workspace, cursor=cursor, limit=limit),
        start_json,
        {
            "key": "idempotency_key",
            "technique": "technique_id",
            "state": "state",
            "run": "run_id",
            "started by": "started_by",
            "sent": "sent_at",
            "last answer": lambda start: (start["error"] or {}).get("message"),
        },
        as_json=as_json,
        hide=("started by", "sent", "technique", "run"),
        named=True,
    )


@app.command()
def show(key: str = KEY, workspace: str | None = OF_SEVERAL, as_json: bool = AS_JSON) -> None:
    """Show a start with its runs, and the runs that one without a known outcome may have become."""
    from tracker.store.queries import starts

    async def work(services: "Services") -> tuple["StartRow", list["Record"], "PossibleRuns"]:
        row = await services.resolver.find(key, workspace_id=workspace)
        runs = await starts.runs_of(services.database, [row])
        return row, runs[row.idempotency_key], await services.resolver.possible(row)

    row, runs, possible = run_once(work)
    if possible is not None:
        row = replace(row, error=row.with_possible(possible))
    _print(row, as_json=as_json, runs=runs)
    if possible is not None and not as_json:
        _print_possible(row, possible)


@app.command()
def resolve(
    key: str = KEY,
    run: str | None = option("The run that it started.", "--run", metavar="RUN_ID"),
    none: bool = flag("--none", "It started nothing: the key may be used again."),
    workspace: str | None = OF_SEVERAL,
    as_json: bool = AS_JSON,
) -> None:
    """Record the outcome of a start. FLORA's dashboard shows which runs there are."""
    if (run is None) is not none:
        raise typer.BadParameter("give one of --run RUN_ID and --none", param_hint="--run")

    async def work(services: "Services") -> "StartRow":
        resolver = services.resolver
        row = await resolver.find(key, workspace_id=workspace)
        if run is None:
            await resolver.is_nothing(row)
        else:
            async with flora_deadline(services):
                await resolver.is_run(row, run)
        return await resolver.find(key, workspace_id=row.workspace_id)

    _print(run_once(work), as_json=as_json)


@app.command()
def exclude(
    run_id: str = argument("RUN_ID", "The run that someone else started."),
    as_json: bool = AS_JSON,
) -> None:
    """Record for all starts at once that none of them became a run, as someone else started it."""
    from tracker.views import start_json

    rows = [start_json(row) for row in run_once(lambda services: services.resolver.exclude(run_id))]
    if as_json:
        print_json({"starts": rows})
        return
    print_table(
        ("key", "state", "possible runs"),
        [[row["idempotency_key"], row["state"], len(row["possible_runs"])] for row in rows],
    )
    note(
        "Starts in doubt without a possible run are sent again, unless FLORA knows their key. The "
        "key of a refused one may be used again."
    )


def _print(row: "StartRow", *, as_json: bool, runs: "Sequence[Record]" = ()) -> None:
    from tracker.views import start_json

    start, run_ids = start_json(row), [record.run.run_id for record in runs]
    if as_json:
        print_json(start | ({"run_ids": run_ids} if runs else {}))
        return
    if len(runs) > 1:
        start["run_id"] = ", ".join(run_ids)
    error = start.pop("error") or {}
    del start["possible_runs"]  # a table follows
    print_with_inputs(start)
    print_fields({"last answer": error.get("message")})


def _print_possible(row: "StartRow", possible: "PossibleRuns") -> None:
    """Print what a person has to compare, and how to record what was found."""
    from tracker.store.queries.starts import StartState

    resolve = f"tracker starts resolve {shlex.quote(row.idempotency_key)}"
    is_unresolved = row.state is StartState.UNRESOLVED
    if not possible:
        typer.echo(
            "\nNone of the runs that it may have become is left: other starts became them, or "
            "someone else started them."
        )
        if row.is_known_to_flora:
            typer.echo(
                "But FLORA has a request with this key: look for its run on FLORA's website, and "
                f"record it: {resolve} --run RUN_ID"
            )
            return
        typer.echo("So FLORA started nothing for it.")
        if is_unresolved:
            typer.echo(f"Record that: {resolve} --none")
        return
    typer.echo("\nIt became one of these runs, or none:\n")
    print_table(
        ("run", "status", "created", "project", "cost", "outputs"),
        [[run_id, *_stored(record)] for run_id, record in possible.items()],
    )
    typer.echo(
        "\nCompare what they made with the inputs above: tracker runs show RUN_ID"
        f"\nOne was made from these inputs: {resolve} --run RUN_ID"
        "\nOne is someone else's, whichever start it is about: tracker starts exclude RUN_ID"
    )
    if row.is_known_to_flora:
        typer.echo(
            "FLORA has a request with this key: if it is none of these, look on its website."
        )
    else:
        typer.echo(f"None was: {resolve} --none")
    if not is_unresolved:
        from tracker.starting.recover import KEY_KEPT

        typer.echo(
            "Nothing has to be done while it is in doubt: its callback may tell. If none does, a "
            f"person has to decide from {row.first_sent + KEY_KEPT:%Y-%m-%d %H:%M} UTC on, at the "
            "latest."
        )


def _stored(record: "Record | None") -> list[object]:
    """What is stored of a run, for the table of runs that a start may have become."""
    if record is None:
        return ["not read yet", None, None, None, None]
    run = record.run
    created = run.created_at and f"{run.created_at:%Y-%m-%dT%H:%M:%SZ}"
    cost = None if run.charged_cost is None else money(run.charged_cost)
    return [run.status, created, run.project_id, cost, len(run.outputs or ())]
