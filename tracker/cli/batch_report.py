"""What `tracker batch` says of a plan and of its outcome, and the exit status that follows."""

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Final

import typer

from tracker.cli.batch_output import batch_json, cost_words, dollars, row_json
from tracker.cli.errand import note
from tracker.cli.output import plain, print_json, print_table
from tracker.core.errors import TrackerError
from tracker.starting.sheet import Problem

if TYPE_CHECKING:
    from tracker.starting.batch import Outcome
    from tracker.starting.batch_rows import Plan, RowState
    from tracker.store.queries.batches import BatchCounts, BatchRow

_TOLD: Final = 20
"""So many rows that came to nothing are named; the results tell of all."""


def keep_to(limit: Decimal | None, plan: "Plan") -> None:
    """Raise `TrackerError` where the plan may cost more than it is allowed to."""
    if limit is None or not plan.missing:
        return
    if plan.cost is None:
        raise TrackerError(
            f"FLORA names no price for {plan.technique.technique_id}, so --max-cost cannot be kept "
            "to; nothing was started"
        )
    if plan.cost > limit:
        raise TrackerError(
            f"starting {_rows(len(plan.missing))} could cost {dollars(plan.cost)}, more than "
            f"--max-cost {dollars(limit)}; nothing was started"
        )


def intention(plan: "Plan") -> str:
    """What starting the batch would do, in a sentence."""
    missing, rows = len(plan.missing), len(plan.rows)
    if not missing:
        return f"Nothing to start: {_rows(rows)}, all started before."
    price = "at a price that FLORA does not tell"
    if plan.cost is not None:
        price = f"{dollars(plan.cost)} at most"
    before = f"; {rows - missing} started before" if rows > missing else ""
    return f"To start: {missing} of {_rows(rows)}, {price}{before}."


def show_plan(plan: "Plan", *, as_json: bool) -> None:
    """Show what a dry run found."""
    from tracker.views import number_json

    missing = plan.missing
    if as_json:
        print_json(
            {
                "batch_id": plan.batch.batch_id,
                "technique_id": plan.batch.technique_id,
                "rows": len(plan.rows),
                "to_start": len(missing),
                "run_cost": number_json(plan.technique.run_cost),
                "cost": number_json(plan.cost),
                "starts": [
                    {
                        "row": row.entry.position,
                        "line": row.entry.line,
                        "key": row.entry.key,
                        "inputs": row.inputs,
                    }
                    for row in missing
                ],
            }
        )
        return
    print_table(
        ("row", "line", "key", "inputs"),
        [
            (
                row.entry.position,
                row.entry.line,
                row.entry.key,
                " ".join(f"{one['id']}={one['value']}" for one in row.inputs),
            )
            for row in missing
        ],
    )
    typer.echo(intention(plan))


def outcome_json(
    batch: "BatchRow", tally: "BatchCounts", rows: "Sequence[RowState]"
) -> dict[str, object]:
    """A batch and its rows as JSON values."""
    return {"batch": batch_json(batch, tally), "rows": [row_json(row) for row in rows]}


def problem_json(problem: Problem) -> dict[str, object]:
    """A problem of a sheet as JSON values."""
    return {"line": problem.line, "column": problem.column, "message": problem.message}


def tell_problems(name: str, problems: Sequence[Problem]) -> None:
    """A line for each problem of a sheet."""
    for problem in problems:
        note(f"{plain(name)}: {plain(str(problem))}")


def tell_changes(plan: "Plan") -> None:
    """The rows that are not started again because their input has to change, with FLORA's words."""
    for row in plan.to_change:
        note(f"line {row.entry.line}: change the input: {plain(row.why or '')}")


def exit_status(outcome: "Outcome", *, waited: bool) -> int:
    """0 where all rows completed (or, not waited for, were started); else 1, and what went
    wrong."""
    bad = [row for row in outcome.rows if not (row.done if waited else row.started)]
    # Of rows that were never reached, what ended the command tells enough.
    told = [row for row in bad if row.why] if outcome.stopped else bad
    for row in told[:_TOLD]:
        run = "" if row.record is None else f"run {row.record.run.run_id} "
        why = f": {row.why}" if row.why else ""
        note(f"tracker: line {row.entry.line}: {plain(f'{run}{row.status}{why}')}")
    if len(told) > _TOLD:
        note(f"tracker: and {_rows(len(told) - _TOLD)} more; the results tell of all")
    tally = outcome.tally
    if outcome.stopped is not None:
        from tracker.starting.batch import spans

        left = [row.entry.line for row in outcome.rows if not row.started]
        if left:
            note(f"tracker: not started: {spans(left)}")
        note(
            f"tracker: stopped: {plain(outcome.stopped).rstrip('.')}. {tally.unstarted} of "
            f"{_rows(tally.rows)} not started; repeat the command to go on"
        )
    note(
        f"Batch {outcome.batch.batch_id}: {tally.completed} of {_rows(tally.rows)} completed, "
        f"{cost_words(tally)}."
    )
    return 1 if bad or outcome.stopped is not None else 0


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
