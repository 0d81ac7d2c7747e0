"""`tracker db`: the schema, and the counts that follow from the runs."""

import asyncio

import typer

from tracker.cli.errand import prepare, run_once
from tracker.cli.output import JsonFlag, print_fields, print_json

app = typer.Typer(name="db", help="The database.", no_args_is_help=True)


@app.command()
def upgrade(as_json: JsonFlag = False) -> None:
    """Bring the database to this version's newest migration."""
    settings = prepare()
    from tracker.store import migrate

    async def work() -> tuple[str | None, str | None]:
        before = await migrate.current(settings.tracker_database_url)
        await migrate.upgrade(settings.tracker_database_url)
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


@app.command()
def recount(as_json: JsonFlag = False) -> None:
    """Count all runs anew for the dashboards, whatever their tallies say."""
    from tracker.store import tallies

    counted = run_once(lambda services: tallies.recount(services.database))
    if as_json:
        print_json({"tallies": counted})
    else:
        typer.echo(f"All runs are counted anew, in {counted} tallies.")
