"""Forms of FLORA's answers that differ from its documentation: the same runs, ends and bills."""

from dataclasses import replace
from typing import Any

import pytest

from tests.support.clocks import HandClock
from tests.worker.conftest import MakeFlora, OpenServices, assert_true_to, on_history, the_run
from tests.worker.test_coverage import SPAN, at_flora, gaps, known
from tests.worker.test_poll import poll_to_the_end, start
from tests.worker.test_sweep import sweep
from tracker.core.record import Record
from tracker.services import Services
from tracker.store.queries import runs as read


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone. FLORA's forms are read before anything is stored."""
    return sqlite_url


FORMS: dict[str, dict[str, Any]] = {
    "times in seconds": {"time_unit": "s"},
    "failed runs at 100 per cent": {"full_progress": True},
    "keys read by type": {"key_source": "by_type"},
    "links signed anew by each read": {"signed_links": True},
}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({key: form[key] for form in FORMS.values() for key in form}, id="all"),
        *(pytest.param(FORMS[form], id=form, marks=pytest.mark.thorough) for form in FORMS),
    ],
)
async def test_runs_end_alike_in_every_form(
    form: dict[str, Any], make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Runs that were started here or by a colleague settle with FLORA's own end, outputs, cost and
    times; once the cost is final, reading them again changes nothing, and adds no events."""
    async with make_flora(failures=0.4, **form) as flora:
        services = await open_on(flora)
        run_ids = await start(services, 4)
        run_ids += [flora.start().run_id for _ in range(4)]
        assert (await sweep(services)).error is None
        await poll_to_the_end(services, clock, within=3600)
        clock.move(3600)
        assert (await sweep(services)).error is None
        settled = [await the_run(services, run_id) for run_id in run_ids]
        for record in settled:
            assert_true_to(without_signatures(record), flora)
            assert (record.cost_final, record.run.conflict) == (True, False)
        events = await timelines(services, run_ids)
        for _ in range(3):
            clock.move(3600)
            assert (await sweep(services)).error is None
        assert await timelines(services, run_ids) == events
        assert [await the_run(services, run_id) for run_id in run_ids] == settled
        assert set(flora.world.runs) == set(run_ids)


def without_signatures(record: Record) -> Record:
    """The record with the links that FLORA does not sign."""
    outputs = tuple(
        replace(one, url=one.url.partition("?signature=")[0]) for one in record.run.outputs or ()
    )
    return replace(record, run=replace(record.run, outputs=outputs))


async def timelines(services: Services, run_ids: list[str]) -> list[int]:
    """How many events each run has."""
    return [len(await read.events(services.database, run_id)) for run_id in run_ids]


async def test_runs_that_are_deleted_while_the_list_is_read_hide_no_others(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """After half of the pages one of their runs is deleted, and all that follow move up."""
    async with make_flora(history=900, history_seconds=SPAN, deletions=0.5) as flora:
        services = await open_on(flora)
        assert (await sweep(services)).error is None
        assert len(at_flora(flora)) < 900
        assert at_flora(flora) <= await known(services)


async def test_cursors_that_expire_cost_pages_and_no_runs(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """A cursor is refused a minute after its page; the tracker's process stands still for longer
    than that after two of the pages. The sweep begins again at the top."""
    options = {"opaque_cursors": True, "cursor_seconds": 60.0}
    async with make_flora(history=900, history_seconds=SPAN, **options) as flora:
        services = await open_on(flora)
        pages = 0

        async def slow(_: list[str]) -> None:
            nonlocal pages
            pages += 1
            if pages in (4, 11):
                clock.move(61)

        on_history(services, slow)
        assert (await sweep(services)).error is None
        assert at_flora(flora) == await known(services)
        assert await gaps(services) == []
        assert pages == 4 + 7 + 9


async def test_a_page_that_is_refused_for_its_cursor_again_is_a_gap(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """FLORA leads to a page and refuses it each time: it is tried twice, and what is above it is
    kept."""
    options = {"opaque_cursors": True, "max_offset": 400}
    async with make_flora(history=900, history_seconds=SPAN, **options) as flora:
        services = await open_on(flora)
        await sweep(services)
        assert len(await known(services)) == 400
        [gap] = await gaps(services)
        assert "cursor" in (gap.error or "")
        assert flora.world.counts["runs.list", 200] == 2 * 4
