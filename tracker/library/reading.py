"""The part of `Tracker` that reads runs, and waits for them."""

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, overload

from tracker.core.budget import parse_tag
from tracker.core.events import RunFilter
from tracker.core.record import Record
from tracker.core.run import RetryAdvice, Tracking
from tracker.errors import RunUnknown, TrackerNotOpen
from tracker.library import following
from tracker.library.inputs import valid
from tracker.library.opening import OpenedTracker
from tracker.library.run import Event, Run, RunChange, RunFields, RunList, SpendingSummary

if TYPE_CHECKING:
    from pathlib import Path

    from tracker.delivering.downloads import DownloadReport

PAGE_SIZE: Final = 100
LAST_MONTH: Final = timedelta(days=30)
CLOSED_MEANWHILE: Final = "the tracker was closed during this call"


class RunCalls(OpenedTracker):
    """The part of `Tracker` that reads runs, and waits for them."""

    async def get(self, run_id: str) -> Run:
        """The run as it is stored. Raises `RunUnknown`."""
        from tracker.store.queries import runs as read

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
        wanted = [runs] if isinstance(runs, Run | str) else list(runs)
        ended = {run.run_id: run async for run in self.as_settled(wanted, timeout=timeout)}
        result = RunList(ended[following.id_of(run)] for run in wanted)
        if raise_on_failure:
            following.raise_failures(result)
        return result[0] if isinstance(runs, Run | str) else result

    async def as_settled(
        self, runs: Iterable[RunFields | str], *, timeout: float | None = None
    ) -> AsyncGenerator[Run, None]:
        """Each of the runs as it ends, also one that failed or is lost.

        Raises `WaitTimeout`, `RunUnknown` and `StoreUnavailable` as `wait` does.
        """
        from tracker.store.errors import StoreClosed

        run_ids = map(following.id_of, runs)
        try:
            async with aclosing(
                following.as_settled(self._services(), run_ids, timeout)
            ) as records:
                async for record in records:
                    yield self._run(record)
        except StoreClosed as error:
            raise TrackerNotOpen(CLOSED_MEANWHILE) from error

    async def events_of(self, run: RunFields | str) -> list[Event]:
        """The events of a run, oldest first. Raises `RunUnknown`."""
        from tracker.store.queries import runs as read

        run_id = following.id_of(run)
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
        max_bytes: int | None = None,
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
        wanted = [runs] if isinstance(runs, RunFields | str) else runs
        run_ids = list(dict.fromkeys(map(following.id_of, wanted)))
        await following.known(services, run_ids)
        report = DownloadReport()
        options = DownloadOptions(
            to=Path(to),
            allow_private=allow_private or services.settings.flora_is_local,
            max_bytes=MAX_BYTES if max_bytes is None else max_bytes,
            concurrency=max(concurrency, 1),
        )
        found = services.downloader.named(run_ids, watch=True, notify=following.notify)
        await services.downloader.download(found, options, report)
        return report

    def _run(self, record: Record | Mapping[str, Any]) -> Run:
        return Run._bound(record, self)


def _day_of(now: datetime, since: datetime | timedelta | None) -> datetime | None:
    if since is None:
        return None
    at = now - since if isinstance(since, timedelta) else since
    if at.tzinfo is None:
        raise ValueError("must be an aware time, as datetime(2026, 1, 31, tzinfo=UTC)")
    return at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
