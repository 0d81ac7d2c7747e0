"""`tracker starts`: starts whose outcome is not known, and a person's word on what came of one."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracker.cli.errand import note, patience, run_once
from tracker.cli.output import JsonFlag, print_fields, print_json, print_table

if TYPE_CHECKING:
    from tracker.core.record import Record
    from tracker.services import Services
    from tracker.store.queries.starts import StartRow

app = typer.Typer(
    name="starts", help="Starts whose outcome is not known yet.", no_args_is_help=True
)

Key = Annotated[str, typer.Argument(metavar="KEY", help="Its idempotency key.")]
Workspace = Annotated[
    str | None,
    typer.Option("--workspace", metavar="W", help="Where several workspaces have used the key."),
]


@app.command("list")
def list_(
    state: Annotated[
        list[str] | None,
        typer.Option(help="stored, sent, in_doubt or unresolved. Repeatable; else all but stored."),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="W", help="Only starts of this workspace.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Maximum rows.", min=1, max=100)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List starts, newest first."""
    from tracker.store.queries.starts import LISTED

    if wrong := [one for one in state or () if one not in LISTED]:
        raise typer.BadParameter(f"{wrong[0]!r} is no state", param_hint="--state")

    async def work(services: "Services") -> "tuple[list[StartRow], str | None]":
        from tracker.store.queries import starts

        return await starts.list_starts(
            services.database, states=state, workspace_id=workspace, cursor=cursor, limit=limit
        )

    rows, next_cursor = run_once(work)
    shown = [_json(row) for row in rows]
    if as_json:
        print_json({"starts": shown, "meta": {"next_cursor": next_cursor}})
        return
    columns = ("idempotency_key", "technique_id", "state", "run_id", "started_by")
    print_table(
        ("key", "technique", "state", "run", "started by", "sent", "last answer"),
        [
            (
                *(one[name] for name in columns),
                one["sent_at"] and one["sent_at"][:19] + "Z",
                (one["error"] or {}).get("message"),
            )
            for one in shown
        ],
    )
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")


@app.command()
def show(key: Key, workspace: Workspace = None, as_json: JsonFlag = False) -> None:
    """Show a start."""

    async def work(services: "Services") -> "StartRow":
        return await services.resolver.find(key, workspace_id=workspace)

    _print(_json(run_once(work)), as_json=as_json)


@app.command()
def resolve(
    key: Key,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="It became this run.")
    ] = None,
    none: Annotated[
        bool, typer.Option("--none", help="Nothing was started: the key may be used again.")
    ] = False,
    workspace: Workspace = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what came of a start: FLORA's dashboard shows which runs there are."""
    if (run is None) is not none:
        raise typer.BadParameter("give one of --run RUN_ID and --none", param_hint="--run")

    async def work(services: "Services") -> "tuple[StartRow, Record | None]":
        resolver = services.resolver
        row = await resolver.find(key, workspace_id=workspace)
        record = None
        if run is None:
            await resolver.is_nothing(row)
        else:
            async with patience(services):
                record = await resolver.is_run(row, run)
        return await resolver.find(key, workspace_id=row.workspace_slot), record

    row, _ = run_once(work)
    _print(_json(row), as_json=as_json)


def _print(start: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(start)
        return
    error = start.pop("error") or {}
    given = start.pop("inputs")
    start["tags"] = ", ".join(f"{key}={value}" for key, value in start["tags"].items())
    print_fields(start)
    for one in given:
        print_fields({f"input {one.get('id')}": f"{one.get('value')}"})
    if error:
        print_fields({"last answer": error.get("message")})


def _json(row: "StartRow") -> dict[str, Any]:
    from tracker.views import start_json

    return start_json(row)
