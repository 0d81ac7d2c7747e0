"""`tracker endpoints`: where events are sent, how that goes, and switching an endpoint on again."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.cli.options import AS_JSON, argument
from tracker.cli.output import note, plain, print_json
from tracker.cli.setup import print_list, run_once
from tracker.core.clock import utc_now
from tracker.core.formatting import duration

if TYPE_CHECKING:
    from tracker.store.engine import Database

app = typer.Typer(
    name="endpoints", help="List, test and enable webhook endpoints.", no_args_is_help=True
)

ENDPOINT_ID: Final = argument("ENDPOINT_ID", "Its id in the settings, as listed.")


@app.command("list")
def list_(as_json: bool = AS_JSON) -> None:
    """List endpoints with their backlog and delays.

    The delays are those of the last day: from an event to the endpoint's 2xx.
    """
    from tracker.views import endpoint_json

    async def find(database: "Database") -> tuple[list[dict[str, Any]], None]:
        from tracker.store.queries import endpoints as read

        now = utc_now()
        found = await read.list_states(database, since=now - timedelta(days=1))
        return [endpoint_json(*one) | {"health": one[0].health(now)} for one in found], None

    print_list(
        "endpoints",
        find,
        dict,
        {
            "endpoint": "endpoint_id",
            "health": "health",
            "pending": "pending",
            "failed": "failed",
            "p95": lambda one: one["delay_p95"] and duration(one["delay_p95"]),
            "url": "url",
            "events": lambda one: ", ".join(one["events"]),
            "last error": "last_error",
        },
        as_json=as_json,
        hide=("events", "p95", "url"),
    )


@app.command("test")
def send_test(endpoint_id: str = ENDPOINT_ID, as_json: bool = AS_JSON) -> int:
    """Send a signed test event (tracker.test) to an endpoint of the settings.

    Exit status 1 if the answer is not 2xx.
    """
    attempt = run_once(lambda services: services.webhooks.test(endpoint_id))
    took = duration(attempt.seconds)
    if as_json:
        from tracker.views import values_of

        shown = values_of(attempt, "status", "seconds", "answer", "error")
        print_json({"endpoint_id": endpoint_id} | shown)
    elif attempt.error is None:
        typer.echo(f"{plain(endpoint_id)} answered {attempt.status} in {took}")
    else:
        note(f"tracker: {endpoint_id} failed after {took}: {attempt.error}")
    return 0 if attempt.error is None else 1


@app.command()
def enable(endpoint_id: str = ENDPOINT_ID, as_json: bool = AS_JSON) -> None:
    """Enable a disabled endpoint. What waits for it is sent at once."""
    run_once(lambda services: services.webhooks.enable(endpoint_id))
    if as_json:
        print_json({"endpoint_id": endpoint_id, "state": "enabled"})
    else:
        typer.echo(f"{plain(endpoint_id)} is enabled; workers send what waits for it")
