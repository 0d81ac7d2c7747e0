"""`tracker deliveries`: list, show, replay and acknowledge callbacks."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import typer

from tracker.cli.options import AS_JSON, CURSOR, LIMIT, argument, flag, option
from tracker.cli.output import note, print_fields, print_json, print_table
from tracker.cli.setup import print_list, run_on_database, run_once
from tracker.core.errors import TrackerError
from tracker.core.formatting import counted
from tracker.core.record import DeliveryOutcome

if TYPE_CHECKING:
    from tracker.receiving.replay import Replay
    from tracker.services import Services

app = typer.Typer(
    name="deliveries", help="List, show, replay and acknowledge callbacks.", no_args_is_help=True
)


@app.command("list")
def list_(
    outcome: DeliveryOutcome | None = option("Filter by outcome."),
    run: str | None = option("Filter by run.", metavar="RUN_ID"),
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List callbacks, newest first."""
    from tracker.store.queries.deliveries import list_deliveries
    from tracker.views import delivery_json

    print_list(
        "deliveries",
        partial(list_deliveries, outcome=outcome, run_id=run, cursor=cursor, limit=limit),
        delivery_json,
        {
            "delivery": "delivery_id",
            "run": "run_id",
            "event": "event_type",
            "outcome": "outcome",
            "receipts": "receipts",
            "received": "received_at",
            "reason": "reason",
        },
        as_json=as_json,
        hide=("receipts", "event", "reason", "received"),
    )


@app.command()
def show(
    delivery_id: str = argument("DELIVERY_ID", "FLORA's whd_… identifier, as listed."),
    as_json: bool = AS_JSON,
) -> None:
    """Show a callback with its raw body."""
    from tracker.store.queries.deliveries import get_delivery
    from tracker.views import delivery_json

    row = run_on_database(lambda database: get_delivery(database, delivery_id))
    if row is None:
        raise TrackerError(f"delivery {delivery_id} is not known")
    shown = delivery_json(row)
    if as_json:
        print_json(shown)
        return
    print_fields(shown)
    if row.body_removed_at is not None:
        note("Retention has removed its body.")


@app.command()
def replay(
    delivery_ids: list[str] = argument("DELIVERY_ID", "Deliveries to replay.", default=[]),
    every: bool = flag("--all", "Replay all quarantined deliveries, oldest first."),
    as_json: bool = AS_JSON,
) -> int:
    """Apply quarantined callbacks again. Exit status 1 if one is still quarantined."""
    if bool(delivery_ids) == every:
        raise typer.BadParameter("give DELIVERY_IDs, or --all", param_hint="DELIVERY_ID")

    async def work(services: "Services") -> "list[Replay]":
        chosen = delivery_ids or await _quarantined(services)
        return [await services.replayer.replay(one) for one in chosen]

    done = run_once(work)
    if as_json:
        print_json({"deliveries": [asdict(one) for one in done]})
    elif not done:
        note("No delivery is quarantined.")
    else:
        print_table(
            ("delivery", "run", "outcome", "reason"),
            [(one.delivery_id, one.run_id, one.outcome, one.reason) for one in done],
        )
    return 1 if any(one.outcome is DeliveryOutcome.QUARANTINED for one in done) else 0


@app.command()
def acknowledge(
    delivery_ids: list[str] = argument("DELIVERY_ID", "Deliveries to acknowledge.", default=[]),
    every: bool = flag("--all", "Acknowledge all quarantined deliveries."),
    as_json: bool = AS_JSON,
) -> None:
    """Mark quarantined callbacks as seen: pages and alerts stop counting them.

    They stay quarantined, and can still be replayed.
    """
    if bool(delivery_ids) == every:
        raise typer.BadParameter("give DELIVERY_IDs, or --all", param_hint="DELIVERY_ID")

    async def work(services: "Services") -> list[str]:
        from tracker.store.queries.deliveries import get_delivery

        for one in delivery_ids:
            if await get_delivery(services.database, one) is None:
                raise TrackerError(f"delivery {one} is not known")
        chosen = delivery_ids or await _quarantined(services)
        return await services.replayer.acknowledge(chosen)

    done = run_once(work)
    if as_json:
        print_json({"acknowledged": done})
    else:
        note(f"{counted(len(done), 'delivery', 'deliveries')} acknowledged.")


async def _quarantined(services: "Services") -> list[str]:
    from tracker.store.queries.deliveries import list_deliveries

    found: list[str] = []
    cursor = None
    while True:
        rows, cursor = await list_deliveries(
            services.database, outcome=DeliveryOutcome.QUARANTINED, cursor=cursor, limit=100
        )
        found += [row.delivery_id for row in rows]
        if cursor is None:
            return found[::-1]
