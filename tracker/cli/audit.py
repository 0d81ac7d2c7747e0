"""`tracker audit`: who did what, and who was refused."""

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracker.cli.arguments import parse_age
from tracker.cli.errand import note, run_once
from tracker.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.store.queries.audit import AuditRow

app = typer.Typer(
    name="audit",
    help="Who started, resolved, replayed, pruned, signed in, or was refused.",
    no_args_is_help=True,
)


@app.command("list")
def list_(
    since: Annotated[
        str | None, typer.Option(metavar="AGE", help="Only entries of this time, as in 24h or 7d.")
    ] = None,
    action: Annotated[
        str | None,
        typer.Option(help="start, resolve, replay, prune, sign_in, sign_out or refused."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Maximum rows.", min=1, max=100)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the audit log, newest first."""
    age: timedelta | None = None if since is None else parse_age(since, "--since")

    async def work(services: "Services") -> "tuple[list[AuditRow], str | None]":
        from tracker.store.queries import audit

        if action is not None and action not in list(audit.Action):
            raise typer.BadParameter(f"{action!r} is no action", param_hint="--action")
        start = None if age is None else services.clock() - age
        return await audit.list_audit(
            services.database, since=start, action=action, cursor=cursor, limit=limit
        )

    rows, next_cursor = run_once(work)
    shown = [_json(row) for row in rows]
    if as_json:
        print_json({"entries": shown, "meta": {"next_cursor": next_cursor}})
        return
    print_table(
        ("at", "actor", "action", "detail", "times", "address", "request"),
        [
            (
                one["at"][:19] + "Z",
                *(one[name] for name in ("actor", "action")),
                _line(one["detail"]),
                *(one[name] for name in ("count", "address", "request_id")),
            )
            for one in shown
        ],
    )
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")


def _json(row: "AuditRow") -> dict[str, Any]:
    from tracker.views import audit_json

    return audit_json(row)


def _line(detail: dict[str, Any]) -> str:
    from tracker.views import audit_facts

    return ", ".join(f"{name} {value}" for name, value in audit_facts(detail))
