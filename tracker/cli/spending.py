"""`tracker spending`: charges, open quotes and budgets."""

import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import typer

from tracker.cli.command import AS_JSON, OF_WORKSPACE, checked, flag, option, parse_time, run_once
from tracker.cli.output import print_json, print_table
from tracker.core.formatting import csv_text, money

if TYPE_CHECKING:
    from tracker.services import Services


def spending(
    by: str = option("Group by.", metavar="day|technique|tag:KEY", default="day"),
    since: datetime | None = option(
        "Whole UTC days, from that of an age (24h, 30d) or a date (2026-11-01).",
        metavar="T",
        parser=parse_time,
        show_default="30d",
    ),
    workspace: str | None = OF_WORKSPACE,
    as_csv: bool = flag("--csv", "Print CSV and nothing else on stdout."),
    as_json: bool = AS_JSON,
) -> None:
    """Show charges, open quotes and the use of budgets.

    Days are in UTC; a run counts on the day on which it was started.
    """
    from tracker.store.queries.spending import check_by

    if as_csv and as_json:
        raise typer.BadParameter("cannot be combined", param_hint="--csv, --json")
    checked(check_by, by, "--by")

    async def work(services: "Services") -> dict[str, Any]:
        from tracker.store.queries.spending import spending
        from tracker.views import spending_json

        begin = since or services.clock() - timedelta(days=30)
        rows, total = await spending(services.database, by, since=begin, workspace_id=workspace)
        return spending_json(by, begin, rows, total, await services.budgets.usages())

    found = run_once(work)
    if as_json:
        print_json(found)
        return
    columns = ("of", "name", "runs", "charged", "quoted", "unpriced")
    if as_csv:
        rows = ([row[name] for name in columns] for row in found["spending"])
        sys.stdout.write(csv_text([columns, *rows]))
        return
    shown = [*found["spending"], {**found["total"], "of": "total"}]
    print_table(
        (by.removeprefix("tag:"), "runs", "charged", "quoted", "unpriced"),
        [
            (
                row["name"] or row["of"] or "(other runs)",
                row["runs"],
                money(row["charged"]),
                money(row["quoted"]),
                row["unpriced"] or None,
            )
            for row in shown
        ],
    )
    if found["budgets"]:
        typer.echo()
        print_table(
            ("budget", "limit", "charged", "quoted", "reserved", "left", "used", "starts again"),
            [
                (
                    one["budget"],
                    *(
                        money(one[name])
                        for name in ("usd", "charged", "quoted", "reserved", "left")
                    ),
                    f"{100 * one['used_share']:.0f} %",
                    one["renews_at"] and one["renews_at"][:16] + "Z",
                )
                for one in found["budgets"]
            ],
            hide=("reserved", "quoted", "charged", "starts again"),
        )
