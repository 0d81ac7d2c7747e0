"""The part of `Tracker` that reads runs, and follows them in the database until they end."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from operator import index
from typing import TYPE_CHECKING, Any, Final, cast, overload

from tracker.core.events import RunFilter
from tracker.core.log import get_logger
from tracker.core.record import Record
from tracker.core.run import RetryAdvice, Tracking
from tracker.core.starts import parse_tag
from tracker.errors import RunFailed, RunLost, RunUnknown, TrackerNotOpen, WaitTimeout
from tracker.library.inputs import check_number, check_seconds, check_text, check_texts, valid
from tracker.library.opening import OpenedTracker
from tracker.library.run import Event, Run, RunChange, RunFields, RunList, SpendingSummary

if TYPE_CHECKING:
    from pathlib import Path

    from tracker.delivering.downloads import DownloadReport
    from tracker.services import Services

PAGE_SIZE: Final = 100
LAST_MONTH: Final = timedelta(days=30)
CLOSED_MEANWHILE: Final = "the tracker was closed during this call"

log = get_logger(__name__)


def id_of(run: RunFields | str) -> str:
    """The id of a run or of anything else that names one, such as an event, or the id itself.
    Raises `InvalidRequest` for anything else."""
    return valid("run", _check_run, getattr(run, "run_id", run))


def ids_of(runs: RunFields | str | Iterable[RunFields | str]) -> list[str]:
    """The ids of one run, or of several. Raises `InvalidRequest` for anything else."""
    if isinstance(runs, RunFields | str):
        return [id_of(runs)]
    return [id_of(run) for run in valid("runs", _check_runs, runs)]


def _check_run(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a run or its id, not {value!r:.80}")
    return value


def _check_runs(value: object) -> Iterable[RunFields | str]:
    if not isinstance(value, Iterable):
        raise ValueError(f"must be a run or its id, or several of them, not {value!r:.80}")
    return cast("Iterable[RunFields | str]", value)


def raise_failures(runs: Sequence[RunFields]) -> None:
    """Raise `RunFailed` or `RunLost` for the first of the ended runs that did not complete."""
    for run in runs:
        if run.tracking == Tracking.LOST:
            raise RunLost(run, runs)
        if not run.succeeded:
            raise RunFailed(run, runs)


class RunCalls(OpenedTracker):
    """The part of `Tracker` that reads runs, and waits for them."""

    async def get(self, run_id: str) -> Run:
        """The run as it is stored. Raises `RunUnknown`."""
        from tracker.store.queries import runs as read

        run_id = valid("run_id", check_text, run_id)
        database = self._services().database
        record = await read.get_run(database, run_id)
        if record is None:
            raise RunUnknown([run_id])
        return self._run(record)

    async def runs(
        self,
        *,
        status: str | None = None,
        technique_id: str | None = None,
        workspace_id: str | None = None,
        project_id: str | None = None,
        tag: str | None = None,
        tracking: str | None = None,
        retry_advice: str | None = None,
    ) -> AsyncGenerator[Run, None]:
        """All stored runs that match every filter, newest first; `tag` is `key=value`,
        `technique_id` may be the slug.

        They are read in pages as the loop goes on, so that it can be left at any time. Raises
        `InvalidRequest` for a `tag`, `tracking` or `retry_advice` that no run can have.
        """
        from tracker.store.queries import runs as read
        from tracker.store.queries import techniques

        check_texts(
            status=status,
            technique_id=technique_id,
            workspace_id=workspace_id,
            project_id=project_id,
        )
        technique_id = await techniques.id_of(self._services().database, technique_id)
        cursor: str | None = None
        while True:
            records, cursor = await read.list_runs(
                self._services().database,
                status=status,
                technique_id=technique_id,
                workspace_id=workspace_id,
                project_id=project_id,
                tag=tag and "=".join(valid("tag", parse_tag, tag)),
                tracking=tracking and valid("tracking", Tracking, tracking),
                retry_advice=retry_advice and valid("retry_advice", RetryAdvice, retry_advice),
                cursor=cursor,
                limit=PAGE_SIZE,
            )
            for record in records:
                yield self._run(record)
            if cursor is None:
                return

    @overload
    async def wait(  # type: ignore[overload-overlap]  # an id is also a sequence of letters
        self, runs: Run | str, timeout: float | None = None, *, raise_on_failure: bool = True
    ) -> Run: ...

    @overload
    async def wait(
        self,
        runs: Iterable[Run | str],
        timeout: float | None = None,
        *,
        raise_on_failure: bool = True,
    ) -> list[Run]: ...

    async def wait(
        self,
        runs: Run | str | Iterable[Run | str],
        timeout: float | None = None,
        *,
        raise_on_failure: bool = True,
    ) -> Run | list[Run]:
        """Wait until one run, or each of several, has ended; return them as they are then.

        The database is followed: it does not matter which process or callback brings the news, and
        a run that no process polls is polled from here. A `timeout` (seconds) or a cancellation
        ends the wait and nothing else.

        Raises `RunFailed` if a run did not complete, and `RunLost` if FLORA has no such run; of
        several, when all have ended. Without `raise_on_failure` such runs are returned like the
        others. Raises `WaitTimeout`, `RunUnknown`, and `StoreUnavailable` if the database does not
        answer for a minute.
        """
        wanted = ids_of(runs)
        ended = {run.run_id: run async for run in self.as_settled(wanted, timeout=timeout)}
        result = RunList(ended[run_id] for run_id in wanted)
        if raise_on_failure:
            raise_failures(result)
        return result[0] if isinstance(runs, RunFields | str) else result

    async def as_settled(
        self, runs: RunFields | str | Iterable[RunFields | str], *, timeout: float | None = None
    ) -> AsyncGenerator[Run, None]:
        """Each of the runs as it ends, also one that failed or is lost.

        Raises `WaitTimeout`, `RunUnknown` and `StoreUnavailable` as `wait` does.
        """
        from tracker.store.errors import StoreClosed

        run_ids, timeout = ids_of(runs), valid("timeout", check_seconds, timeout)
        try:
            async with aclosing(_ending(self._services(), run_ids, timeout)) as records:
                async for record in records:
                    yield self._run(record)
        except StoreClosed as error:
            raise TrackerNotOpen(CLOSED_MEANWHILE) from error

    async def events_of(self, run: RunFields | str) -> list[Event]:
        """The events of a run, oldest first. Raises `RunUnknown`."""
        from tracker.store.queries import runs as read

        run_id = id_of(run)
        events = await read.events(self._services().database, run_id)
        if not events:
            await self.get(run_id)
        return [Event._of(event) for event in events]

    async def events(
        self,
        after: int | None = None,
        *,
        run_id: str | None = None,
        technique_id: str | None = None,
        workspace_id: str | None = None,
        status: str | None = None,
    ) -> AsyncGenerator[RunChange[Run], None]:
        """The changes of matching runs as they happen, until the tracker is closed, or the uvicorn
        that serves this process begins to stop. `technique_id` may be the slug.

        `after` is the `event_id` of the last change that was handled: what came since then, from
        any process, comes first. Without it they begin with the first step of the loop. Raises
        `StoreUnavailable` if the database does not answer for a minute.
        """
        from tracker.store.queries import techniques

        check_texts(
            run_id=run_id, technique_id=technique_id, workspace_id=workspace_id, status=status
        )
        if after is not None:
            after = valid("after", index, after)
        services = self._services()
        wanted = RunFilter(
            run_id=run_id,
            technique_id=await techniques.id_of(services.database, technique_id),
            workspace_id=workspace_id,
            status=status,
        )
        async with aclosing(services.changes.follow(wanted, after)) as changes:
            async for change in changes:
                yield RunChange._of(change, self._run)

    async def spending(
        self,
        by: str = "day",
        *,
        since: datetime | timedelta | None = LAST_MONTH,
        workspace_id: str | None = None,
    ) -> SpendingSummary:
        """What the runs started since a UTC day cost, by `day`, `technique` or `tag:KEY`, in USD;
        and the use of each budget.

        `since` is a time, an age, or `None` for all; its whole day counts. Raises
        `InvalidRequest` for another `by`, and for a time without a zone.
        """
        from tracker.store.queries import spending

        check_texts(workspace_id=workspace_id)
        services = self._services()
        by = valid("by", spending.check_by, by)
        at = valid("since", partial(_day_of, services.clock()), since)
        rows, total = await spending.spending(
            services.database, by, since=at, workspace_id=workspace_id
        )
        budgets = await services.budgets.usages()
        return SpendingSummary(
            by=by, since=at, rows=tuple(rows), total=total, budgets=tuple(budgets)
        )

    async def download(
        self,
        runs: RunFields | str | Iterable[RunFields | str],
        to: "Path | str",
        *,
        max_bytes: float | None = None,
        concurrency: int = 4,
        allow_private: bool = False,
    ) -> "DownloadReport":
        """Download the outputs of runs into a folder, and wait for runs that have not ended.

        Files that are there already are not downloaded again; an interrupted download goes on. One
        file at least, and `concurrency` at most, are fetched at a time. The report has a result
        with its file or error for each output, and the runs without outputs. Raises
        `RunUnknown` and `DownloadDirectoryError`.
        """
        from pathlib import Path

        from tracker.delivering.downloads import DownloadOptions, DownloadReport
        from tracker.delivering.fetch import MAX_BYTES

        services = self._services()
        run_ids = list(dict.fromkeys(ids_of(runs)))
        most_bytes = MAX_BYTES if max_bytes is None else valid("max_bytes", check_number, max_bytes)
        await _known(services, run_ids)
        report = DownloadReport()
        options = DownloadOptions(
            to=valid("to", Path, to),
            allow_private=allow_private or services.settings.flora_is_local,
            max_bytes=most_bytes,
            concurrency=max(valid("concurrency", index, concurrency), 1),
        )
        found = services.downloader.named(run_ids, watch=True, notify=_notify)
        await services.downloader.download(found, options, report)
        return report

    def _run(self, record: Record | Mapping[str, Any]) -> Run:
        return Run._bound(record, self)


async def _ending(
    services: "Services", run_ids: Iterable[str], timeout: float | None
) -> AsyncGenerator[Record, None]:
    """Each run's record as it ends: settled or lost.

    Raises `RunUnknown`, also for a run that is removed meanwhile, `WaitTimeout`, and
    `StoreUnavailable` if the database does not answer for a minute.
    """
    wanted = list(dict.fromkeys(run_ids))
    reason: str | None = None

    def delayed(line: str) -> None:
        nonlocal reason
        reason = line
        _notify(line)

    give_up = None if timeout is None else time.monotonic() + timeout
    found = await _known(services, wanted, patience=timeout or None)
    for record in found.values():
        if record.tracking is not Tracking.ACTIVE:
            yield record
    active = {key: one for key, one in found.items() if one.tracking is Tracking.ACTIVE}
    async with aclosing(services.follower.follow(list(active), notify=delayed)) as updates:
        while active:
            try:
                # Not around the loop: a time-out must not interrupt what the caller does.
                left = None if give_up is None else max(give_up - time.monotonic(), 0.0)
                async with asyncio.timeout(left):
                    changed = await anext(updates)
            except StopAsyncIteration:
                raise RunUnknown(list(active)) from None
            except TimeoutError as error:
                still = [RunFields._of(one) for one in active.values()]
                raise WaitTimeout._of(still, timeout or 0.0, reason) from error
            active |= {one.record.run.run_id: one.record for one in changed}
            for record, _ in changed:
                if record.tracking is not Tracking.ACTIVE:
                    del active[record.run.run_id]
                    yield record


async def _known(
    services: "Services", run_ids: Sequence[str], *, patience: float | None = None
) -> dict[str, Record]:
    """These runs, as soon as the database answers. Raises `RunUnknown`, and `StoreUnavailable`
    after a minute, or `patience` seconds if that is less."""
    from tracker.polling.follow import OUTAGE, until_available

    read = partial(services.follower.read, run_ids)
    once = cache(_notify)  # it is repeated with the same reason
    found = await until_available(read, once, give_up_after=min(patience or OUTAGE, OUTAGE))
    if missing := [run_id for run_id in run_ids if run_id not in found]:
        raise RunUnknown(missing)
    return found


def _notify(line: str) -> None:
    """Log why a wait takes longer."""
    log.warning("run.wait_delayed", reason=line)


def _day_of(now: datetime, since: object) -> datetime | None:
    if since is None:
        return None
    if not isinstance(since, datetime | timedelta):
        raise ValueError(f"must be a datetime, a timedelta or None, not {since!r:.80}")
    at = now - since if isinstance(since, timedelta) else since
    if at.tzinfo is None:
        raise ValueError("must be an aware time, as datetime(2026, 1, 31, tzinfo=UTC)")
    return at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
