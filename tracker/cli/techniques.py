"""`tracker techniques`: sync, list and show FLORA's catalogue."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracker.cli.errand import note, patience, run_once
from tracker.cli.output import JsonFlag, plain, print_fields, print_json, print_table
from tracker.core.errors import TrackerError

if TYPE_CHECKING:
    from decimal import Decimal

    from tracker.core.inputs import Port
    from tracker.services import Services
    from tracker.starting.catalogue import ListReport, SyncReport
    from tracker.store.queries.techniques import TechniqueRow

app = typer.Typer(name="techniques", help="FLORA's catalogue.", no_args_is_help=True)


@app.command()
def sync(as_json: JsonFlag = False) -> int:
    """Read FLORA's list of techniques and show what has changed."""

    async def work(services: "Services") -> "SyncReport":
        async with patience(services):
            return await services.catalogue_sync.sync()

    report = run_once(work, needs_key=True)
    if as_json:
        print_json(asdict(report) | {"complete": report.complete})
    elif report.skipped:
        note("Another process is reading the catalogue.")
    else:
        print_table(
            ("workspace", "pages", "techniques", "result"),
            [(one.workspace_id, one.pages, one.techniques, _result(one)) for one in report.lists],
        )
        typer.echo(f"{report.new} new, {report.gone} gone, {report.back} back again")
    failed = [one for one in report.lists if one.error is not None]
    for one in failed:
        note(f"tracker: the list of {one.workspace_id} was not read whole: {one.error}")
    return 1 if failed else 0


@app.command("list")
def list_(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Words in the id, the name or the description."),
    ] = None,
    gone: Annotated[
        bool, typer.Option("--gone", help="Also those that FLORA no longer has.")
    ] = False,
    limit: Annotated[int, typer.Option(help="So many at most.", min=1, max=100)] = 100,
    cursor: Annotated[str | None, typer.Option(help="Where the last page ended.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the techniques that are known, by name."""

    async def work(services: "Services") -> "tuple[list[TechniqueRow], str | None]":
        from tracker.store.queries import techniques

        return await techniques.page(
            services.database, query=" ".join(words or ()), gone=gone, cursor=cursor, limit=limit
        )

    rows, next_cursor = run_once(work)
    shown = [_json(row) for row in rows]
    if as_json:
        print_json({"techniques": shown, "meta": {"next_cursor": next_cursor}})
        return
    print_table(
        ("technique", "name", "USD", *(["gone since"] * gone), "description"),
        [
            (
                *(row.technique_id, row.name, _dollars(row.run_cost)),
                *([one["gone_at"]] * gone),
                row.description,
            )
            for row, one in zip(rows, shown, strict=True)
        ],
    )
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")
    if not rows and not words:
        note("None is known yet: `tracker techniques sync` reads FLORA's list.")


@app.command()
def show(
    technique: Annotated[str, typer.Argument(metavar="TECHNIQUE", help="Its id or its slug.")],
    as_json: JsonFlag = False,
) -> None:
    """Show a technique: its price, what it takes and what it makes."""

    async def work(services: "Services") -> "TechniqueRow | None":
        async with patience(services):
            found = await services.catalogue.find(technique)
        if found is None and all(one.client is None for one in services.workspaces):
            note("FLORA was not asked: FLORA_API_KEY is not set.")
        return found

    row = run_once(work)
    if row is None:
        raise TrackerError(
            f"there is no technique {technique}: `tracker techniques list` shows all"
        )
    shown = _json(row)
    if as_json:
        print_json(shown)
        return
    from tracker.flora.technique import ports

    takes, makes = ports(row.inputs), ports(row.outputs)
    price = None if row.run_cost is None else f"{_dollars(row.run_cost)} USD for each run"
    fields = {name: value for name, value in shown.items() if name not in ("inputs", "outputs")}
    print_fields(fields | {"run_cost": price})
    typer.echo()
    print_table(
        ("input", "type", "needed", "wants", "name", "description"),
        [(one.id, one.type, _need(one), one.hint, one.name, one.description) for one in takes],
    )
    typer.echo()
    print_table(
        ("output", "type", "is", "name", "description"),
        [(one.id, one.type, one.hint, one.name, one.description) for one in makes],
    )
    if takes and not shown["obstacle"]:
        given = [f"--input {_argument(f'{one.id}=…')}" for one in takes if not one.optional]
        name = _argument(row.slug or row.technique_id)
        typer.echo("\n" + " ".join(["tracker runs start", name, *given]))
    if not takes:
        note("Its inputs are not known: FLORA has not shown them.")


def _argument(text: str) -> str:
    """FLORA's text as an argument of a command that people copy: a shell finds no command in it."""
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


def _dollars(amount: "Decimal | None") -> str | None:
    """An amount with two digits after the point, or as many as it has."""
    if amount is None:
        return None
    exponent = amount.normalize().as_tuple().exponent
    return f"{amount:.{max(2, -exponent if isinstance(exponent, int) else 2)}f}"


def _result(report: "ListReport") -> str:
    return "failed" if report.error is not None else "complete"


def _json(row: "TechniqueRow") -> dict[str, Any]:
    from tracker.views import technique_json

    return technique_json(row)
