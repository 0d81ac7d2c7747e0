"""`tracker db`: the schema, and the counts that follow from the runs."""

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tracker.cli.arguments import parse_age
from tracker.cli.copy_progress import CopyLines
from tracker.cli.errand import note, prepare, run_once
from tracker.cli.output import JsonFlag, print_fields, print_json, print_table

if TYPE_CHECKING:
    from tracker.services import Services

app = typer.Typer(name="db", help="The database.", no_args_is_help=True)


@app.command()
def upgrade(as_json: JsonFlag = False) -> None:
    """Bring the database to this version's newest migration."""
    settings = prepare()
    from tracker.store import migrate

    async def work() -> tuple[str | None, str | None]:
        before = await migrate.current(settings.tracker_database_url)
        await migrate.upgrade(
            settings.tracker_database_url, history_since=settings.tracker_history_since
        )
        return before, await migrate.current(settings.tracker_database_url)

    before, after = asyncio.run(work())
    if as_json:
        print_json({"before": before, "current": after})
    elif before == after:
        typer.echo(f"The database is at {after}; nothing was to do.")
    else:
        typer.echo(f"The database went from {before or 'empty'} to {after}.")


@app.command()
def current(as_json: JsonFlag = False) -> None:
    """Show which migration the database is at, and which is the newest."""
    settings = prepare()
    from tracker.store import migrate

    at = asyncio.run(migrate.current(settings.tracker_database_url))
    shown = {"current": at, "newest": migrate.head()}
    if as_json:
        print_json(shown)
    else:
        print_fields({**shown, "current": at or "empty"})


@app.command("copy")
def copy_(
    to: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="TRACKER_COPY_TO",
            help="An empty database, which is given its tables where it has none.",
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Copy everything from TRACKER_DATABASE_URL to another database: all of it or nothing."""
    settings = prepare()
    from tracker.store.copy import copy
    from tracker.store.url import DatabaseUrl

    source = settings.tracker_database_url
    shown = {
        "from": str(DatabaseUrl.parse(source)),
        "to": str(DatabaseUrl.parse(to, "--to")),
    }
    began = time.monotonic()
    copied = asyncio.run(copy(source, to, progress=CopyLines().show))
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        print_json(shown | asdict(copied) | {"seconds": seconds})
        return
    print_table(("table", "rows"), copied.tables.items())
    note(
        f"{sum(copied.tables.values())} rows went from {shown['from']} to {shown['to']} in "
        f"{seconds} s; counted there, and {copied.compared} of them compared. A tracker that is "
        "started on it goes on from there; `tracker reconcile` brings what happened meanwhile."
    )


@app.command()
def recount(as_json: JsonFlag = False) -> None:
    """Count all runs anew for the dashboards, whatever their tallies say."""
    from tracker.store.writing import rollups as tallies

    counted = run_once(lambda services: tallies.recount(services.database))
    if as_json:
        print_json({"tallies": counted})
    else:
        typer.echo(f"All runs are counted anew, in {counted} tallies.")


@app.command("prune")
def prune_(
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Settled runs older than this go, as in 90d.")
    ],
    bodies_older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Callbacks lose their raw body after this; 30d, or with their run."
        ),
    ] = None,
    quarantined_older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Quarantined callbacks go after this; without it they stay."
        ),
    ] = None,
    keys_older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Idempotency keys go after this; without it they stay."),
    ] = None,
    audit_older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Entries of the audit log go after this; 365d."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would go.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove what is old, a few rows at a time, while everything else goes on."""
    runs = parse_age(older_than, "--older-than")
    given = {
        "bodies": bodies_older_than,
        "quarantined": quarantined_older_than,
        "keys": keys_older_than,
        "audit": audit_older_than,
    }
    others = {
        name: None if age is None else parse_age(age, f"--{name}-older-than")
        for name, age in given.items()
    }

    async def work(services: "Services") -> dict[str, int]:
        from tracker.operations.retention import ages

        chosen = ages(runs, first_sweep=services.settings.tracker_history_since, **others)
        return await services.pruner.prune(chosen, dry=dry_run)

    counts = run_once(work)
    if as_json:
        print_json({"dry_run": dry_run, "removed": counts})
        return
    print_table(("table", "rows"), counts.items())
    if dry_run:
        note("Nothing was removed: this is what would be.")
