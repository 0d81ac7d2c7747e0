"""`tracker starts`: list starts whose outcome is not known, and resolve them by hand."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from tracker.cli.output import JsonFlag, print_fields, print_json, print_with_inputs
from tracker.cli.setup import (
    CursorOption,
    LimitOption,
    WorkspaceFilter,
    check_not_empty,
    flora_deadline,
    print_list,
    run_once,
)

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.store.queries.starts import StartRow

app = typer.Typer(
    name="starts", help="List and resolve starts whose outcome is not known.", no_args_is_help=True
)

Key = Annotated[str, typer.Argument(metavar="KEY", help="Idempotency key of the start.")]
OfWorkspace = Annotated[
    str | None,
    typer.Option(
        "--workspace",
        metavar="W",
        help="Where several workspaces have used the key.",
        callback=check_not_empty,
    ),
]


@app.command("list")
def list_(
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATE",
            help="Filter by state: stored, sent, in_doubt or unresolved. Repeatable. "
            "Default: all but stored.",
        ),
    ] = None,
    workspace: WorkspaceFilter = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
    as_json: JsonFlag = False,
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
def show(key: Key, workspace: OfWorkspace = None, as_json: JsonFlag = False) -> None:
    """Show a start."""
    row = run_once(lambda services: services.resolver.find(key, workspace_id=workspace))
    _print(row, as_json=as_json)


@app.command()
def resolve(
    key: Key,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="The run that it started.")
    ] = None,
    none: Annotated[
        bool, typer.Option("--none", help="It started nothing: the key may be used again.")
    ] = False,
    workspace: OfWorkspace = None,
    as_json: JsonFlag = False,
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
        return await resolver.find(key, workspace_id=row.workspace_slot)

    _print(run_once(work), as_json=as_json)


def _print(row: "StartRow", *, as_json: bool) -> None:
    from tracker.views import start_json

    start = start_json(row)
    if as_json:
        print_json(start)
        return
    error = start.pop("error") or {}
    print_with_inputs(start)
    print_fields({"last answer": error.get("message")})
