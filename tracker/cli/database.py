"""`tracker db`: migrations, copies, retention, and the rollups of the dashboards."""

import asyncio
import os
import time
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import typer

from tracker.cli.options import AS_JSON, age, flag, option
from tracker.cli.output import Screen, note, print_fields, print_json, print_table
from tracker.cli.setup import configure, run_on_database, run_once
from tracker.core.errors import StoreUnavailable, TrackerError

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.store.copy import Step

_STATUS_SECONDS: Final = 2.0
_WANT_RECOUNT: Final = ("0010", "0012", "0020")
"""Migrations whose counts older processes do not keep."""
_VARIABLE: Final = "TRACKER_DATABASE_URL"

app = typer.Typer(name="db", help="Migrate, copy and prune the database.", no_args_is_help=True)


@app.command()
def upgrade(as_json: bool = AS_JSON) -> None:
    """Migrate the database to this version's schema."""
    settings = configure()
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
        typer.echo(f"The database is at {after} already.")
    else:
        typer.echo(f"The database was migrated from {before or 'empty'} to {after}.")
    if before and after and any(before < one <= after for one in _WANT_RECOUNT):
        again = "`tracker reconcile --since 1d` and " if before < _WANT_RECOUNT[0] else ""
        note(
            f"After the last process of the version before has stopped, run {again}`tracker db "
            "recount`: it counts nothing for the new dashboards."
        )


@app.command()
def current(as_json: bool = AS_JSON) -> None:
    """Show the database's revision, and the newest one."""
    settings = configure()
    from tracker.store import migrate

    at = asyncio.run(migrate.current(settings.tracker_database_url))
    shown = {"current": at, "newest": migrate.head()}
    if as_json:
        print_json(shown)
    else:
        print_fields({**shown, "current": at or "empty"})


@app.command("copy")
def copy_(
    to: str = option(
        "Target: an empty database. Its tables are created if they are missing.",
        metavar="URL",
        default=...,
        envvar="TRACKER_COPY_TO",
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Copy everything from TRACKER_DATABASE_URL to another database, in one transaction."""
    settings = configure()
    from tracker.settings import read_settings
    from tracker.store.copy import copy
    from tracker.store.url import DatabaseUrl

    source, place = settings.tracker_database_url, read_settings().sources.get(_VARIABLE)
    names = (
        _VARIABLE if place in (None, "the environment") else f"{_VARIABLE.lower()} in {place}:",
        "TRACKER_COPY_TO" if os.environ.get("TRACKER_COPY_TO") == to else "--to",
    )
    shown = {"from": str(DatabaseUrl.parse(source)), "to": str(DatabaseUrl.parse(to, names[1]))}
    screen = Screen()

    def show(step: "Step") -> None:
        screen.status(
            f"{step.table}: {step.rows} of {step.total} rows",
            seconds=_STATUS_SECONDS,
            now=step.rows == step.total,
        )

    began = time.monotonic()
    try:
        copied = asyncio.run(copy(source, to, names=names, progress=show))
    except StoreUnavailable as error:  # it names its database, unlike those of other commands
        raise TrackerError(str(error)) from error
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        print_json(shown | asdict(copied) | {"seconds": seconds})
        return
    print_table(("table", "rows"), copied.tables.items())
    note(
        f"Copied {sum(copied.tables.values())} rows from {shown['from']} to {shown['to']} in "
        f"{seconds} s; verified their number, and {copied.compared} of them value by value. Start "
        "the tracker on the copy; `tracker reconcile` adds what happened in the meantime."
    )


@app.command()
def recount(as_json: bool = AS_JSON) -> None:
    """Rebuild the rollups of the dashboards from the runs."""
    from tracker.store.writing import rollups

    counted = run_on_database(rollups.recount)
    if as_json:
        print_json({"rollups": counted})
    else:
        typer.echo(f"All runs were counted again, in {counted} rollups.")


@app.command("prune")
def prune_(
    older_than: timedelta = age("Remove settled runs older than this, as in 90d.", default=...),
    bodies_older_than: timedelta | None = age(
        "Remove raw bodies of callbacks. Default: 30d, or with their run."
    ),
    quarantined_older_than: timedelta | None = age("Remove quarantined callbacks. Default: never."),
    keys_older_than: timedelta | None = age("Remove idempotency keys. Default: never."),
    audit_older_than: timedelta | None = age("Remove entries of the audit log. Default: 365d."),
    dry_run: bool = flag("--dry-run", "Only count the rows."),
    as_json: bool = AS_JSON,
) -> None:
    """Remove old rows, a few at a time, without stopping the service."""

    async def work(services: "Services") -> dict[str, int]:
        from tracker.operations.retention import ages

        chosen = ages(
            older_than,
            first_sweep=services.settings.tracker_history_since,
            bodies=bodies_older_than,
            quarantined=quarantined_older_than,
            keys=keys_older_than,
            audit=audit_older_than,
        )
        return await services.pruner.prune(chosen, dry=dry_run)

    counts = run_once(work)
    if as_json:
        print_json({"dry_run": dry_run, "removed": counts})
        return
    print_table(("table", "rows"), counts.items())
    if dry_run:
        note("Nothing was removed: this was a dry run.")
