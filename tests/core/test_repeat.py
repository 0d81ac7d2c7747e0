"""A loop goes on whatever its step raises, and ends when it is cancelled."""

import asyncio
import logging
from collections.abc import Iterable

import pytest

from tests.support.logs import capture_logs
from tests.support.waiting import assert_takes_less, eventually
from tracker.core.errors import StoreUnavailable
from tracker.core.waiting import cancel, repeat, run_all

PAUSES = (0.001, 0.004)


class Step:
    """Raises these, one after the other, and waits for ever then."""

    def __init__(self, failures: Iterable[BaseException]) -> None:
        self._failures = iter(failures)
        self.calls = 0
        self.waits = False

    async def __call__(self) -> None:
        self.calls += 1
        for failure in self._failures:
            raise failure
        self.waits = True
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("failure", "event", "level"),
    [
        (StoreUnavailable("no answer"), "loop.database_down", "warning"),
        (ValueError("a fault"), "loop.failed", "error"),
        (asyncio.CancelledError(), "loop.failed", "error"),
    ],
)
async def test_it_goes_on_after_a_failure(failure: BaseException, event: str, level: str) -> None:
    """One line an interval says so, with the number of failures."""
    step = Step([failure] * 20)
    with capture_logs() as lines:
        task = asyncio.create_task(repeat("work", step, pauses=PAUSES))
        await eventually(lambda: step.waits)
    (line,) = lines
    assert (line["event"], line["log_level"], line["loop"]) == (event, level, "work")
    assert (line["count"], step.calls) == (1, 21)
    assert not task.done()
    task.cancel()
    await assert_takes_less(1, lambda: cancel(task))
    assert task.cancelled()


async def test_a_fault_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """A failure of the database is not, because it is expected."""
    step = Step([StoreUnavailable("no answer"), ZeroDivisionError("a fault")])
    with caplog.at_level(logging.WARNING, "tracker"):
        task = asyncio.create_task(repeat("work", step, pauses=PAUSES))
        await eventually(lambda: step.waits)
    assert [bool(record.exc_info) for record in caplog.records] == [False, True]
    await cancel(task)


async def test_pauses_grow_until_a_step_succeeds() -> None:
    """From the first to the longest; and the next failure begins with the first again."""
    slept: list[float] = []
    failing = [True] * 4 + [False] + [True]

    async def step() -> None:
        if failing.pop(0):
            raise ValueError("a fault")

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracker.core.waiting.asyncio.sleep", sleep)
        await repeat("work", step, pauses=(1.0, 4.0), is_over=lambda: not failing)
    assert slept == [1.0, 2.0, 4.0, 4.0, 1.0]


async def test_it_ends_between_two_steps() -> None:
    """As soon as `is_over` is true, also after a failure."""
    calls = []

    async def step() -> None:
        calls.append(1)
        raise ValueError("a fault")

    await repeat("work", step, pauses=PAUSES, is_over=lambda: len(calls) == 3)
    assert len(calls) == 3


async def test_a_cancelled_pause_ends_it() -> None:
    """It is not waited for."""
    task = asyncio.create_task(repeat("work", Step([ValueError("a fault")]), pauses=(60.0, 60.0)))
    await asyncio.sleep(0.01)
    await assert_takes_less(1, lambda: cancel(task))
    assert task.cancelled()


@pytest.mark.parametrize("fails", [True, False])
async def test_a_step_that_hides_a_cancellation_ends_it(fails: bool) -> None:
    """By an error of its own, as one of the database on the way out, or by none."""

    async def step() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if fails:
                raise StoreUnavailable("no answer") from None

    task = asyncio.create_task(repeat("work", step, pauses=PAUSES))
    await asyncio.sleep(0.01)
    await assert_takes_less(10, lambda: cancel(task, seconds=20))
    assert task.cancelled()


async def test_a_fault_of_a_step_that_is_cancelled_is_logged() -> None:
    """It is the tracker's own, and nothing else would show it."""

    async def step() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ZeroDivisionError("a fault")

    with capture_logs() as lines:
        task = asyncio.create_task(repeat("work", step, pauses=PAUSES))
        await asyncio.sleep(0.01)
        await assert_takes_less(10, lambda: cancel(task, seconds=20))
    assert [(line["event"], line["loop"]) for line in lines] == [("loop.failed", "work")]
    assert task.cancelled()


async def test_a_loop_goes_on_after_one_of_several_has_failed() -> None:
    """The first error is raised and the others are cancelled; the caller is not."""
    ended = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise StoreUnavailable("no answer")

    async def last() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("last")

    calls = 0

    async def step() -> None:
        nonlocal calls
        calls += 1
        with pytest.raises(StoreUnavailable):
            await run_all([last(), fail()])

    task = asyncio.create_task(repeat("work", step, pauses=PAUSES, is_over=lambda: calls == 3))
    await assert_takes_less(5, lambda: task)
    assert (calls, ended, task.cancelling()) == (3, ["last"] * 3, 0)


async def test_several_end_with_their_caller() -> None:
    """All are cancelled with it, and the results come in their order."""
    ended = []

    async def wait(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    task = asyncio.create_task(run_all([wait(1), wait(2)]))
    await asyncio.sleep(0.01)
    await cancel(task)
    assert (task.cancelled(), ended) == (True, [1, 2])
    assert await run_all([asyncio.sleep(0.01, 1), asyncio.sleep(0, 2)]) == [1, 2]
    assert await run_all([]) == []
