"""`tracker reconcile`, `poll` and `verify`: the worker's jobs once, for cron."""

import asyncio
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from tracker.cli.command import AS_JSON, age, flora_deadline, run_once
from tracker.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from tracker.polling.reading import PollReport
    from tracker.polling.sweep import SweepReport
    from tracker.polling.verify import VerifyReport
    from tracker.services import Services


def reconcile(
    since: timedelta | None = age(
        "How far back to read, as in 24h or 7d. Default: as the scheduled sweep."
    ),
    as_json: bool = AS_JSON,
) -> int:
    """Sweep FLORA's run history once and show what was found."""
    from tracker.workspaces import UNKNOWN

    async def work(services: "Services") -> "list[SweepReport]":
        sweeps = [services.sweeper.sweep(one, since=since) for one in services.workspaces.keyed]
        async with flora_deadline(services):
            await services.applier.drain()
            reports = await asyncio.gather(*sweeps)
        await services.recovery.recover()
        return reports

    reports = run_once(work, needs_key=True)
    if as_json:
        print_json({"sweeps": [asdict(report) for report in reports]})
    else:
        print_table(
            ("workspace", "pages", "items", "discovered", "repaired", "result"),
            [
                (one.workspace_id, one.pages, one.items, one.discovered, one.repaired, _result(one))
                for one in reports
            ],
        )
    failed = False
    for report in reports:
        known = "" if report.workspace_id == UNKNOWN else f" of {report.workspace_id}"
        where = f"tracker: the sweep{known}"
        if report.error is not None:
            note(f"{where} failed: {report.error}")
        if report.generations_error is not None:
            note(f"{where} could not read generations: {report.generations_error}")
        for gap in report.gaps:
            span = f"{gap.run_type} runs created from {gap.from_at} to {gap.to_at}"
            note(f"{where} could not read {span}: {gap.error}")
        failed |= bool(report.error or report.generations_error or report.gaps)
    return 1 if failed else 0


def poll(as_json: bool = AS_JSON) -> int:
    """Poll all due runs once, and read due bills."""

    async def work(services: "Services") -> "PollReport":
        from tracker.polling.reading import PollReport

        async with flora_deadline(services):
            await services.applier.drain()
            total = PollReport()
            for poll_due in (services.poller.poll_due, services.poller.recheck_due):
                while True:
                    last = await poll_due()
                    total.add(last)
                    if not last.more or last.pages + last.reads == 0:
                        break
        await services.recovery.recover()
        return total

    report = run_once(work, needs_key=True)
    inner = {"more", "at_once"}  # for the worker's schedule
    figures = {name: value for name, value in asdict(report).items() if name not in inner}
    if as_json:
        print_json(figures)
    else:
        counted = {name: value for name, value in figures.items() if name != "trouble"}
        print_table(list(counted), [list(counted.values())])
    if report.failed:
        note(
            f"tracker: {report.failed} of {report.claimed} due runs could not be read; "
            "`tracker runs show` says why"
        )
    if report.trouble:
        note(f"tracker: {report.trouble}")
    return 1 if report.failed or report.trouble else 0


def verify(
    since: timedelta = age(
        "How far back to compare, as in 24h or 30d.", default=timedelta(days=30), show_default="30d"
    ),
    as_json: bool = AS_JSON,
) -> int:
    """Compare the database with FLORA's history.

    Changes nothing. Lists runs that are missing here, that FLORA does not list, or whose status,
    cost or outputs differ. Exit status 1 if there are any, or if the history could not be read
    completely.
    """

    async def work(services: "Services") -> "list[VerifyReport]":
        async with flora_deadline(services):
            keyed = services.workspaces.keyed
            return [await services.verifier.verify(one, since=since) for one in keyed]

    verdicts = run_once(work, needs_key=True)
    if as_json:
        print_json({"workspaces": [verdict.as_json() for verdict in verdicts]})
    else:
        differences = [(one, each) for one in verdicts for each in one.differences]
        if differences:
            print_table(
                ("workspace", "run", "created", "differs", "here", "FLORA"),
                [
                    (
                        *(one.workspace_id, each.run_id, each.created_at),
                        *(each.problem.replace("_", " "), each.here, each.flora),
                    )
                    for one, each in differences
                ],
                hide=("workspace", "created"),
            )
        for one in verdicts:
            note(
                f"tracker: {one.workspace_id}: {one.compared} runs compared, "
                f"{len(one.differences)} differences, {one.unsettled} may still change, "
                f"{one.removed} removed here by retention"
            )
    for one in verdicts:
        if one.error is not None:
            note(f"tracker: the history of {one.workspace_id} could not be read: {one.error}")
    return 0 if all(one.good for one in verdicts) else 1


def _result(report: "SweepReport") -> str:
    if report.skipped:
        return "skipped: another process is sweeping"
    if report.error is not None:
        return "failed"
    return "incomplete" if report.gaps or report.generations_error else "complete"
