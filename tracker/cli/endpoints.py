"""`tracker endpoints`: where events are sent, how that goes, and switching an endpoint on again."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer

from tracker.cli.output import JsonFlag, print_page
from tracker.cli.setup import run_on_database
from tracker.core.clock import utc_now
from tracker.core.formatting import duration

if TYPE_CHECKING:
    from tracker.store.engine import Database

app = typer.Typer(
    name="endpoints", help="List, test and enable webhook endpoints.", no_args_is_help=True
)


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List endpoints with their backlog and delays.

    The delays are those of the last day: from an event to the endpoint's 2xx.
    """
    from tracker.views import endpoint_json

    async def work(database: "Database") -> list[dict[str, Any]]:
        from tracker.store.queries import endpoints as read

        now = utc_now()
        backlogs = await read.backlogs(database)
        return [
            {
                **endpoint_json(
                    row,
                    backlogs.get(row.endpoint_id, read.Backlog()),
                    await read.delays(database, row.endpoint_id, since=now - timedelta(days=1)),
                ),
                "health": row.health(now),
            }
            for row in await read.list_endpoints(database)
        ]

    print_page(
        "endpoints",
        run_on_database(work),
        None,
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
