"""The types of the main calls, as programs see them: read by mypy and pyright, never run."""

from collections.abc import AsyncGenerator, Iterator
from decimal import Decimal
from typing import assert_type

import tracker.sync
from tracker import (
    BatchResult,
    DownloadReport,
    Event,
    Mounted,
    Output,
    Received,
    Run,
    RunChange,
    RunEvent,
    Spending,
    SpendingSummary,
    Technique,
    Tracker,
    Usage,
)
from tracker.errors import RunFailed


async def asynchronous() -> None:
    """`Tracker`."""
    async with Tracker.from_env(worker=False) as opened:
        assert_type(opened, Tracker)
        run = await opened.start("icon-pack", {"prompt": "a", "count": 2}, tags={"a": "b"})
        assert_type(run, Run)
        assert_type(await run.wait(timeout=600), Run)
        assert_type(await opened.wait(run.run_id), Run)
        assert_type(await opened.wait([run, "run_1"]), list[Run])
        assert_type(opened.runs(status="failed"), AsyncGenerator[Run, None])
        assert_type(await run.events(), list[Event])
        assert_type(run.outputs, tuple[Output, ...])
        assert_type(run.charged_cost, Decimal | None)
        batch = await opened.start_batch("icon-pack", [{"prompt": "a"}])
        assert_type(await batch.results(), list[BatchResult[Run]])
        assert_type(opened.events(), AsyncGenerator[RunChange[Run], None])
        spending = await opened.spending()
        assert_type(spending, SpendingSummary)
        assert_type(spending.total, Spending)
        assert_type(spending.budgets, tuple[Usage, ...])
        assert_type(await opened.download(run, "files"), DownloadReport)
        assert_type(opened.techniques("icon"), AsyncGenerator[Technique, None])
        assert_type(await opened.technique("icon-pack"), Technique)
        assert_type(await opened.receive_callback(b"", {}), Received)
        assert_type(opened.asgi(), Mounted)

        @opened.on("run.settled", name="store")
        async def store(event: RunEvent) -> None:
            assert_type(event.run, Run)

        assert_type(await store(RunEvent.__new__(RunEvent)), None)


def blocking() -> None:
    """`tracker.sync.Tracker`."""
    with tracker.sync.Tracker.from_env() as opened:
        assert_type(opened, tracker.sync.Tracker)
        run = opened.start("icon-pack", [{"id": "prompt", "type": "text", "value": "a"}])
        assert_type(run, tracker.sync.Run)
        assert_type(run.wait(timeout=600), tracker.sync.Run)
        assert_type(opened.wait([run, "run_1"]), list[tracker.sync.Run])
        assert_type(opened.runs(tag="a=b"), Iterator[tracker.sync.Run])
        batch = opened.batch("bat_1").wait(timeout=600)
        assert_type(batch.results(), list[BatchResult[tracker.sync.Run]])
        assert_type(opened.events(after=0), Iterator[RunChange[tracker.sync.Run]])
        assert_type(opened.techniques(), Iterator[Technique])
        assert_type(opened.technique("icon-pack"), Technique)
        try:
            run.refresh()
        except RunFailed as error:
            assert_type(error.retry_advice, str | None)
