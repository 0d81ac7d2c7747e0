"""`tracker batches`: the batches that were started, and what became of their rows."""

from typing import TYPE_CHECKING, Annotated

import typer

from tracker.cli.batch_output import (
    OutputOption,
    ResultsOption,
    batch_json,
    check_output,
    form,
    show_rows,
)
from tracker.cli.batch_report import outcome_json
from tracker.cli.errand import note, run_once
from tracker.cli.output import JsonFlag, plain, print_json, print_table
from tracker.core.errors import TrackerError

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.starting.batch_rows import RowState
    from tracker.store.queries.batches import BatchCounts, BatchRow

app = typer.Typer(name="batches", help="The batches that were started.", no_args_is_help=True)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="So many at most.", min=1, max=1000)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List batches, newest first."""

    async def work(services: "Services") -> "tuple[list[tuple[BatchRow, BatchCounts]], str | None]":
        from tracker.store.queries import batches

        found, more = await batches.list_batches(services.database, cursor=cursor, limit=limit)
        tallies = await batches.tallies(services.database, [one.batch_id for one in found])
        return [(one, tallies[one.batch_id]) for one in found], more

    page, next_cursor = run_once(work)
    shown = [batch_json(one, tally) for one, tally in page]
    if as_json:
        print_json({"batches": shown, "meta": {"next_cursor": next_cursor}})
        return
    columns = ("batch_id", "name", "technique_id", "rows", "completed", "failed", "active", "cost")
    print_table(
        ("batch", "sheet", "technique", "rows", "completed", "failed", "running", "cost", "begun"),
        [(*(one[name] for name in columns), one["created_at"][:19] + "Z") for one in shown],
    )
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")


@app.command()
def show(
    batch_id: Annotated[str, typer.Argument(metavar="BATCH", help="Its bat_… identifier.")],
    results: ResultsOption = None,
    output: OutputOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what became of each row of a batch."""
    check_output(results, output)

    async def work(services: "Services") -> "tuple[BatchRow, BatchCounts, list[RowState]] | None":
        from tracker.store.queries import batches

        found = await batches.get(services.database, batch_id)
        if found is None:
            return None
        return found, await services.batches.tally(found), await services.batches.rows(found)

    found = run_once(work)
    if found is None:
        raise TrackerError(
            f"batch {plain(batch_id)} is not known here: `tracker batches list` shows them"
        )
    if as_json:
        print_json(outcome_json(*found))
    if output is not None or not as_json:
        show_rows(found[2], form(results, output), output)
