"""`tracker spending`: what was spent, and how far each budget is used."""

import csv
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracker.cli.arguments import parse_age
from tracker.cli.errand import run_once
from tracker.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from tracker.services import Services


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(spending)


def spending(
    by: Annotated[
        str, typer.Option(metavar="day|technique|tag:KEY", help="What to add up by.")
    ] = "day",
    since: Annotated[
        str, typer.Option(metavar="DURATION", help="Runs started in the last 24h, 30d, …")
    ] = "30d",
    workspace: Annotated[str | None, typer.Option(metavar="W", help="Filter by workspace.")] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV and nothing else on stdout.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show what was charged, what is still a quote, and how far each budget is used.

    In whole UTC days: a run counts on the day on which it was started.
    """
    from tracker.store.queries.spending import check_by

    if as_csv and as_json:
        raise typer.BadParameter("cannot be combined", param_hint="--csv, --json")
    try:
        check_by(by)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--by") from error
    back = parse_age(since, "--since")

    async def work(services: "Services") -> dict[str, Any]:
        from tracker.store.queries.spending import spending
        from tracker.views import spending_json

        begin = services.clock() - back
        rows, total = await spending(services.database, by, since=begin, workspace_id=workspace)
        return spending_json(by, begin, rows, total, await services.budgets.usages())

    found = run_once(work)
    if as_json:
        print_json(found)
        return
    columns = ("of", "name", "runs", "charged", "quoted", "unpriced")
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row[name] for name in columns] for row in found["spending"])
        return
    shown = [*found["spending"], {**found["total"], "of": "total"}]
    print_table(
        (by.removeprefix("tag:"), "runs", "charged", "still quoted", "unpriced"),
        [
            (
                row["name"] or row["of"] or "(other runs)",
                row["runs"],
                _usd(row["charged"]),
                _usd(row["quoted"]),
                row["unpriced"] or None,
            )
            for row in shown
        ],
    )
    if found["budgets"]:
        typer.echo()
        print_table(
            ("budget", "limit", "charged", "quoted", "reserved", "left", "used", "begins anew"),
            [
                (
                    one["budget"],
                    *(_usd(one[name]) for name in ("usd", "charged", "quoted", "reserved", "left")),
                    f"{100 * one['used_share']:.0f} %",
                    one["renews_at"] and one["renews_at"][:16] + "Z",
                )
                for one in found["budgets"]
            ],
        )


def _usd(amount: float) -> str:
    return f"${amount:,.2f}" if round(amount, 2) == amount else f"${amount:,.6f}".rstrip("0")
