"""A database that was restored from a backup: what was started since then is not paid again."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.clocks import HandClock
from tests.support.databases import copy_sqlite, sqlite_url_of
from tests.worker.conftest import MakeFlora, OpenServices
from tests.worker.test_start import request
from tests.worker.test_sweep import sweep
from tracker.core.errors import IdempotencyConflict
from tracker.services import Services
from tracker.simulator import Simulator

PUBLIC_URL = "http://127.0.0.1:9"


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite alone, whose backup is a copy of its file."""
    return sqlite_url


@pytest.fixture
def backup_url(sqlite_url: str, tmp_path: Path) -> str:
    """The database as it was before anything was started."""
    copy_sqlite(tmp_path / "tracker.db", tmp_path / "backup.db")
    return sqlite_url_of(tmp_path / "backup.db")


async def start_restore_and_sweep(
    flora: Simulator, open_on: OpenServices, backup_url: str, public_url: str = PUBLIC_URL
) -> tuple[str, Services]:
    """A run that was started after the backup; and services on the backup, which have found it in
    FLORA's history."""
    before: Services = await open_on(flora, tracker_public_url=PUBLIC_URL)
    started = (await before.starter.start(request())).record.run.run_id
    services: Services = await open_on(
        flora, tracker_database_url=backup_url, tracker_public_url=public_url
    )
    await sweep(services)
    return started, services


async def test_a_key_that_is_repeated_after_a_restore_is_the_same_run(
    flora: Simulator, open_on: OpenServices, backup_url: str
) -> None:
    """The request is the same to the letter, its callback address too, so FLORA replays it."""
    run_id, services = await start_restore_and_sweep(flora, open_on, backup_url)
    again = await services.starter.start(request())
    assert again.record.run.run_id == run_id
    assert again.record.inputs == request().inputs
    assert set(flora.world.runs) == {run_id}


async def test_a_key_of_which_flora_knows_another_request_is_never_sent_again(
    make_flora: MakeFlora, open_on: OpenServices, backup_url: str, clock: HandClock
) -> None:
    """With another public URL FLORA answers 422 to the repeated key. It is refused from then on,
    also once FLORA has forgotten the key, until a person says which run it became."""
    async with make_flora(key_hours=1.0) as flora:
        url = "http://127.0.0.1:10"
        run_id, services = await start_restore_and_sweep(flora, open_on, backup_url, url)
        with pytest.raises(IdempotencyConflict, match="FLORA"):
            await services.starter.start(request())
        clock.move(7200)
        with pytest.raises(IdempotencyConflict, match="tracker starts resolve key-1"):
            await services.starter.start(request())
        assert set(flora.world.runs) == {run_id}
        row = await services.resolver.find("key-1")
        await services.resolver.is_run(row, run_id)
        again = await services.starter.start(request())
        assert (again.record.run.run_id, again.replayed) == (run_id, True)
        assert set(flora.world.runs) == {run_id}


async def test_a_person_may_free_such_a_key(
    make_flora: MakeFlora, open_on: OpenServices, backup_url: str, clock: HandClock
) -> None:
    """Where the run of that key is wanted anew, `--none` lets it be sent."""
    async with make_flora(key_hours=1.0) as flora:
        url = "http://127.0.0.1:10"
        run_id, services = await start_restore_and_sweep(flora, open_on, backup_url, url)
        with pytest.raises(IdempotencyConflict):
            await services.starter.start(request())
        clock.move(7200)
        await services.resolver.is_nothing(await services.resolver.find("key-1"))
        again = await services.starter.start(request())
        assert again.record.run.run_id != run_id


async def test_two_keys_have_two_addresses(flora: Simulator, open_on: OpenServices) -> None:
    """And so do the same keys of two workspaces, or with two API keys."""
    services: Services = await open_on(flora, tracker_public_url=PUBLIC_URL)
    for key in ("key-1", "key-2"):
        await services.starter.start(request(key))
    rows: list[Any] = [await services.resolver.find(key) for key in ("key-1", "key-2")]
    assert len({row.callback_token for row in rows}) == 2
    assert all(len(row.callback_token) == 32 for row in rows)


async def test_a_caller_that_waits_beside_it_does_not_send_such_a_key_either(
    make_flora: MakeFlora, open_on: OpenServices, backup_url: str
) -> None:
    """Of five at the same moment one asks FLORA, and all hear that the key is in use."""
    async with make_flora() as flora:
        url = "http://127.0.0.1:10"
        run_id, services = await start_restore_and_sweep(flora, open_on, backup_url, url)
        answers = await asyncio.gather(
            *(services.starter.start(request()) for _ in range(5)), return_exceptions=True
        )
        assert {type(one) for one in answers} == {IdempotencyConflict}
        assert flora.world.counts["runs.start", 422] == 1
        assert set(flora.world.runs) == {run_id}
