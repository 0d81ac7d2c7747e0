"""`tracker techniques`: FLORA's catalogue with its prices; `tracker spending`: what was charged."""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from tracker.cli.command import (
    AS_JSON,
    CURSOR,
    OF_WORKSPACE,
    TECHNIQUE,
    argument,
    checked,
    flag,
    flora_deadline,
    option,
    parse_time,
    print_list,
    run_once,
)
from tracker.cli.output import note, plain, print_fields, print_json, print_table
from tracker.core.errors import TrackerError
from tracker.core.formatting import csv_text, money

if TYPE_CHECKING:
    from tracker.core.starts import Port
    from tracker.services import Services
    from tracker.starting.catalogue import SyncReport
    from tracker.store.queries.techniques import TechniqueRow

app = typer.Typer(
    name="techniques", help="Sync, list and show FLORA's techniques.", no_args_is_help=True
)


@app.command()
def sync(as_json: bool = AS_JSON) -> int:
    """Update the catalogue from FLORA and show what has changed."""

    async def work(services: "Services") -> "SyncReport":
        async with flora_deadline(services):
            return await services.catalogue_sync.sync()

    report = run_once(work, needs_key=True)
    if as_json:
        print_json(asdict(report) | {"complete": report.complete})
    elif report.skipped:
        note("Another process is updating the catalogue.")
    else:
        print_table(
            ("workspace", "pages", "techniques", "result"),
            [
                (
                    *(one.workspace_id, one.pages, one.techniques),
                    "complete" if one.error is None else "failed",
                )
                for one in report.lists
            ],
        )
        typer.echo(f"{report.new} new, {report.gone} retired, {report.back} restored")
    failed = [one for one in report.lists if one.error is not None]
    for one in failed:
        note(f"tracker: the techniques of {one.workspace_id} could not be read: {one.error}")
    return 1 if failed else 0


@app.command("list")
def list_(
    words: list[str] = argument("TEXT", "Words in the id, name or description.", default=[]),
    gone: bool = flag("--gone", "Include retired."),
    limit: int = option("Maximum rows.", default=100, min=1, max=100),
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List the techniques of the catalogue by name."""
    from tracker.store.queries import techniques
    from tracker.views import technique_json

    query = " ".join(words)
    count = print_list(
        "techniques",
        partial(techniques.page, query=query, gone=gone, cursor=cursor, limit=limit),
        technique_json,
        {
            "technique": "technique_id",
            "name": "name",
            "price": "run_cost",
            **({"retired": "gone_at"} if gone else {}),
            "description": "description",
        },
        as_json=as_json,
        hide=("description", "retired"),
    )
    if not count and not words and not as_json:
        note("The catalogue is empty: `tracker techniques sync` reads FLORA's list.")


@app.command()
def show(technique: str = TECHNIQUE, as_json: bool = AS_JSON) -> None:
    """Show a technique with its price, inputs and outputs."""

    async def work(services: "Services") -> "TechniqueRow | None":
        async with flora_deadline(services):
            found = await services.catalogue.find(technique)
        if found is None and not services.workspaces.keyed:
            note("FLORA was not asked: FLORA_API_KEY is not set.")
        return found

    row = run_once(work)
    if row is None:
        raise TrackerError(
            f"there is no technique {technique}: `tracker techniques list` shows all techniques"
        )
    from tracker.flora.parse import ports
    from tracker.views import technique_json

    shown = technique_json(row)
    if as_json:
        print_json(shown)
        return

    takes, makes = ports(row.inputs), ports(row.outputs)
    price = None if row.run_cost is None else f"{money(row.run_cost)} for each run"
    fields = {name: value for name, value in shown.items() if name not in ("inputs", "outputs")}
    print_fields(fields | {"run_cost": price})
    typer.echo()
    print_table(
        ("input", "type", "required", "format", "name", "description"),
        [(one.id, one.type, _need(one), one.hint, one.name, one.description) for one in takes],
    )
    typer.echo()
    print_table(
        ("output", "type", "format", "name", "description"),
        [(one.id, one.type, one.hint, one.name, one.description) for one in makes],
    )
    if takes and not shown["obstacle"]:
        inputs = [f"--input {_argument(f'{one.id}=…')}" for one in takes if not one.optional]
        name = _argument(row.slug or row.technique_id)
        typer.echo("\n" + " ".join(["tracker runs start", name, *inputs]))
    if not takes:
        note("FLORA shows no inputs for it.")


def _argument(text: str) -> str:
    """`text` as an argument of a command to copy, which a shell takes as it is."""
    import re
    import shlex

    text = plain(text)
    if re.fullmatch(r"[\w.:-]+", text, re.ASCII):
        return text
    return f'"{text}"' if re.fullmatch(r"[\w.:-]+=…", text, re.ASCII) else shlex.quote(text)


def _need(port: "Port") -> str:
    words: Iterable[str] = (
        "no" if port.optional else "yes",
        *(["several values"] if port.several else []),
        *(["an element's id too"] if port.element else []),
    )
    return ", ".join(words)


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
