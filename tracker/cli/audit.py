"""`tracker audit`: who did what, and who was refused."""

from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from tracker.cli.options import AS_JSON, CURSOR, LIMIT, age, option
from tracker.cli.setup import print_list

if TYPE_CHECKING:
    from tracker.store.engine import Database
    from tracker.store.queries.audit import AuditRow

app = typer.Typer(
    name="audit", help="List who did what, and who was refused.", no_args_is_help=True
)


@app.command("list")
def list_(
    since: timedelta | None = age("Entries of the last 24h, 7d, …"),
    action: str | None = option(
        "Filter by action: start, launch, stop, resolve, replay, acknowledge, forget, "
        "resend, enable_endpoint, test_endpoint, prune, sign_in, sign_out or refused."
    ),
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List the audit log, newest first."""
    from tracker.store.clock import shared_clock
    from tracker.store.queries import audit
    from tracker.views import audit_facts, audit_json

    if action is not None and action not in list(audit.Action):
        raise typer.BadParameter(f"{action!r} is not an action", param_hint="--action")

    async def find(database: "Database") -> "tuple[list[AuditRow], str | None]":
        async with shared_clock(database) as clock:
            start = None if since is None else clock() - since
            return await audit.list_audit(
                database, since=start, action=action, cursor=cursor, limit=limit
            )

    print_list(
        "entries",
        find,
        audit_json,
        {
            "at": lambda entry: f"{entry['at'][:19]}Z",
            "actor": "actor",
            "action": "action",
            "detail": lambda entry: ", ".join(
                f"{name} {value}" for name, value in audit_facts(entry["detail"])
            ),
            "times": "count",
            "address": "address",
            "request": "request_id",
        },
        as_json=as_json,
        hide=("request", "address", "times"),
    )
