"""`--wait` and `runs watch`: shows runs until nothing is left to learn of them, and how they ended.

What is shown comes from the database; `tracker.polling.follow` says who brings it there.
"""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import typer

from tracker.cli import progress
from tracker.cli.errand import note
from tracker.cli.output import plain, print_table
from tracker.core.record import Record
from tracker.core.run import RunStatus, Tracking

if TYPE_CHECKING:
    from tracker.polling.follow import Sight
    from tracker.services import Services


async def follow(
    services: "Services", run_ids: Sequence[str], *, json_lines: bool = False
) -> list[Record]:
    """The runs when all are settled or lost, in the order of their ids.

    Progress is shown on stderr, or on stdout as a line of JSON for each change. An interrupt says
    that the runs stay tracked.
    """
    known: dict[str, Record] = {}
    try:
        with progress.shown(services.clock) as screen:
            async with (
                services.signals,
                aclosing(services.follower.follow(run_ids, tell=screen.tell)) as changes,
            ):
                async for sights in changes:
                    known |= {sight.record.run.run_id: sight.record for sight in sights}
                    if json_lines:
                        _print_lines(sights)
                    else:
                        screen.show(sights)
    except asyncio.CancelledError:
        say_tracked(known.values())
        raise
    return [known[run_id] for run_id in run_ids if run_id in known]


def say_tracked(records: Iterable[Record]) -> None:
    """Tell somebody who interrupts that nothing is lost by it."""
    active = [one.run.run_id for one in records if one.tracking is Tracking.ACTIVE]
    if not active:
        return
    which = f"run {active[0]} stays" if len(active) == 1 else f"{len(active)} runs stay"
    again = " ".join(active[:3]) + (" …" if len(active) > 3 else "")
    note(
        f"tracker: interrupted; {plain(which)} tracked. `tracker runs watch {plain(again)}` "
        "follows again"
    )


def print_ends(records: Sequence[Record]) -> None:
    """How runs ended: status, cost and outputs."""
    print_table(
        ("run", "status", "cost", "took", "end known by"),
        [
            (
                one.run.run_id,
                one.run.status if one.run.settled else f"{one.run.status}, {one.tracking}",
                _dollars(one),
                progress.took(one),
                one.ended_via,
            )
            for one in records
        ],
    )
    rows = [
        (plain(one.run.run_id), plain(output.output_id), plain(output.type), plain(output.url))
        for one in records
        for output in one.run.outputs or ()
    ]
    if rows:
        typer.echo()
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for *cells, link in rows:  # in no table: a link that is folded cannot be followed
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        typer.echo("  ".join([*padded, link]))


def exit_status(records: Iterable[Record]) -> int:
    """0 where all runs completed, else 1, with a line for each that did not."""
    status = 0
    for record in records:
        run = record.run
        if run.status is RunStatus.COMPLETED and run.settled:
            continue
        error = f"{run.error.code} {run.error.message}".strip() if run.error else record.tracking
        note(f"tracker: run {plain(run.run_id)} {run.status}: {plain(error)}")
        status = 1
    return status


def _print_lines(sights: "Sequence[Sight]") -> None:
    import json

    from tracker.views import run_json

    for record, source in sights:
        line: dict[str, Any] = {**run_json(record), "last_source": source.value}
        typer.echo(json.dumps(line, separators=(",", ":")))


def _dollars(record: Record) -> str | None:
    run = record.run
    if run.charged_cost is None:
        quote = run.quoted_cost
        return None if quote is None or record.cost_final else f"not billed yet ({quote:f} quoted)"
    return f"{run.charged_cost:f} USD"
