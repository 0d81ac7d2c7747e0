"""Whether a worker polls and sweeps, and what waits for a person."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.doctor.conftest import look, with_flora
from tests.support.deliveries import Delivered, keep
from tracker.core.clock import utc_now
from tracker.core.record import TEST_DELIVERY, TEST_DELIVERY_IDS, Delivery
from tracker.operations.doctor import Level, work
from tracker.services import open_services
from tracker.settings import read_settings
from tracker.simulator import Simulator
from tracker.store import coordination
from tracker.store.engine import Database
from tracker.store.inspection import remove_test_deliveries, stored_test_deliveries
from tracker.store.queries import sweeps
from tracker.store.queries.endpoints import Backlog, EndpointRow
from tracker.store.queries.overview import read_gauges
from tracker.store.queries.sweeps import SweepHealth

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SWEEP = SweepHealth(
    workspace_id="ws_1",
    last_started_at=NOW - timedelta(minutes=4),
    last_finished_at=NOW - timedelta(minutes=3),
    last_error=None,
    complete_started_at=NOW - timedelta(minutes=4),
    complete_at=NOW - timedelta(minutes=3),
    through=None,
    generations_through=None,
)


@pytest.fixture
async def state(sqlite_url: str) -> work.WorkState:
    """A state in which all is well."""
    async with await Database.open(sqlite_url) as database:
        gauges = await read_gauges(database, now=NOW)
    return work.WorkState(
        now=NOW, interval=timedelta(minutes=5), sweeps=[SWEEP], gauges=gauges, sweeping=False
    )


def test_a_worker_is_judged_by_what_it_does(state: work.WorkState) -> None:
    """There is a worker if due runs are read and sweeps start in time, and none otherwise."""
    assert work.check_worker(state).level is Level.OK
    never = work.check_worker(replace(state, sweeps=[]))
    assert (never.level, "ever" in never.seen) == (Level.FAILED, True)
    later = replace(state, now=NOW + timedelta(minutes=20))
    assert work.check_worker(later).level is Level.FAILED
    assert "No sweep has started for 24 min" in work.check_worker(later).seen
    assert work.check_worker(replace(later, sweeping=True)).level is Level.OK, (
        "a sweep takes its time"
    )
    for minutes, level in ((2, Level.WARNING), (9, Level.FAILED)):
        oldest = NOW - timedelta(minutes=minutes)
        waiting = replace(state, gauges=replace(state.gauges, overdue=7, oldest_due_at=oldest))
        assert work.check_worker(waiting).level is level
        assert f"7 runs are overdue, the oldest by {minutes} min" in work.check_worker(waiting).seen


def test_sweeps_are_late_where_none_was_complete_for_long(state: work.WorkState) -> None:
    """A failed one is a warning while the last complete one is recent, and fails after that."""

    def level(state: work.WorkState) -> Level:
        return work.check_sweeps(state).level

    assert level(state) is Level.OK
    assert level(replace(state, sweeps=[])) is Level.FAILED
    assert level(replace(state, sweeps=[], sweeping=True)) is Level.WARNING
    later = replace(state, now=NOW + timedelta(minutes=30))
    assert level(later) is Level.FAILED
    broken = replace(state, sweeps=[SWEEP._replace(last_error="FLORA answered 503")])
    assert level(broken) is Level.WARNING
    found = work.check_sweeps(replace(broken, now=later.now))
    assert found.level is Level.FAILED
    assert "FLORA answered 503" in found.seen
    assert "check the key" in found.advice


async def test_a_missing_worker_is_reported_and_a_sweep_fixes_it(
    flora: Simulator, database_url: str
) -> None:
    """A deployment without a worker fails; after one sweep from the command line it is ok."""
    environ = with_flora(flora, TRACKER_DATABASE_URL=database_url)
    report = await look(**environ)
    assert report.level("worker") is Level.FAILED
    assert report.level("sweeps") is Level.FAILED
    async with open_services(read_settings(environ)[0]) as services:
        (workspace,) = services.workspaces
        await services.sweeper.sweep(workspace)
    report = await look(**environ)
    assert report.level("worker") is Level.OK
    assert report.level("sweeps") is Level.OK


async def test_a_running_sweep_is_seen(database_url: str) -> None:
    """A sweep is running while its lease is held; other leases do not count."""
    async with await Database.open(database_url) as database:
        now = utc_now()
        assert not await sweeps.sweeping(database, now=now)
        for name, away in (("other", False), ("sweep:default", True)):
            assert await coordination.take_lease(database, name, "me", now, timedelta(minutes=1))
            assert await sweeps.sweeping(database, now=now) is away
        assert not await sweeps.sweeping(database, now=now + timedelta(minutes=2))
        await sweeps.begin(database, "ws_1", now)


async def test_what_waits_for_a_person_is_named(state: work.WorkState) -> None:
    """Missed callbacks, quarantine, unresolved starts and conflicts, each with its command."""
    assert {one.level for one in work.check_backlog(state.gauges, [], now=NOW)} == {Level.OK}
    gauges = replace(
        state.gauges,
        callbacks={("ws_1", "came"): 15, ("ws_1", "missed"): 5},
        quarantined=10_000,
        waiting=7,
        oldest_waiting_at=NOW - timedelta(seconds=90),
        unresolved_starts=2,
        unpriced={"ws_1": 2, "ws_2": 1},
    )
    found = {
        one.name: one
        for one in work.check_backlog(gauges, ["run_1", "run_2", "run_3", "run_4"], now=NOW)
    }
    assert {one.level for one in found.values()} == {Level.WARNING}
    assert "5 of 20 callbacks" in found["missed callbacks"].seen
    assert "25.0 %" in found["missed callbacks"].seen
    assert "7 acknowledged callbacks are not applied yet; the oldest arrived 90 s" in (
        found["inbox"].seen
    )
    assert "10,000 or more authentic callbacks were" in found["quarantine"].seen
    assert "tracker starts resolve" in found["starts"].advice
    assert "4 runs ended (run_1, run_2, run_3, …)" in found["conflicts"].seen
    assert "never billed 3 runs" in found["bills"].seen
    one = work.check_backlog(replace(state.gauges, quarantined=1, unresolved_starts=1), [], now=NOW)
    assert [finding.seen.split(":")[0] for finding in one if finding.level is Level.WARNING] == [
        "1 authentic callback was not understood.",
        "1 start is unresolved",
    ]
    doubted = work.check_backlog(replace(state.gauges, open_starts=1), [], now=NOW)
    assert not any("outcome of every start" in one.seen for one in doubted)


def test_the_first_missed_callback_is_a_warning(state: work.WorkState) -> None:
    """Where FLORA signs with another secret, the doctor's own deliveries are accepted: only the
    first runs show it."""
    for came, missed, level in ((0, 1, Level.WARNING), (1, 7, Level.WARNING), (19, 1, Level.OK)):
        gauges = replace(
            state.gauges, callbacks={("ws_1", "came"): came, ("ws_1", "missed"): missed}
        )
        finding = work.check_backlog(gauges, [], now=NOW)[0]
        assert (finding.name, finding.level) == ("missed callbacks", level)
        assert level is Level.OK or "FLORA_WEBHOOK_SECRET" in (finding.advice or "")


def test_endpoints_that_get_nothing_are_named(state: work.WorkState) -> None:
    """A test event would be answered all the same: what counts is what the worker does."""
    shop = EndpointRow(
        endpoint_id="shop",
        url="https://shop.example.com",
        events=("run.settled",),
        filters={},
        since=NOW - timedelta(days=9),
        configured_at=NOW,
        state="enabled",
    )
    backlogs = {"shop": Backlog(pending=1, oldest_at=NOW - timedelta(minutes=50))}
    used = replace(state, endpoints=[shop], backlogs=backlogs)

    def found(state: work.WorkState, *wanted: str) -> tuple[Level, str]:
        (finding,) = work.check_messages(state, wanted)
        return finding.level, finding.seen

    assert work.check_messages(state, []) == []
    assert found(used, "shop") == (Level.OK, "Messages are sent to every endpoint.")
    assert found(used, "shop", "new")[0] is Level.FAILED
    assert "to new: the worker's settings" in found(used, "shop", "new")[1]
    later = replace(used, now=NOW + timedelta(minutes=20))
    assert "has waited 1 h 10 min for shop" in found(later)[1]
    gone = replace(used, now=NOW + timedelta(days=2))
    assert work.check_messages(gone, []) == [], "it was removed from all settings"
    assert found(gone, "shop")[0] is Level.FAILED
    over = replace(shop, state="disabled", disabled_at=NOW, disabled_reason="it answered 410 Gone")
    level, seen = found(replace(used, endpoints=[over]), "shop")
    assert (level, "disabled: it answered 410 Gone" in seen) == (Level.FAILED, True)


async def test_old_test_deliveries_are_deleted_and_nothing_else_is(
    database_url: str,
) -> None:
    """Only old ones of the doctor are deleted, whatever else has such an id or such an age."""
    now = utc_now()

    def put(delivery_id: str, event_type: str, hours: int) -> Delivered:
        return Delivered(
            delivery=Delivery(
                delivery_id=delivery_id,
                received_at=now - timedelta(hours=hours),
                body=b"{}",
                event_type=event_type,
            )
        )

    old, new = f"{TEST_DELIVERY_IDS}{'f' * 24}", f"{TEST_DELIVERY_IDS}{'0' * 24}"
    others = [f"{TEST_DELIVERY_IDS}a", "whd_a", "whd_z"]
    settings = read_settings({"TRACKER_DATABASE_URL": database_url}).settings
    async with open_services(settings) as services:
        await keep(services.database, put(old, TEST_DELIVERY, 2))
        await keep(services.database, put(new, TEST_DELIVERY, 0))
        for one in others:
            await keep(services.database, put(one, "run.completed", 2))
        before = now - timedelta(hours=1)
        await remove_test_deliveries(services.database, others, left_before=before)
        left = await stored_test_deliveries(services.database, [old, new, *others])
    assert left == {new, *others}
