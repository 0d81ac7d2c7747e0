"""Callbacks to a start's own address end the doubt about it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.clocks import HandClock
from tests.support.waiting import eventually, free_port, steady_clock
from tests.web.serving import serving
from tests.worker.conftest import MakeFlora, OpenServices, the_run
from tests.worker.doubt import GATEWAY, HOUR, OTHER, attempt, change, posts, state_of
from tracker.core.clock import utc_now
from tracker.core.observation import Source
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.simulator import Options, Simulator, running
from tracker.store.engine import Database
from tracker.store.queries import starts as start_log
from tracker.web.app import build_app


@asynccontextmanager
async def receiving(
    flora: Simulator, database_url: str, **settings: Any
) -> AsyncIterator[Services]:
    """Services that FLORA can call back, in real time, and no worker."""
    port = free_port()
    options = flora.world.options
    given: dict[str, Any] = {
        "flora_base_url": flora.base_url,
        "flora_api_key": options.api_key,
        "flora_webhook_secret": options.webhook_secret,
        "tracker_database_url": database_url,
        "tracker_public_url": f"http://127.0.0.1:{port}",
    }
    async with (
        open_services(Settings(**(given | settings)), background=True) as services,
        serving(build_app(services), port),
    ):
        yield services


@pytest.mark.parametrize(
    "trouble",
    [{"lost_starts": 1.0}, pytest.param({"gateway_starts": 1.0}, marks=pytest.mark.thorough)],
)
async def test_a_callback_resolves_its_start_within_a_second(
    database_url: str, trouble: dict[str, float]
) -> None:
    """Two starts in doubt of one technique: each run is the one of its own address."""
    async with (
        running(Options(failures=0.0, run_seconds=2.0, seed=5, **trouble)) as flora,
        receiving(flora, database_url) as services,
        steady_clock() as seconds,
    ):
        keys = [f"key-{number}" for number in range(6)]
        inputs = {key: [{"id": "prompt", "type": "text", "value": key}] for key in keys}
        resolved: dict[str, float] = {}
        moments: list[tuple[int, float]] = []  # in Unix milliseconds, and by the steady clock

        async def all_are_resolved() -> bool:
            moments.append((int(utc_now().timestamp() * 1000), seconds()))
            for key in inputs.keys() - resolved.keys():
                if await state_of(services.database, key) == "started":
                    resolved[key] = seconds()
            return len(resolved) == len(keys)

        resolving = asyncio.create_task(eventually(all_are_resolved, timeout=30, interval=0.005))
        for key in keys:
            assert await attempt(services, key, inputs=inputs[key]) is None
        await resolving
        await flora.quiet()
        sent: dict[str, float] = {}
        for delivery in flora.world.deliveries:
            run = flora.world.runs[delivery.run_id]
            before = max(steady for at, steady in moments if at <= delivery.at_ms)
            sent.setdefault(run.inputs[0]["value"], before)
        took = {key: resolved[key] - sent[key] for key in keys}
        assert all(0 <= one < 1 for one in took.values()), took
        for key in keys:
            run_id = await attempt(services, key, inputs=inputs[key])
            assert run_id is not None
            assert list(flora.world.runs[run_id].inputs) == inputs[key]
            record = await the_run(services, run_id)
            assert (record.source, record.inputs) == (Source.START, inputs[key])
        assert posts(flora) == len(flora.world.runs) == 6


async def test_each_start_has_an_address_of_its_own(database_url: str) -> None:
    """It is sent again as it was first sent, also under another public URL."""
    async with running(Options(failures=0.0, **GATEWAY)) as flora:
        async with receiving(flora, database_url) as services:
            first = services.settings.callback_url
            assert await attempt(services) is None
        change(flora, gateway_starts=0.0)
        async with receiving(flora, database_url, tracker_start_doubt=1) as services:
            assert services.settings.callback_url != first
            await asyncio.sleep(1.2)
            assert await services.recovery.recover() == 1
            assert await attempt(services, "key-2") is not None
            one, two = (run.callback_url or "" for run in flora.world.runs.values())
            assert one.startswith(f"{first}/")
            assert two.startswith(f"{services.settings.callback_url}/")
            assert one.rpartition("/")[2] != two.rpartition("/")[2]
            assert all(len(url.rpartition("/")[2]) >= 32 for url in (one, two))


async def test_an_unknown_address_counts_as_the_bare_one(database_url: str) -> None:
    """The callback is taken, and is evidence of nothing."""
    async with (
        running(Options(failures=0.0, run_seconds=0.2, **GATEWAY)) as flora,
        receiving(flora, database_url) as services,
    ):
        assert await attempt(services) is None
        run = flora.start("icon-pack", callback_url=f"{services.settings.callback_url}/nobody")
        await flora.quiet()

        async def is_known() -> bool:
            return run.run_id in [one.run.run_id for one in (await _listed(services.database))]

        await eventually(is_known)
        assert (await the_run(services, run.run_id)).source is Source.CALLBACK
        assert await state_of(services.database) == "in_doubt"


async def _listed(database: Database) -> Any:
    from tracker.store.queries import runs as read

    return (await read.list_runs(database, limit=100))[0]


async def test_a_secret_of_another_workspace_names_no_run(database_url: str) -> None:
    """Its callback to a start's address is a callback to the bare one."""
    both = Options(failures=0.0, run_seconds=0.2, more_workspaces=(OTHER,), **GATEWAY)
    async with running(both) as flora:
        other = {
            "id": "ws_other",
            "api_key": OTHER.api_key,
            "webhook_secrets": [OTHER.webhook_secret],
        }
        settings = {"flora_workspace_id": "ws_simulator", "workspaces": (other,)}
        async with receiving(flora, database_url, **settings) as services:
            assert await attempt(services, workspace_id="ws_simulator") is None
            row = await start_log.get(services.database, "ws_simulator", "key-1")
            assert row is not None
            run = flora.start("icon-pack", callback_url=row.callback_url, workspace=OTHER)
            await flora.quiet()

            async def is_known() -> bool:
                return any(one.run.run_id == run.run_id for one in await _listed(services.database))

            await eventually(is_known)
            assert (await the_run(services, run.run_id)).inputs is None
            assert await state_of(services.database) == "in_doubt"


async def test_five_missing_callbacks_bring_back_the_bare_address(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy may pass on the exact path alone. An hour later own addresses are tried again. Of
    many runs only the newest count."""
    async with make_flora(drop=1.0) as flora:
        services = await open_on(flora, tracker_public_url="http://127.0.0.1:9")
        bare = "http://127.0.0.1:9/callbacks/flora"
        for number in range(5):
            run_id = await attempt(services, f"key-{number}")
            assert run_id is not None
            assert (flora.world.runs[run_id].callback_url or "").startswith(f"{bare}/")
        clock.move(600)
        await services.poller.poll_due()
        clock.move(600)
        services.starter.sender._checked_at = float("-inf")
        run_id = await attempt(services, "key-5")
        assert flora.world.runs[run_id or ""].callback_url == bare
        assert await start_log.own_are_missing(services.database, now=clock())
        newest = await start_log.own_are_missing(services.database, now=clock(), among=1)
        assert not newest  # which has the bare address
        clock.move(HOUR)
        services.starter.sender._checked_at = float("-inf")
        run_id = await attempt(services, "key-6")
        assert (flora.world.runs[run_id or ""].callback_url or "").startswith(f"{bare}/")
