"""The history is covered: sweeps resume, read around what cannot be read, and miss nothing."""

from datetime import timedelta
from typing import Any

import httpx
import pytest

from tests.support.clocks import HandClock
from tests.support.shares import shared
from tests.worker.conftest import (
    Hurry,
    MakeFlora,
    OpenServices,
    on_history,
    reads_of,
    the_run,
)
from tests.worker.test_sweep import A_LOOK, sweep
from tracker.core.formatting import iso_time
from tracker.core.observation import Source
from tracker.core.run import RunType, Tracking
from tracker.flora.parse import cursor_at, offset_of
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.store.queries import runs as read
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.sweeps import Interval


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough here: what is stored is tested on both in tests/store."""
    return sqlite_url


WEEK = 7 * 86_400
SPAN = WEEK - 3600
"""A preset history that a first sweep reads whole."""
SPAN_AGAIN = timedelta(seconds=WEEK)
"""The same, to be read again."""


async def known(services: Services) -> set[str]:
    """All runs that are here."""
    found: set[str] = set()
    cursor = None
    while True:
        records, cursor = await read.list_runs(services.database, limit=500, cursor=cursor)
        found |= {record.run.run_id for record in records}
        if cursor is None:
            return found


def at_flora(flora: Simulator, kind: RunType = "technique") -> set[str]:
    """All runs that FLORA lists."""
    workspace = flora.world.options.workspaces[0]
    return {run.run_id for run in flora.world.history(kind, workspace)}


async def covered(services: Services, kind: RunType = "technique") -> list[Interval]:
    [workspace] = services.workspaces
    return await coverage.of(services.database, workspace.name, kind)


async def gaps(services: Services) -> list[coverage.UnreadSpan]:
    """What FLORA did not let us read, newest first."""
    return coverage.unread(await coverage.everything(services.database))


def asked(flora: Simulator) -> int:
    """How often FLORA's list of technique runs was asked for."""
    return reads_of(flora).get("runs.list", 0)


async def break_off_after(services: Services, pages: int) -> None:
    """A sweep that ends without a word after so many pages, as a killed process does."""
    left = pages

    async def break_off(_: list[str]) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise SystemExit

    on_history(services, break_off)
    with pytest.raises(SystemExit):
        await sweep(services)


async def test_a_sweep_that_breaks_off_is_resumed(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """However often a first sweep ends in its midst, and while runs are started and deleted, each
    next one goes on where it was, and all together read hardly more pages than a single one."""
    async with make_flora(history=1200, history_seconds=SPAN) as flora:
        services = await open_on(flora)
        for number in range(5):
            await break_off_after(services, 2)
            clock.move(300)
            for _ in range(20):
                flora.start()
            flora.world.delete(set(sorted(at_flora(flora))[number::300]))
        assert (await sweep(services)).error is None
        assert at_flora(flora) <= await known(services)
        assert asked(flora) <= 14 + 5 * 5
        [interval] = await covered(services)
        assert interval.to_at == clock() - timedelta(minutes=2)


@pytest.mark.parametrize("opaque", shared([False, True], of=2))
async def test_a_stored_cursor_that_is_refused_costs_pages_and_no_runs(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    opaque: bool,
) -> None:
    """Where FLORA's cursors cannot be read the stored one is used; is it refused, the sweep begins
    at the top again."""
    async with make_flora(history=900, history_seconds=SPAN, opaque_cursors=opaque) as flora:
        services = await open_on(flora)
        await break_off_after(services, 4)
        flora.world.change({"cursor_epoch": 1})
        clock.move(300)
        before = asked(flora)
        assert (await sweep(services)).error is None
        assert at_flora(flora) == await known(services)
        assert asked(flora) - before <= (12 if opaque else 10)
        clock.move(300)
        assert (await sweep(services)).pages == 1


async def test_cursors_may_be_numbers(make_flora: MakeFlora, open_on: OpenServices) -> None:
    """A list whose cursors are whole numbers is read to its end."""
    async with make_flora(history=260, history_seconds=SPAN, cursor_type="number") as flora:
        services = await open_on(flora)
        assert (await sweep(services)).error is None
        assert await known(services) == at_flora(flora)
        [interval] = await covered(services)
        assert interval.error is None


async def test_a_cursor_that_cannot_be_read_ends_no_list(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Where a cursor is neither text nor a number the sweep fails, covers nothing that it has not
    read, and reads all of it once cursors are as they should be."""
    async with make_flora(history=260, history_seconds=SPAN, cursor_type="object") as flora:
        services = await open_on(flora)
        for _ in range(2):
            report = await sweep(services)
            assert report.error is not None
            assert "next_cursor is neither text" in report.error
            assert await covered(services) == []
        flora.world.change({"cursor_type": "text"})
        assert (await sweep(services)).error is None
        assert await known(services) == at_flora(flora)


async def test_a_page_that_cannot_be_read_hides_only_itself(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Two runs spoil every page that holds one: all others are found, the gaps are reported, rest
    for longer each time while the top is read as ever, and close once FLORA shows the runs."""
    async with make_flora(history=700, history_seconds=SPAN) as flora:
        services = await open_on(flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        bad = [runs[n].run_id for n in (150, 430)]
        flora.world.change({"bad_runs": bad})
        first = await sweep(services)
        assert (first.error, len(first.gaps)) == (None, 2)
        assert await known(services) == at_flora(flora) - set(bad)
        for gap, run in zip(await gaps(services), (runs[150], runs[430]), strict=True):
            assert gap.from_at is not None
            assert gap.from_at.timestamp() * 1000 < run.created_ms <= gap.to_at.timestamp() * 1000
            assert gap.to_at - gap.from_at < timedelta(hours=3), "a few runs, no more"
        waits = []
        for _ in range(4):
            before = asked(flora)
            clock.move(301)
            assert len((await sweep(services)).gaps) == 2, "reported while they rest, too"
            waits.append(asked(flora) - before)
        assert waits[1] == 1 < waits[0], "tried again after five minutes, then after ten"
        flora.world.change({"bad_runs": []})
        clock.move(86_400)
        assert (await sweep(services)).discovered == 2
        assert await gaps(services) == []
        assert len(await covered(services)) == 1


NO_ID = ("run_id", "technique_run_id")


@pytest.mark.parametrize("opaque", shared([False, True], of=2))
@pytest.mark.parametrize(
    "places",
    [
        (0, 1),
        (98, 99, 100),
        *(pytest.param(p, marks=pytest.mark.thorough) for p in ((150,), (97, 99), (99,), (5, 102))),
    ],
)
async def test_an_item_that_shows_no_run_leaves_a_gap(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    opaque: bool,
    places: tuple[int, ...],
) -> None:
    """Whatever its place on its page, all other runs are found with as many pages as ever; the gap
    is reported, read again after growing waits, and closes once FLORA shows the run."""
    async with make_flora(
        history=350, history_seconds=SPAN, bad_fields=NO_ID, opaque_cursors=opaque
    ) as flora:
        services = await open_on(flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        bad = {runs[place].run_id for place in places}
        flora.world.change({"bad_runs": list(bad)})
        first = await sweep(services)
        assert (first.error, first.pages) == (None, 4 + A_LOOK)
        assert first.unreadable >= len(bad)
        assert "has no run_id" in first.gaps[0].error
        assert await known(services) == at_flora(flora) - bad
        intervals = await covered(services)
        for place in places:
            at = runs[place].created_ms / 1000
            assert not any(
                one.from_at.timestamp() < at <= one.to_at.timestamp() for one in intervals
            )
        reads = []
        for seconds in (60, 241, 301):
            before = asked(flora)
            clock.move(seconds)
            await sweep(services)
            reads.append(asked(flora) - before)
        assert reads[0] == 1, "a gap rests"
        # Without an overlap of pages the second attempt may come closer, which begins anew.
        assert opaque or reads[2] == 1, "tried again after five minutes, then after ten"
        assert 0 in places or reads[1] > 1, "the top is read each time"
        flora.world.change({"bad_runs": []})
        clock.move(86_400)
        assert (await sweep(services)).gaps == []
        assert await known(services) == at_flora(flora)
        assert await gaps(services) == []
        assert len(await covered(services)) == 1


async def test_each_gap_of_a_short_history_counts_once(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Each of them is looked for from the top of the list, past those above it."""
    async with make_flora(history=90, history_seconds=SPAN, bad_fields=NO_ID) as flora:
        services = await open_on(flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        flora.world.change({"bad_runs": [runs[place].run_id for place in (20, 40, 60)]})
        for failures in (1, 2, 3):
            assert len((await sweep(services)).gaps) == 3
            assert [gap.failures for gap in await gaps(services)] == [failures] * 3
            clock.move(1201)


async def test_a_covered_run_that_cannot_be_read_any_more_is_no_gap(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """It is known; the gap below it is tried again, and nothing else is reported."""
    async with make_flora(history=90, history_seconds=SPAN, bad_fields=NO_ID) as flora:
        services = await open_on(flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        flora.world.change({"bad_runs": [runs[60].run_id]})
        [before] = (await sweep(services)).gaps
        flora.world.change({"bad_runs": [runs[20].run_id, runs[60].run_id]})
        clock.move(301)
        assert (await sweep(services)).gaps == [before]
        assert [gap.failures for gap in await gaps(services)] == [2]


async def test_a_run_without_a_status_is_read_at_once(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """An item that names a run is enough to track it: it is due, and a single read settles it; one
    that is known is left as it is."""
    async with make_flora(history=120, history_seconds=SPAN, bad_fields=("status",)) as flora:
        services = await open_on(flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        bad = runs[50].run_id
        flora.world.change({"bad_runs": [bad]})
        report = await sweep(services)
        assert (report.error, report.gaps, report.unreadable) == (None, [], 0)
        assert (report.items, report.discovered) == (120, 120)
        record = await the_run(services, bad)
        assert (record.source, record.tracking) == (Source.HISTORY, Tracking.ACTIVE)
        assert record.next_check_at == record.first_seen_at
        assert record.run.quoted_cost is None, "it may be the bill"
        assert (await services.poller.poll_due()).settled == 1
        record = await the_run(services, bad)
        assert (record.tracking, record.run.conflict) == (Tracking.SETTLED, False)
        assert record.run.charged_cost is not None
        assert record.run.outputs
        assert (await sweep(services, SPAN_AGAIN)).discovered == 0
        assert await the_run(services, bad) == record


async def test_a_page_without_a_status_does_not_answer_for_a_due_run(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Of the due runs on a page, the one that it shows without a status is read singly."""
    async with make_flora(bad_fields=("status",)) as flora:
        services = await open_on(flora)
        due = [flora.start().run_id for _ in range(4)]
        await sweep(services)
        flora.world.change({"bad_runs": due[:1]})
        clock.move(3600)
        report = await services.poller.poll_due()
        assert (report.pages, report.reads, report.settled) == (1, 1, 4)


async def test_the_oldest_run_leaves_a_gap_too(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Behind the last run of the list nothing shows how far the gap reaches: it stays open."""
    async with make_flora() as flora:
        services = await open_on(flora)
        oldest = flora.start()
        clock.move(300)
        flora.start()
        clock.move(300)
        flora.world.change({"bad_runs": [oldest.run_id]})
        report = await sweep(services)
        assert (report.error, len(report.gaps), report.discovered) == (None, 1, 1)
        [gap] = await gaps(services)
        assert gap.from_at is None
        flora.world.change({"bad_runs": []})
        clock.move(300)
        assert (await sweep(services)).discovered == 1
        assert await gaps(services) == []


async def test_a_list_that_shows_no_run_at_all_is_a_gap(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Where no item can be read nothing is covered, and all is found once FLORA shows it."""
    async with make_flora(history=120, history_seconds=SPAN, bad_fields=NO_ID) as flora:
        services = await open_on(flora)
        flora.world.change({"bad_runs": sorted(at_flora(flora))})
        report = await sweep(services)
        assert (report.discovered, len(report.gaps), await known(services)) == (0, 1, set())
        assert report.unreadable >= 120, "those that two pages have in common count twice"
        flora.world.change({"bad_runs": []})
        clock.move(300)
        assert (await sweep(services)).discovered == 120
        assert await gaps(services) == []


async def test_an_answer_that_is_too_large_is_read_in_parts(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    hurry: Hurry,
) -> None:
    """Where a page is larger than an answer may be, smaller ones are asked for; a run that alone is
    too large leaves a gap."""
    async with make_flora(history=300, history_seconds=SPAN, bad_bytes=80_000) as flora:
        services = await open_on(flora)
        hurry(services, flora, largest_answer=60_000)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        bad = runs[120].run_id
        flora.world.change({"bad_runs": [bad]})
        report = await sweep(services)
        assert (report.error, len(report.gaps)) == (None, 1)
        assert await known(services) == at_flora(flora) - {bad}


@pytest.mark.parametrize(
    "fault", shared([{"max_offset": 400}, {"bad_offset": 400, "opaque_cursors": True}], of=2)
)
async def test_what_lies_behind_a_place_that_nothing_passes_stays_a_gap(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, fault: dict[str, Any]
) -> None:
    """Where every offset beyond one is refused, or cursors cannot be made, all before it is read,
    the rest is a gap that is said to be one, and new runs are found at the price of one page."""
    async with make_flora(history=700, history_seconds=SPAN, **fault) as flora:
        services = await open_on(flora)
        assert (await sweep(services)).error is None
        assert 400 <= len(await known(services)) < 500
        [gap] = await gaps(services)
        assert (gap.from_at, gap.failures) == (None, 1)
        clock.move(60)
        flora.start()
        report = await sweep(services)
        assert (report.error, report.pages, report.discovered) == (None, 1, 1)
        flora.world.change({"max_offset": None, "bad_offset": None})
        clock.move(300)
        await sweep(services)
        assert await known(services) == at_flora(flora)
        assert await gaps(services) == []


@pytest.mark.parametrize("is_newest", [False, True])
async def test_an_unreadable_item_at_the_top_covers_nothing_more(
    services: Services, flora: Simulator, clock: HandClock, is_newest: bool
) -> None:
    """Where the newest two minutes hold an item that cannot be read, coverage still ends below
    them: a run that is listed late is found. The gap ends at FLORA's now."""
    flora.start()
    clock.move(600)
    late = flora.start().run_id
    clock.move(20)
    flora.start()
    clock.move(20)
    bad = flora.start().run_id
    clock.move(20)
    if not is_newest:
        flora.start()
    flora.world.deleted.add(late)
    flora.world.change({"bad_runs": [bad]})
    [gap] = (await sweep(services)).gaps
    assert iso_time(clock() - timedelta(seconds=41)) < gap.from_at < gap.to_at == iso_time(clock())
    [interval] = await covered(services)
    assert interval.to_at <= clock() - timedelta(minutes=2)
    flora.world.deleted.clear()
    flora.world.change({"bad_runs": []})
    clock.move(300)
    found = await sweep(services)
    assert (found.discovered, found.gaps) == (2, [])
    assert await known(services) == at_flora(flora)


async def test_a_place_where_flora_always_fails_is_stepped_over(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, hurry: Hurry
) -> None:
    """One page that is answered 500 again and again fails a few sweeps, and then no more; runs that
    start meanwhile, which move the list, make no difference."""
    async with make_flora(history=400, history_seconds=SPAN) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        bad = runs[250].run_id
        flora.world.change({"bad_runs": [bad], "bad_code": "internal_error"})
        failed = 0
        while (await sweep(services)).error is not None and failed < 9:
            failed += 1
            clock.move(300)
            flora.start()
        assert 1 <= failed <= 3
        assert await known(services) == at_flora(flora) - {bad}
        assert len(await gaps(services)) == 1


@pytest.mark.parametrize("covered_before", shared([False, True], of=2))
async def test_a_sweep_of_everything_goes_around_a_page_at_once(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    hurry: Hurry,
    covered_before: bool,
) -> None:
    """No later sweep goes on where it was broken off; it says what it could not read."""
    async with make_flora(history=400, history_seconds=SPAN) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        if covered_before:
            await sweep(services)
        bad = runs[250].run_id
        flora.world.change({"bad_runs": [bad], "bad_code": "internal_error"})
        found = await sweep(services, SPAN_AGAIN)
        assert (found.error, len(found.gaps)) == (None, 1)
        assert found.items >= 399
        assert await known(services) | {bad} == at_flora(flora)


@pytest.mark.parametrize("gap_before", shared([False, True], of=2))
async def test_a_flora_that_goes_down_meanwhile_is_an_error(
    make_flora: MakeFlora, open_on: OpenServices, hurry: Hurry, gap_before: bool
) -> None:
    """Nothing below a page can be read: that is no gap, also where there is one of before."""
    async with make_flora(history=400, history_seconds=SPAN) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        runs = flora.world.history("technique", flora.world.options.workspaces[0])
        if gap_before:
            flora.world.change({"bad_runs": [runs[390].run_id]})
            assert len((await sweep(services)).gaps) == 1
        pages = 0

        async def goes_down(_: list[str]) -> None:
            nonlocal pages
            pages += 1
            flora.world.change({"errors": 1.0 if pages >= 2 else 0.0})

        on_history(services, goes_down)
        assert "FLORA" in ((await sweep(services, SPAN_AGAIN)).error or "")


@pytest.mark.parametrize("at_once", shared([1, 40], of=2))
async def test_runs_that_slip_between_two_pages_are_found(
    make_flora: MakeFlora,
    open_on: OpenServices,
    at_once: int,
) -> None:
    """Runs that are deleted at FLORA while pages are read pull others up over the edge of a page:
    the walk notices, goes back, and finds them all."""
    async with make_flora(history=600, history_seconds=SPAN) as flora:
        services = await open_on(flora)

        async def shrink(page: list[str]) -> None:
            flora.world.delete(set(page[:at_once]))

        on_history(services, shrink)
        assert (await sweep(services)).error is None
        assert at_flora(flora) <= await known(services)


async def test_runs_of_one_creation_time_are_found(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """The list may order them in another way on each page: all of them are read again then, also
    those above the last three of the page before."""
    async with make_flora(history=600, history_seconds=SPAN, history_ties=16) as flora:
        services = await open_on(flora)
        report = await sweep(services)
        assert report.error is None
        assert at_flora(flora) <= await known(services)
        assert report.pages <= 9


REFUSALS = [
    {"refuse": {"generations.list": "not_found"}},
    {"refuse": {"generations.list": "forbidden"}},
    {"refuse": {"generations.list": "input_validation_error"}},
    {"refuse": {"generations.list": "internal_error"}},
]


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(
    "refusal",
    [
        REFUSALS[0],
        *(pytest.param(each, marks=pytest.mark.thorough) for each in REFUSALS[1:3]),
        REFUSALS[3],
    ],
    ids=lambda each: each["refuse"]["generations.list"],
)
async def test_generations_that_are_refused_stop_nothing_else(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    hurry: Hurry,
    refusal: dict[str, Any],
    shown: bool,
) -> None:
    """However FLORA refuses to list generations, technique runs are swept completely, at the price
    of one page each time, and polled; only where there are generations is it told."""
    async with make_flora() as flora:
        services = await open_on(flora)
        hurry(services, flora)
        if shown:
            flora.start_generation()
            assert (await sweep(services)).error is None
        flora.world.change(refusal)
        looked = set()
        for _ in range(3):
            clock.move(300)
            run, before = flora.start(), asked(flora)
            report = await sweep(services)
            assert (report.error, report.discovered) == (None, 1)
            assert run.run_id in await known(services)
            assert asked(flora) - before == 1
            assert (report.generations_error is not None) is shown
            looked.add(reads_of(flora)["generations.list"])
        [workspace] = services.workspaces
        assert workspace.client is not None
        assert not workspace.client.breaker.open
        assert (await services.poller.poll_due()).trouble is None
        [interval] = await covered(services)
        assert interval.to_at == clock() - timedelta(minutes=2)
        if not shown and "internal_error" not in str(refusal):
            assert len(looked) == 1, "it is read once a day"


@pytest.mark.both_databases
@pytest.mark.parametrize(
    "code", shared(["paid_plan_required", "not_found", "internal_error"], of=3)
)
async def test_technique_runs_that_are_refused_stop_no_generations(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, hurry: Hurry, code: str
) -> None:
    """Where FLORA lists no technique runs, generations are swept, and the sweep has the error."""
    async with make_flora(history_generations=1) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        assert (await sweep(services)).discovered == 1
        flora.world.change({"refuse": {"runs.list": code}})
        clock.move(300)
        generation = flora.start_generation()
        report = await sweep(services)
        assert code in str(report.error)
        assert (report.discovered, report.generations_error) == (1, None)
        assert generation.run_id in await known(services)


WRONG = [{"clock_offset": 21_600}, {"date_offset": 21_600}, {"date_offset": 251_619_393_000}]


@pytest.mark.parametrize("fault", WRONG)
async def test_a_wrong_clock_hides_no_run(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, fault: dict[str, float]
) -> None:
    """FLORA's clock, or only the date of its answers, is hours or millennia ahead: coverage ends
    before runs that are still to come, so that more of them than a page shows are all found."""
    async with make_flora(**fault) as flora:
        services = await open_on(flora)
        flora.start()
        await sweep(services)
        for _ in range(250):
            clock.move(1)
            flora.start()
        clock.move(300)
        await sweep(services)
        assert await known(services) == at_flora(flora)


async def test_coverage_of_what_is_still_to_come_is_forgotten(
    flora: Simulator, open_on: OpenServices, clock: HandClock
) -> None:
    """A clock that was a day ahead left it: the runs of that day would never be read."""
    services = await open_on(flora)
    [workspace] = services.workspaces
    flora.start()
    await sweep(services)
    now = clock()
    ahead = Interval(from_at=now, to_at=now + timedelta(days=1), read_at=now)
    await coverage.add(services.database, workspace.name, "technique", ahead)
    for _ in range(150):
        clock.move(1)
        flora.start()
    clock.move(300)
    await sweep(services)
    assert await known(services) == at_flora(flora)
    assert max(one.to_at for one in await covered(services)) <= clock()


BEHIND = [
    {"clock_offset": -150, "date_offset": 150},
    {"clock_offset": -21_600, "date_offset": 21_600},
    {"clock_offset": -600, "date_offset": 300},
]


@pytest.mark.parametrize(
    "fault", [*shared(BEHIND[:2], of=2), pytest.param(BEHIND[2], marks=pytest.mark.thorough)]
)
async def test_a_creation_time_that_is_far_behind_hides_no_run(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, fault: dict[str, float]
) -> None:
    """FLORA creates runs at times that a sweep has covered, by our clock and by `Date`: all are
    found, though the first sweep after it is broken off, and the next one costs a page again."""
    async with make_flora(history=30, history_seconds=SPAN, **fault) as flora:
        services = await open_on(flora)
        for _ in range(2):
            flora.start()
            assert (await sweep(services)).error is None
            clock.move(5)
            for number in range(250):
                run = flora.start()
                if number >= 100:  # callbacks have made the newest known
                    await services.tracker.track(run.run_id)
            clock.move(30)
            pages = 0

            async def cut(page: list[str]) -> None:
                nonlocal pages
                pages += 1
                if pages > 1:
                    raise httpx.ReadError("cut")

            [workspace] = services.workspaces
            workspace.require_client().deadline = 0.1
            on_history(services, cut)
            assert (await sweep(services)).error is not None
            workspace.require_client().http.event_hooks = {}
            workspace.require_client().deadline = 30
            assert (await sweep(services)).error is None
            assert await known(services) == at_flora(flora)
            clock.move(300)
            assert (await sweep(services)).pages == 1


async def test_an_old_gap_is_closed_however_long_nobody_swept(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """After an outage of a month the whole month is read, though a first sweep goes back a week."""
    async with make_flora() as flora:
        services = await open_on(flora)
        flora.start()
        clock.move(300)
        await sweep(services)
        for _ in range(130):
            clock.move(86_400 / 4)
            flora.start()
        assert (await sweep(services)).error is None
        assert await known(services) == at_flora(flora)


def test_only_a_cursor_that_says_nothing_else_is_an_offset() -> None:
    """FLORA's own example is read and made; what it cannot be read from is left as it is."""
    assert offset_of("eyJvZmZzZXQiOjIwfQ") == 20
    assert cursor_at(20) == "eyJvZmZzZXQiOjIwfQ"
    assert cursor_at(0) is None
    for cursor in ("", "x", "eyJvZmZzZXQiOi0xfQ", "eyJvZmZzZXQiOjIwLCJhIjoxfQ", "W10", "ÿ"):
        assert offset_of(cursor) is None, cursor
