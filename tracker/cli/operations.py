"""For operators: `tracker doctor`, `reconcile`, `poll`, `verify`, `db` and `audit`.

`reconcile`, `poll` and `verify` do one round each, for cron.
"""

import asyncio
import os
import time
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import typer

from tracker.cli.command import (
    AS_JSON,
    CURSOR,
    LIMIT,
    age,
    configure,
    flag,
    flora_deadline,
    option,
    print_list,
    run_on_database,
    run_once,
)
from tracker.cli.output import Screen, console, note, plain, print_fields, print_json, print_table
from tracker.core.errors import SettingsError, StoreUnavailable, TrackerError
from tracker.core.formatting import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker.operations.doctor import Finding
    from tracker.polling.reading import PollReport
    from tracker.polling.sweep import SweepReport
    from tracker.polling.verify import VerifyReport
    from tracker.services import Services
    from tracker.store.copy import Step
    from tracker.store.engine import Database
    from tracker.store.queries.audit import AuditRow

_COLOURS: Final = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_WIDTH: Final = 110
"""Maximum width: longer lines are hard to read, and cron's mail has no terminal."""
_STATUS_SECONDS: Final = 2.0
_WANT_RECOUNT: Final = ("0010", "0012", "0020")
"""Migrations whose counts older processes do not keep."""
_VARIABLE: Final = "TRACKER_DATABASE_URL"

db = typer.Typer(name="db", help="Migrate, copy and prune the database.", no_args_is_help=True)
audit = typer.Typer(
    name="audit", help="List who did what, and who was refused.", no_args_is_help=True
)


def doctor(as_json: bool = AS_JSON) -> int:
    """Check a deployment from end to end, and say what to fix.

    Run it with the settings of the service. It changes nothing: test deliveries are removed again.
    Exit status 1 if a check failed, 2 if the settings cannot be read. docs/doctor.md explains each
    line.
    """
    from tracker.operations.doctor import failed, worst

    status = 0
    try:
        findings = _examine()
    except SettingsError as error:
        advice = "Fix that setting; nothing else was checked."
        findings, status = [failed("settings", f"They cannot be read: {error}.", advice)], 2
    level = worst(findings)
    if as_json:
        print_json({"level": level.value, "findings": [_finding_json(one) for one in findings]})
    else:
        _show_findings(findings)
    return status or int(level.value == "failed")


def _examine() -> "Sequence[Finding]":
    from tracker.operations.doctor.examination import examine, run
    from tracker.operations.telemetry import configure_logs
    from tracker.settings import read_settings

    settings, sources, _, unknown = read_settings()
    configure_logs(
        format=settings.tracker_log_format,
        # The findings say what matters; level debug still logs everything.
        level="debug" if settings.tracker_log_level == "debug" else "critical",
        secrets=settings.secret_values,
    )
    return run(examine(settings, sources, unknown))


def _finding_json(finding: "Finding") -> dict[str, str | None]:
    return {
        "name": finding.name,
        "level": finding.level.value,
        "workspace_id": finding.workspace,
        "seen": finding.seen,
        "advice": finding.advice or None,
    }


def _show_findings(findings: "Sequence[Finding]") -> None:
    """Print a line for each finding, and below it what to do."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in findings:
        text = Text(plain(one.seen))
        if one.advice:
            text.append(f"\n→ {plain(one.advice)}", style="bold")
        name = one.name if one.workspace is None else f"{one.name}\n{one.workspace}"
        table.add_row(Text(one.level.value, style=_COLOURS[one.level.value]), Text(name), text)
    out = console()
    out.width = min(out.width, _WIDTH)
    out.print(table)
    counts = Counter(one.level.value for one in findings)
    warnings = counted(counts["warning"], "warning")
    out.print(f"\n{counts['failed']} failed, {warnings}, {counts['ok']} ok.")


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
                (
                    one.workspace_id,
                    one.pages,
                    one.items,
                    one.discovered,
                    one.repaired,
                    _sweep_result(one),
                )
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


def _sweep_result(report: "SweepReport") -> str:
    if report.skipped:
        return "skipped: another process is sweeping"
    if report.error is not None:
        return "failed"
    return "incomplete" if report.gaps or report.generations_error else "complete"


@db.command()
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


@db.command()
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


@db.command("copy")
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


@db.command()
def recount(as_json: bool = AS_JSON) -> None:
    """Rebuild the rollups of the dashboards from the runs."""
    from tracker.store.writing import rollups

    count = run_on_database(rollups.recount)
    if as_json:
        print_json({"rollups": count})
    else:
        typer.echo(f"All runs were counted again, in {count} rollups.")


@db.command()
def prune(
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


@audit.command("list")
def list_audit(
    since: timedelta | None = age("Entries of the last 24h, 7d, …"),
    action: str | None = option(
        "Filter by action: start, launch, stop, resolve, replay, acknowledge, forget, "
        "resend, enable_endpoint, test_endpoint, prune, sign_in, sign_out or refused."
    ),
    limit: int = LIMIT,
    cursor: str | None = CURSOR,
    as_json: bool = AS_JSON,
) -> None:
    """List the audit log, newest first."""
    from tracker.store.clock import shared_clock
    from tracker.store.queries import audit as read
    from tracker.views import audit_facts, audit_json

    if action is not None and action not in list(read.Action):
        raise typer.BadParameter(f"{action!r} is not an action", param_hint="--action")

    async def find(database: "Database") -> "tuple[list[AuditRow], str | None]":
        async with shared_clock(database) as clock:
            start = None if since is None else clock() - since
            return await read.list_audit(
                database, since=start, action=action, cursor=cursor, limit=limit
            )

    print_list(
        "entries",
        find,
        audit_json,
        {
            "at": "at",
            "actor": "actor",
            "action": "action",
            "detail": lambda entry: ", ".join(
                f"{name} {value}" for name, value in audit_facts(entry["detail"])
            ),
            "times": "count",
            "address": "address",
            "request": "request_id",
        },
        as_json=as_json,
        hide=("request", "address", "times"),
    )
