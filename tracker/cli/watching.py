"""`tracker runs watch` and `tracker runs explain`: what becomes of runs, and why."""

from typing import TYPE_CHECKING, Annotated

import typer

from tracker.cli.arguments import RunId, RunIds
from tracker.cli.errand import run_once
from tracker.cli.follow import exit_status, follow, print_ends
from tracker.cli.output import JsonFlag, plain, print_json
from tracker.core.errors import TrackerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker.core.record import Record
    from tracker.explaining.explainer import Explanation
    from tracker.services import Services


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(watch)
    app.command()(explain)


def watch(
    run_ids: RunIds,
    as_json: JsonFlag = False,
    json_lines: Annotated[
        bool,
        typer.Option("--json-lines", help="Print a line of JSON on stdout for each change."),
    ] = False,
) -> int:
    """Show runs until they are settled; exit status 1 if one fails.

    An interrupt leaves them tracked.
    """

    async def work(services: "Services") -> "list[Record]":
        await require_known(services, run_ids)
        return await follow(services, run_ids, json_lines=json_lines)

    records = run_once(work)
    if as_json and not json_lines:
        from tracker.views import run_json

        print_json({"runs": [run_json(record) for record in records]})
    elif not json_lines:
        print_ends(records)
    return exit_status(records)


def explain(run_id: RunId, as_json: JsonFlag = False) -> None:
    """Tell how a run came to be known, what was seen of it when, and what happens next."""

    async def work(services: "Services") -> "Explanation | None":
        return await services.explainer.explain(run_id)

    explanation = run_once(work)
    if explanation is None:
        raise unknown([run_id])
    if as_json:
        from tracker.views import explanation_json

        print_json(explanation_json(explanation))
        return
    typer.echo(f"Run {plain(run_id)} (times are UTC)\n")
    for sentence in explanation.sentences:
        at = "" if sentence.at is None else f"{sentence.at:%Y-%m-%d %H:%M:%S}"
        _print_beside(at, plain(sentence.text))


async def require_known(services: "Services", run_ids: "Sequence[str]") -> None:
    """Raise `TrackerError`, naming them, where runs are not known here."""
    from tracker.store.queries import runs as read

    found = await read.get_runs(services.database, run_ids)
    if missing := [run_id for run_id in run_ids if run_id not in found]:
        raise unknown(missing)


def unknown(run_ids: "Sequence[str]") -> TrackerError:
    """The error for runs that nobody here has heard of."""
    which = ", ".join(run_ids)
    verb = "is" if len(run_ids) == 1 else "are"
    return TrackerError(
        f"run {which} {verb} not known here: `tracker runs track {run_ids[0]}` would track it"
    )


_MARGIN = len("2026-01-01 00:00:00")


def _print_beside(left: str, text: str) -> None:
    """`text` to the right of `left`, in lines no longer than the terminal takes."""
    import shutil
    import sys
    import textwrap

    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    lines = textwrap.wrap(text, max(room - _MARGIN - 2, 40)) or [""]
    for number, line in enumerate(lines):
        typer.echo(f"{left if number == 0 else '':<{_MARGIN}}  {line}")
