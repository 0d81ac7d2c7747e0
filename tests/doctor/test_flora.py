"""FLORA: its key, its answers, and its clock."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from tests.doctor.conftest import look, with_flora
from tests.doctor.proxies import Proxy, in_front
from tests.support.waiting import free_port
from tracker.core.clock import utc_now
from tracker.operations.doctor import Level
from tracker.operations.doctor.examination import TimeLimits
from tracker.operations.doctor.settings import compare_clocks
from tracker.simulator import Options, SimulatedWorkspace, Simulator, running


async def test_a_key_is_tried_by_a_real_read(flora: Simulator, sqlite_url: str) -> None:
    """A key that FLORA accepts is ok, and the line has the request id that support asks for."""
    given = with_flora(flora, TRACKER_DATABASE_URL=sqlite_url)
    other = await look(**given | {"FLORA_WORKSPACE_ID": "ws_other"})  # it has no runs yet
    assert "ws_other is set" in other["key"].seen
    report = await look(**given)
    assert report.level("key") is Level.OK
    assert "accepts the key" in report["key"].seen
    assert "(req_" in report["key"].seen
    flora.start()
    report = await look(**with_flora(flora, TRACKER_DATABASE_URL=sqlite_url))
    assert f"of workspace {flora.world.options.workspace_id}" in report["key"].seen
    assert report.level("clock") is Level.OK


async def test_a_wrong_key_fails_and_the_rest_is_checked(flora: Simulator, sqlite_url: str) -> None:
    """No key, one that FLORA refuses, one that no header can carry and one of another workspace:
    each has its own text, and the clock is compared wherever FLORA answered."""
    flora.start()
    cases = [
        ({"FLORA_API_KEY": ""}, "None is set", "Set FLORA_API_KEY"),
        ({"FLORA_API_KEY": "sk_live_wrong"}, "401", "a key that is valid at FLORA"),
        ({"FLORA_API_KEY": "x" * 600}, "characters that no key has", "Copy the key again"),
        ({"FLORA_WORKSPACE_ID": "ws_other"}, "ws_other is set", "Set FLORA_WORKSPACE_ID"),
    ]
    for environ, seen, advice in cases:
        report = await look(**with_flora(flora, TRACKER_DATABASE_URL=sqlite_url) | environ)
        assert report.level("key") is Level.FAILED
        assert seen in report["key"].seen
        assert advice in report["key"].advice
        assert "sk_live_wrong" not in str(report)
        assert report.level("conflicts") is Level.OK
        asked = "401" in seen or "ws_other" in seen
        assert report.level("clock") is (Level.OK if asked else Level.WARNING)


async def test_a_key_that_sees_several_workspaces_is_reported(sqlite_url: str) -> None:
    """Which of them is meant has to be set; then it is a warning."""
    other = SimulatedWorkspace(workspace_id="ws_b", api_key="sk_b", webhook_secret="whsec_b")
    async with running(Options(shared_key=True, more_workspaces=(other,))) as flora:
        flora.start(workspace=other)
        given = with_flora(flora, TRACKER_DATABASE_URL=sqlite_url)
        for named, level, seen in (
            ("", Level.FAILED, "sees several workspaces (ws_simulator, ws_b)"),
            ("ws_simulator", Level.WARNING, "Only ws_simulator is tracked"),
            ("ws_c", Level.FAILED, "ws_c is set"),
        ):
            report = await look(**given | {"FLORA_WORKSPACE_ID": named})
            assert report.level("key") is level
            assert seen in report["key"].seen


@pytest.mark.parametrize(
    ("answer", "level", "seen", "advice"),
    [
        (HTMLResponse("hello"), Level.FAILED, "not what its API promises", "FLORA_BASE_URL"),
        (RedirectResponse("/elsewhere"), Level.FAILED, "a redirect", "FLORA_BASE_URL"),
        (HTMLResponse("no", 404), Level.FAILED, "404", "FLORA_BASE_URL"),
        (HTMLResponse("no", 403), Level.FAILED, "403", "FLORA_BASE_URL"),
        (
            JSONResponse({"error": {"code": "forbidden", "message": "no"}}, 403),
            Level.FAILED,
            "403",
            "may not read runs",
        ),
        (
            Response(status_code=429, headers={"Retry-After": "30"}),
            Level.WARNING,
            "429",
            "shared by all",
        ),
        (
            Response(status_code=503, headers={"Retry-After": "30"}),
            Level.WARNING,
            "503",
            "The fault is FLORA's",
        ),
    ],
    ids=["no api", "redirect", "wrong path", "gateway", "forbidden", "limited", "down"],
)
async def test_what_flora_answers_is_told_apart(
    sqlite_url: str, answer: Response, level: Level, seen: str, advice: str
) -> None:
    """What we can fix fails; faults of FLORA and rate limits are warnings."""
    async with in_front(Proxy(upstream="", answers=answer)) as root:
        report = await look(
            TRACKER_DATABASE_URL=sqlite_url, FLORA_API_KEY="sk_test_1", FLORA_BASE_URL=root
        )
    assert report.level("key") is level
    assert seen in report["key"].seen
    assert advice in report["key"].advice


async def test_a_flora_that_cannot_be_reached_is_reported(sqlite_url: str) -> None:
    """Nothing listens: the address is named, and what to try."""
    report = await look(
        TimeLimits(flora_read=1.5),  # in which it is tried again
        TRACKER_DATABASE_URL=sqlite_url,
        FLORA_API_KEY="sk_test_1",
        FLORA_BASE_URL=f"http://127.0.0.1:{free_port()}",
    )
    assert report.level("key") is Level.FAILED
    assert "http://127.0.0.1" in report["key"].seen
    assert "DNS" in report["key"].advice


@asynccontextmanager
async def _ahead(off: timedelta) -> AsyncIterator[Simulator]:
    async with running(Options(), clock=lambda: utc_now() + off) as simulator:
        yield simulator


async def test_a_clock_that_is_off_is_reported_in_time(
    database_url: str,
) -> None:
    """By minutes it is a warning; beyond what a signed time may be off, it fails."""
    whose = "This machine's" if database_url.startswith("sqlite") else "The database server's"
    for minutes, level, seen in (
        (-3, Level.WARNING, f"{whose} clock is 3 min "),
        (3, Level.WARNING, "behind FLORA's"),
        (-10, Level.WARNING, "FLORA's last attempt"),
        (10, Level.WARNING, "behind FLORA's."),
        (20, Level.FAILED, "every callback is refused"),
        (-20, Level.FAILED, "ahead of FLORA's, more than the 900 s"),
    ):
        async with _ahead(timedelta(minutes=minutes)) as flora:
            report = await look(**with_flora(flora, TRACKER_DATABASE_URL=database_url))
        assert report.level("clock") is level, report["clock"]
        assert seen in report["clock"].seen
        assert "chrony" in report["clock"].advice


def test_clocks_are_compared_by_the_one_that_the_tracker_uses() -> None:
    """With PostgreSQL the server's clock counts; this machine's has a line of its own."""
    minute = timedelta(minutes=1)
    flora, machine = compare_clocks(minute, minute, tolerance=900)
    assert (flora.level, machine.level) == (Level.OK, Level.WARNING)
    assert "This machine's clock is 1 min behind" in machine.seen
    flora, machine = compare_clocks(timedelta(0), minute, tolerance=900)
    assert (flora.level, machine.level) == (Level.WARNING, Level.WARNING)
    assert "where PostgreSQL runs" in flora.advice
    (unchecked,) = compare_clocks(timedelta(hours=2), None, tolerance=0)
    assert unchecked.level is Level.WARNING
