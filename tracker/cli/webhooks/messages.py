"""`tracker messages`: the events sent to endpoints, and sending them again."""

from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.options import AS_JSON, CURSOR, LIMIT, argument, option, parse_time
from tracker.cli.output import print_fields, print_json, print_table
from tracker.cli.setup import print_list, run_on_database, run_once
from tracker.core.errors import TrackerError
from tracker.core.events import EventType, MessageState
from tracker.core.formatting import counted, duration

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.store.engine import Database

app = typer.Typer(
    name="messages",
    help="List, show and resend the events sent to endpoints.",
    no_args_is_help=True,
)
_SENT_BY: Final = "workers send to endpoints that are enabled and in their settings"


@app.command("list")
def list_(
    endpoint: str | None = option("Filter by endpoint.", metavar="ID"),
    state: MessageState | None = option("Filter by state."),
    event: EventType | None = option("Filter by event."),
    run: str | None = option("Filter by run.", metavar="RUN_ID"),
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List messages, newest first."""
    from tracker.store.queries.endpoints import list_messages
    from tracker.views import message_json

    print_list(
        "messages",
        partial(
            list_messages,
            endpoint_id=endpoint,
            state=state,
            event=event,
            run_id=run,
            cursor=cursor,
            limit=limit,
        ),
        message_json,
        {
            "message": "message_id",
            "state": "state",
            "event": "event",
            "run": "run_id",
            "endpoint": "endpoint_id",
            "attempts": "attempts",
            "status": "last_status",
            "created": "created_at",
            "next attempt": "next_attempt_at",
            "error": "last_error",
        },
        as_json=as_json,
        hide=("event", "attempts", "status", "endpoint", "next attempt", "created", "error"),
    )


@app.command()
def show(
    message_id: str = argument("MESSAGE_ID", "The webhook-id."),
    as_json: bool = AS_JSON,
) -> None:
    """Show a message with its body and its attempts."""
    from tracker.views import message_json

    async def work(database: "Database") -> dict[str, Any] | None:
        from tracker.store.queries import endpoints as read

        row = await read.get_message(database, message_id)
        if row is None:
            return None
        return message_json(row, await read.list_attempts(database, message_id))

    shown = run_on_database(work)
    if shown is None:
        raise TrackerError(f"message {message_id} is not known")
    if as_json:
        print_json(shown)
        return
    attempts = shown.pop("attempt_log")
    body = shown.pop("body")
    print_fields(shown)
    if attempts:
        typer.echo()
        print_table(
            ("attempt", "at", "took", "status", "error", "answer"),
            [
                (
                    one["number"],
                    f"{one['at'][:19]}Z",
                    duration(one["seconds"]),
                    one["status"],
                    one["error"],
                    one["answer"],
                )
                for one in attempts
            ],
        )
    typer.echo()
    print_json(body)


@app.command()
def resend(
    message_ids: list[str] = argument("MESSAGE_ID", "The webhook-ids of the messages."),
    as_json: bool = AS_JSON,
) -> None:
    """Send messages again, whatever their state, under the same webhook-id."""

    async def work(services: "Services") -> None:
        for message_id in message_ids:
            await services.webhooks.resend(message_id)

    run_once(work)
    if as_json:
        print_json({"messages": message_ids})
    else:
        typer.echo(f"{counted(len(message_ids), 'message')} due now; {_SENT_BY}")


@app.command()
def recover(
    endpoint: str = option("The endpoint.", metavar="ID", default=...),
    since: datetime = option(
        "Messages created since then: an age (24h, 3d) or a time (2026-11-28T03:00Z).",
        metavar="T",
        default=...,
        parser=parse_time,
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Send the failed messages of an endpoint again, after an outage.

    What is still pending for it is sent at once as well.
    """
    count = run_once(lambda services: services.webhooks.recover(endpoint, since=since))
    if as_json:
        print_json({"endpoint_id": endpoint, "failed": count})
    else:
        typer.echo(f"{counted(count, 'failed message')} due now; {_SENT_BY}")
