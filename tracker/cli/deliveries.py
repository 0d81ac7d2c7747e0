"""`tracker deliveries`: the callbacks as they came."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracker.cli.errand import note, run_once
from tracker.cli.output import JsonFlag, print_fields, print_json, print_table
from tracker.core.errors import TrackerError
from tracker.core.record import DeliveryOutcome

if TYPE_CHECKING:
    from tracker.receiving.replay import Replay
    from tracker.services import Services
    from tracker.store.queries.runs import DeliveryRow

app = typer.Typer(name="deliveries", help="List, show and replay callbacks.", no_args_is_help=True)

DeliveryId = Annotated[
    str, typer.Argument(metavar="DELIVERY_ID", help="FLORA's whd_… identifier, as listed.")
]


@app.command("list")
def list_(
    outcome: Annotated[
        DeliveryOutcome | None, typer.Option(help="Only those of which this became.")
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN_ID", help="Only this run's.")] = None,
    limit: Annotated[int, typer.Option(help="So many at most.", min=1, max=100)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List callbacks, newest first."""

    async def work(services: "Services") -> "tuple[list[DeliveryRow], str | None]":
        from tracker.store.queries import runs as read

        return await read.list_deliveries(
            services.database, outcome=outcome, run_id=run, cursor=cursor, limit=limit
        )

    rows, next_cursor = run_once(work)
    shown = [_json(row) for row in rows]
    if as_json:
        print_json({"deliveries": shown, "meta": {"next_cursor": next_cursor}})
        return
    print_table(
        ("delivery", "run", "event", "outcome", "receipts", "received", "reason"),
        [
            (
                *(one[name] for name in ("delivery_id", "run_id", "event_type", "outcome")),
                one["receipts"],
                one["received_at"][:19] + "Z",
                one["reason"],
            )
            for one in shown
        ],
    )
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")


@app.command()
def show(delivery_id: DeliveryId, as_json: JsonFlag = False) -> None:
    """Show a callback with its raw body."""

    async def work(services: "Services") -> "DeliveryRow | None":
        from tracker.store.queries import runs as read

        return await read.get_delivery(services.database, delivery_id)

    row = run_once(work)
    if row is None:
        raise TrackerError(f"no delivery {delivery_id} is kept here")
    shown = _json(row)
    if as_json:
        print_json(shown)
        return
    print_fields(shown)
    if row.body_removed_at is not None:
        note("Its body was removed by retention.")


@app.command()
def replay(
    delivery_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[DELIVERY_ID]...", help="Those to replay.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All that are quarantined, oldest first.")
    ] = False,
    as_json: JsonFlag = False,
) -> int:
    """Read quarantined callbacks again; exit status 1 where one is still not understood."""
    if bool(delivery_ids) == every:
        raise typer.BadParameter("give DELIVERY_IDs, or --all", param_hint="DELIVERY_ID")

    async def work(services: "Services") -> "list[Replay]":
        chosen = delivery_ids or await _quarantined(services)
        return [await services.replayer.replay(one) for one in chosen]

    done = run_once(work)
    shown: list[dict[str, Any]] = [
        {
            "delivery_id": one.delivery_id,
            "run_id": one.run_id,
            "outcome": one.outcome.value,
            "already": one.already,
            "reason": one.reason,
        }
        for one in done
    ]
    if as_json:
        print_json({"deliveries": shown})
    elif not shown:
        note("No delivery is quarantined.")
    else:
        print_table(
            ("delivery", "run", "outcome", "reason"),
            [(one["delivery_id"], one["run_id"], one["outcome"], one["reason"]) for one in shown],
        )
    return 1 if any(one.outcome is DeliveryOutcome.QUARANTINED for one in done) else 0


async def _quarantined(services: "Services") -> list[str]:
    from tracker.store.queries import runs as read

    found: list[str] = []
    cursor = None
    while True:
        rows, cursor = await read.list_deliveries(
            services.database, outcome=DeliveryOutcome.QUARANTINED, cursor=cursor, limit=100
        )
        found += [row.delivery_id for row in rows]
        if cursor is None:
            return found[::-1]


def _json(row: "DeliveryRow") -> dict[str, Any]:
    from tracker.views import delivery_json

    return delivery_json(row)
