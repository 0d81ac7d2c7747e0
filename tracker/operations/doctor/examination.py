"""All checks together, in bounded time; one that fails or hangs hides no other.

Some need others' results (the work needs a readable database, clocks need answers); they wait for
each other as tasks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from tracker.core.clock import utc_now
from tracker.core.log import Redactor
from tracker.core.waiting import in_thread
from tracker.delivering.endpoints import ANSWER_SECONDS
from tracker.operations.doctor import Finding, Name, database, failed, warning, webhooks, work
from tracker.operations.doctor.database import DatabaseState
from tracker.operations.doctor.delivery import FLORA_WAITS
from tracker.operations.doctor.settings import (
    FloraState,
    check_keys,
    check_settings,
    compare_clocks,
)
from tracker.settings import Settings
from tracker.store.url import DatabaseUrl

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimits:
    """Seconds for each check, `flora_read` and `delivery` for single requests."""

    database: float = 8.0
    disk: float = 4.0
    flora: float = 12.0
    flora_read: float = 10.0
    delivery: float = FLORA_WAITS
    callbacks: float = 22.0
    """The longest: it waits for several answers, and then cleans up."""
    endpoints: float = ANSWER_SECONDS + 3
    endpoint: float = ANSWER_SECONDS
    """For one answer."""
    work: float = 8.0


async def examine(
    configured: Settings,
    sources: Mapping[str, str],
    unknown: Sequence[str] = (),
    *,
    limits: TimeLimits | None = None,
) -> list[Finding]:
    """Run all checks within 30 s; raises nothing for what is broken.

    `sources` says where each setting is set, `unknown` names the unknown ones (`Loaded`).
    """
    limits = limits or TimeLimits()
    url = DatabaseUrl.parse(configured.tracker_database_url)
    start = asyncio.create_task
    check = database.check(url, clock=utc_now)
    at_database = start(_within("database", limits.database, check, DatabaseState))
    reading = check_keys(configured, clock=utc_now, deadline=limits.flora_read)
    at_flora = start(_within("key", limits.flora, reading, FloraState))
    sending = webhooks.check_callbacks(
        configured, at_database, clock=utc_now, timeout=limits.delivery
    )
    at_callbacks = start(_within("callbacks", limits.callbacks, sending, list))
    testing = webhooks.check_endpoints(configured, clock=utc_now, seconds=limits.endpoint)
    at_endpoints = start(_within("endpoints", limits.endpoints, testing, list))

    async def check_work() -> list[Finding]:
        in_database, in_flora = await at_database, await at_flora
        if not in_database.readable:
            return [
                warning(
                    "worker",
                    "Unknown whether a worker runs: the database cannot be read.",
                    "Fix the database first, and run the doctor again.",
                )
            ]
        ids = in_flora.ids or [one.id for one in configured.all_workspaces]
        now = utc_now() + (in_database.clock_ahead or timedelta(0))
        return await _within("worker", limits.work, work.check(configured, ids, now), list)

    async def check_disk() -> list[Finding]:
        size = (await at_database).size if url.dialect == "postgresql" else None
        return await _within("disk", limits.disk, database.check_disk(url, size), list)

    at_work, at_disk = start(check_work()), start(check_disk())
    in_database, in_flora = await at_database, await at_flora
    findings = [
        *check_settings(configured, sources, unknown, now=utc_now()),
        *in_database.findings,
        *await at_disk,
        *in_flora.findings,
        *compare_clocks(
            in_flora.clock_offset,
            in_database.clock_ahead,
            tolerance=configured.tracker_signature_tolerance,
        ),
        *await at_callbacks,
        *await at_endpoints,
        *await at_work,
    ]
    redact = Redactor(configured.secret_values)
    return [replace(one, seen=redact(one.seen), advice=redact(one.advice)) for one in findings]


async def _within(
    name: Name, seconds: float, check: Awaitable[T], result: Callable[[list[Finding]], T]
) -> T:
    """The result of a check; if it hangs or breaks, a `result` with one finding about that."""
    try:
        async with asyncio.timeout(seconds):
            return await check
    except TimeoutError:
        finding = failed(
            name,
            f"No result within {seconds:g} s.",
            "Check whether that part hangs, and the network; then run the doctor again.",
        )
    except Exception as error:
        finding = failed(
            name,
            f"The check itself failed: {type(error).__name__}: {error}.",
            "This is a bug in the doctor: please report it, with this line.",
        )
    return result([finding])


class _AbandonedThreads(ThreadPoolExecutor):
    """A thread per call; nothing waits for those that hang.

    Resolving a name, or a file on a failed disk, can hang for minutes in a call that cannot be
    cancelled. An event loop and a process wait for such threads when they end.
    """

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Any:
        return in_thread("doctor", partial(fn, *args, **kwargs))


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` that does not wait for threads that hang."""
    with asyncio.Runner() as runner:
        runner.get_loop().set_default_executor(_AbandonedThreads())
        return runner.run(work)
