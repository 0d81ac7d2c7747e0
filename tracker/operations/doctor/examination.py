"""All looks at once, in bounded time, each by itself: one that fails hides no other.

Some build upon another: what is in the database can only be told once it is known to be readable,
clocks only once both have answered. They wait for each other as tasks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, TypeVar

from tracker.core.clock import Clock, utc_now
from tracker.core.errors import StoreError
from tracker.operations.doctor import clocks, database, flora, given, public, room, upkeep, work
from tracker.operations.doctor.database import DatabaseState
from tracker.operations.doctor.finding import Finding, Name, failed, warning
from tracker.operations.doctor.flora import FloraState
from tracker.operations.logs import Redactor
from tracker.settings import Settings
from tracker.store.engine import Database
from tracker.store.queries import attention
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.attention import read_gauges
from tracker.store.url import DatabaseUrl
from tracker.worker.cron import longest_wait

T = TypeVar("T")

DATABASE_SECONDS: Final = 8.0
FLORA_SECONDS: Final = 12.0
WORK_SECONDS: Final = 8.0
DISK_SECONDS: Final = 4.0
PUBLIC_SECONDS: Final = 22.0
"""The longest of all, for it waits for several answers; when it has cleaned up, all is over."""


async def examine(
    settings: Settings, sources: Mapping[str, str], *, clock: Clock = utc_now
) -> list[Finding]:
    """Look at everything. `sources` says of each setting where it is set.

    Nothing is raised for what is broken, nothing is changed, and it is over within 30 s.
    """
    url = DatabaseUrl.parse(settings.tracker_database_url)
    at_database = _task(
        "database",
        DATABASE_SECONDS,
        database.look(url, clock=clock),
        lambda trouble: DatabaseState(findings=(trouble,)),
    )
    at_flora = _task(
        "key",
        FLORA_SECONDS,
        flora.look(settings, clock=clock),
        lambda trouble: FloraState(findings=(trouble,)),
    )
    at_public = _task(
        "callbacks", PUBLIC_SECONDS, public.look(settings, at_database, clock=clock), lambda t: [t]
    )
    at_work = asyncio.create_task(_work(settings, at_database, at_flora, clock))
    at_disk = asyncio.create_task(_disk(url, at_database))
    in_database, in_flora = await at_database, await at_flora
    findings = [
        *given.look(settings, sources, now=clock()),
        *in_database.findings,
        *await at_disk,
        *in_flora.findings,
        *clocks.compare(
            in_flora.clock_offset,
            in_database.clock_ahead,
            tolerance=settings.tracker_signature_tolerance,
        ),
        *await at_public,
        *await at_work,
    ]
    clean = Redactor(settings.secret_values)
    return [
        replace(one, seen=clean(None, "", one.seen), advice=clean(None, "", one.advice))
        for one in findings
    ]


def _task(
    name: Name,
    seconds: float,
    look: Coroutine[Any, Any, T],
    otherwise: Callable[[Finding], T],
) -> "asyncio.Task[T]":
    return asyncio.create_task(_in_time(name, seconds, look, otherwise))


async def _in_time(
    name: Name, seconds: float, look: Awaitable[T], otherwise: Callable[[Finding], T]
) -> T:
    """What a look brings; where it takes too long, or breaks, a finding that says so."""
    try:
        async with asyncio.timeout(seconds):
            return await look
    except TimeoutError:
        return otherwise(
            failed(
                name,
                f"Nothing was found out within {seconds:g} s.",
                "See whether that part hangs, and the way to it; then run the doctor again.",
            )
        )
    except Exception as fault:
        return otherwise(
            failed(
                name,
                f"The doctor could not look: {type(fault).__name__}: {fault}.",
                "That is a fault of the doctor's own: please report it, with this line.",
            )
        )


async def _disk(url: DatabaseUrl, at_database: Awaitable[DatabaseState]) -> list[Finding]:
    size = (await at_database).size if url.dialect == "postgresql" else None

    async def look() -> list[Finding]:
        return [await room.look(url, size=size)]

    return await _in_time("disk", DISK_SECONDS, look(), lambda trouble: [trouble])


async def _work(
    settings: Settings,
    at_database: Awaitable[DatabaseState],
    at_flora: Awaitable[FloraState],
    clock: Clock,
) -> list[Finding]:
    in_database, in_flora = await at_database, await at_flora
    if not in_database.readable:
        return [
            warning(
                "worker",
                "Whether somebody polls and sweeps is in the database, which cannot be read.",
                "Mend the database first, and run the doctor again.",
            )
        ]
    look = _read_work(settings, in_database, in_flora, clock)
    return await _in_time("worker", WORK_SECONDS, look, lambda trouble: [trouble])


async def _read_work(
    settings: Settings, in_database: DatabaseState, in_flora: FloraState, clock: Clock
) -> list[Finding]:
    now = clock() + (in_database.clock_ahead or timedelta(0))
    try:
        async with await Database.open(
            settings.tracker_database_url, application_name="tracker-doctor"
        ) as opened:
            gauges = await read_gauges(opened, now=now)
            swept = await attention.sweep_health(opened)
            sweeping = await attention.sweeping(opened, now=now)
            unread = coverage.unread(await coverage.everything(opened))
            conflicts = await attention.conflicts(opened)
    except StoreError as error:
        return [
            failed(
                "worker",
                f"The database could not be read: {error}.",
                "Mend the database first, and run the doctor again.",
            )
        ]
    seen = work.Ledger(
        now=now,
        interval=timedelta(seconds=longest_wait(settings.tracker_reconcile_cron, clock())),
        sweeps=swept,
        gauges=gauges,
        sweeping=sweeping,
        unread=unread,
    )
    findings = []
    if any(one.api_key for one in settings.all_workspaces):
        findings.append(work.worker(seen))
    ids = in_flora.ids or tuple(one.id for one in settings.all_workspaces)
    for workspace, workspace_id in zip(settings.all_workspaces, ids, strict=True):
        if workspace.api_key is None:
            continue  # there is nothing to sweep it with, and the key's own line says so
        findings.append(
            work.sweeps(
                replace(
                    seen,
                    sweeps=_sweeps_of(workspace_id, swept, settings),
                    unread=[one for one in unread if workspace_id in (None, one.workspace_id)],
                ),
                workspace=given.name_of(settings, workspace),
            )
        )
    return [*findings, *upkeep.look(gauges, conflicts, now=now)]


def _sweeps_of(
    workspace_id: str | None, swept: list[attention.SweepHealth], settings: Settings
) -> list[attention.SweepHealth]:
    """Those of a workspace; the only one's may stand under a name from before its id was known."""
    if len(settings.all_workspaces) > 1:
        return [one for one in swept if one.workspace_id == workspace_id]
    names = {workspace_id, "default", None}
    return [one for one in swept if workspace_id is None or one.workspace_id in names]
