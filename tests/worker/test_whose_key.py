"""Idempotency keys belong to the workspace of the API key, wherever it stands in the settings."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from tests.support.clocks import HandClock
from tests.worker.conftest import Hurry, MakeFlora, OpenServices, the_run
from tests.worker.doubt import GATEWAY, HOUR, OTHER, attempt, change, request
from tracker.core.errors import FloraError, InvalidRequest, SettingsError
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import RunStatus, Tracking
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.starting.sheet import sheet_of_objects
from tracker.store.queries import starts as start_log
from tracker.store.queries.runs import get_run
from tracker.store.schema import runs, starts


def moved(flora: Simulator, **more: Any) -> dict[str, Any]:
    """The same workspace, under `[[workspaces]]`."""
    options = flora.world.options
    one = {
        "id": options.workspace_id,
        "api_key": options.api_key,
        "webhook_secrets": [options.webhook_secret],
    }
    return {"flora_api_key": None, "flora_webhook_secret": (), "workspaces": (one,)} | more


async def test_a_workspace_that_moves_in_the_settings_keeps_its_keys(
    flora: Simulator, open_on: OpenServices, clock: HandClock
) -> None:
    """From FLORA_API_KEY to `[[workspaces]]`: the same key is the same run, also when FLORA has
    forgotten it."""
    first = await attempt(await open_on(flora))
    assert first is not None
    clock.move(25 * HOUR)
    assert await attempt(await open_on(flora, **moved(flora))) == first
    assert len(flora.world.runs) == 1


async def test_another_workspaces_key_in_the_same_place_has_keys_of_its_own(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """It is not given the first one's runs."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        first = await attempt(await open_on(flora))
        second = await attempt(await open_on(flora, flora_api_key=OTHER.api_key))
        assert None not in (first, second)
        assert first != second
        assert flora.world.runs[second or ""].workspace.workspace_id == "ws_other"


async def test_a_key_of_another_workspace_than_the_settings_say_tracks_nothing(
    flora: Simulator, open_on: OpenServices
) -> None:
    """A page of the history that it reads is reported, and not taken for this workspace's."""
    services = await open_on(flora, flora_workspace_id="ws_elsewhere")
    run = flora.start()
    [workspace] = services.workspaces
    report = await services.sweeper.sweep(workspace)
    assert "reads workspace ws_simulator" in (report.error or "")
    assert await get_run(services.database, run.run_id) is None


async def test_a_key_of_another_workspace_than_the_settings_say_starts_nothing(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """It is noticed before the first start, also where the id was known before."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        services = await open_on(
            flora, flora_api_key=OTHER.api_key, flora_workspace_id="ws_simulator"
        )
        with pytest.raises(Exception, match="ws_other"):
            await services.starter.start(request())
        assert not flora.world.runs


@pytest.mark.parametrize(
    ("answer", "says"),
    [("not_found", "is of workspace ws_other"), ("service_unavailable", "503|no answer")],
)
async def test_swapped_keys_start_nothing_where_flora_lists_no_workspaces(
    make_flora: MakeFlora, open_on: OpenServices, answer: str, says: str
) -> None:
    """The history names the workspace of a key as well."""
    async with make_flora(more_workspaces=(OTHER,), refuse={"workspaces.list": answer}) as flora:
        for workspace in (None, OTHER):
            flora.start("icon-pack", workspace=workspace)
        settings = moved(flora)
        (ours,) = settings["workspaces"]
        swapped = (
            {"id": "ws_other", "api_key": ours["api_key"]},
            ours | {"api_key": OTHER.api_key},
        )
        services = await open_on(flora, **settings | {"workspaces": swapped})
        with pytest.raises((FloraError, SettingsError), match=says):
            await services.starter.start(request(workspace_id="ws_simulator"))
        assert len(flora.world.runs) == 2
        right = ({"id": "ws_other", "api_key": OTHER.api_key}, ours)
        services = await open_on(flora, **settings | {"workspaces": right})
        for named in ("ws_simulator", "ws_other"):
            run_id = await attempt(services, f"of {named}", workspace_id=named)
            assert flora.world.runs[run_id or ""].workspace.workspace_id == named


async def test_a_refused_key_of_another_workspace_stops_no_batch(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """The workspace of a batch is found, whatever is wrong with the keys before its own."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        settings = moved(flora)
        wrong = {"id": "ws_other", "api_key": "sk_test_which_nobody_has"}
        services = await open_on(
            flora, **settings | {"workspaces": (wrong, *settings["workspaces"])}
        )
        found = await services.workspaces.with_id("ws_simulator")
        assert found is not None
        assert found.workspace_id == "ws_simulator"
        with pytest.raises(FloraError, match="401"):
            await services.workspaces.with_id("ws_other")


async def test_the_settings_name_the_workspace_where_there_are_no_lists(
    flora: Simulator, open_on: OpenServices
) -> None:
    """Where a gateway passes on no list at all, the id in the settings is used."""
    services = await open_on(flora, flora_workspace_id="ws_simulator")
    workspace = await services.workspaces.pick(None)
    await services.catalogue.checked(workspace, "icon-pack", request().inputs)
    change(flora, gateway_reads=1.0, gateway_pages=1.0, gateway_answers=("404",))
    assert await attempt(services) is not None


async def test_of_a_key_that_sees_two_workspaces_one_is_tracked(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Starts, pages of due runs, sweeps, verify, and the search for a start's run: none of them
    meets the runs of the other."""
    async with make_flora(more_workspaces=(OTHER,), shared_key=True) as flora:
        services = await open_on(flora, flora_workspace_id="ws_simulator")
        [workspace] = services.workspaces
        ours = {await attempt(services, f"key-{number}") for number in range(3)}
        for _ in range(150):
            flora.start("icon-pack", workspace=OTHER)
        clock.move(61)
        assert (await services.poller.poll_due()).settled == 3
        report = await services.sweeper.sweep(workspace)
        assert (report.error, report.pages) == (None, 2)  # the first showed the other's runs
        clock.move(HOUR)
        change(flora, **GATEWAY)
        assert await attempt(services, "in doubt") is None
        change(flora, gateway_starts=0.0)
        flora.start("icon-pack", workspace=OTHER)
        clock.move(200)
        assert await services.recovery.recover() == 1
        ours.add(await attempt(services, "in doubt"))
        clock.move(61)
        await services.poller.poll_due()
        verified = await services.verifier.verify(workspace, since=timedelta(days=1))
        assert (verified.error, verified.differences) == (None, [])
        async with services.database.read() as connection:
            assert set(await connection.scalars(select(runs.c.run_id))) == ours


async def test_of_a_key_that_sees_two_workspaces_another_one_may_be_tracked(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """If the settings say so; one that it does not see may not."""
    async with make_flora(more_workspaces=(OTHER,), shared_key=True) as flora:
        services = await open_on(flora, flora_workspace_id="ws_zzz")
        with pytest.raises(SettingsError, match="is of workspace ws_simulator, ws_other"):
            await services.starter.start(request())
        assert not flora.world.runs
        for number, named in enumerate(("ws_simulator", "ws_other", "ws_simulator")):
            services = await open_on(flora, flora_workspace_id=named)
            assert await attempt(services, f"key-{number}") is not None
            assert await start_log.get(services.database, named, f"key-{number}") is not None
        services = await open_on(flora, flora_workspace_id="ws_zzz")
        with pytest.raises(SettingsError, match="is of workspace ws_simulator"):
            await services.starter.start(request())
        assert len(flora.world.runs) == 3


async def test_of_a_key_that_sees_two_workspaces_one_has_to_be_named(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Nothing is started, and a sweep says what to set."""
    async with make_flora(more_workspaces=(OTHER,), shared_key=True) as flora:
        services = await open_on(flora)
        flora.start("icon-pack")
        flora.start("icon-pack", workspace=OTHER)
        with pytest.raises(SettingsError, match="FLORA_WORKSPACE_ID"):
            await services.starter.start(request())
        [workspace] = services.workspaces
        report = await services.sweeper.sweep(workspace)
        assert "shows runs of workspace" in str(report.error)
        assert "FLORA_WORKSPACE_ID" in str(report.error)
        assert len(flora.world.runs) == 2


async def test_without_an_id_nothing_is_started(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Where FLORA does not tell whose key it is, the settings have to."""
    async with make_flora(refuse={"workspaces.list": "not_found"}) as flora:
        services = await open_on(flora)
        with pytest.raises(Exception, match="FLORA_WORKSPACE_ID"):
            await services.starter.start(request())
        assert not flora.world.runs
        named = await open_on(flora, flora_workspace_id="ws_simulator")
        assert await attempt(named) is not None


async def _ask_for(services: Services, workspace_id: str) -> None:
    """Each way to start something, or to track it, in a workspace that is named."""
    with pytest.raises((InvalidRequest, FloraError, SettingsError)) as first:
        await services.starter.start(request(workspace_id=workspace_id))
    sheet = sheet_of_objects([(1, {"prompt": "a"})])
    for asked in (
        services.batches.plan("icon-pack", sheet, name="one", workspace_id=workspace_id),
        services.tracker.track("run_1", workspace_id=workspace_id),
        services.tracker.track_shown("run_1", workspace_id=workspace_id),
    ):
        with pytest.raises(type(first.value)):
            await asked
    raise first.value


async def test_nothing_is_started_in_another_workspace_than_the_one_named(
    make_flora: MakeFlora, open_on: OpenServices, hurry: Hurry
) -> None:
    """FLORA is asked for the id of the key's own once, and only where an id is named; a process
    that starts later knows it from the database."""
    async with make_flora() as flora:
        change(flora, refuse={"workspaces.list": "not_found"})
        with pytest.raises(SettingsError, match="FLORA_WORKSPACE_ID"):
            await _ask_for(await open_on(flora), "ws_zzz")
        change(flora, refuse={})
        flora.world.counts.clear()
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="ws_zzz is not configured here"):
                await _ask_for(await open_on(flora), "ws_zzz")
        assert not flora.world.runs
        assert flora.world.counts == {("workspaces.list", 200): 1}
        assert await attempt(await open_on(flora), workspace_id="ws_simulator") is not None
        unasked = await open_on(flora)
        hurry(unasked, flora)
        unasked.workspaces.rotate("default", api_key="sk_test_another", secrets=())
    with pytest.raises(FloraError, match="no answer"):
        await _ask_for(unasked, "ws_simulator")


async def test_a_restart_knows_whose_key_it_is(flora: Simulator, open_on: OpenServices) -> None:
    """FLORA is asked once for each key."""
    await attempt(await open_on(flora))
    again = await open_on(flora)
    change(flora, refuse={"workspaces.list": "not_found"})
    assert await attempt(again, "key-2") is not None
    asked = [count for (name, _), count in flora.world.counts.items() if name == "workspaces.list"]
    assert asked == [1]


async def test_starts_of_an_older_version_get_the_id(
    flora: Simulator, open_on: OpenServices
) -> None:
    """Their keys are remembered, whatever the place was called."""
    first = await attempt(await open_on(flora))
    services = await open_on(flora)
    old = starts.update().values(workspace_slot="default", workspace_id=None)
    await services.database.write(lambda connection: connection.execute(old).rowcount)
    again = await open_on(flora)
    assert await attempt(again) == first
    row = await start_log.get(again.database, "ws_simulator", "key-1")
    assert row is not None
    verified = select(starts.c.workspace_id).where(starts.c.idempotency_key == "key-1")
    assert await services.database.fetchval(verified) == "ws_simulator"


async def _known_before_the_id(services: Services, run_id: str) -> None:
    """Store a run as a tracker of one workspace does before it knows the workspace's id."""
    heard = {"at": services.clock(), "status": RunStatus.PENDING, "technique_id": "tech_icon_pack"}
    seen = Observation(run_id=run_id, source=Source.TRACK, **heard)
    await services.writer.submit(Observed(observation=seen))


def _both(flora: Simulator, **other: Any) -> dict[str, Any]:
    [first] = moved(flora)["workspaces"]
    second = {"id": OTHER.workspace_id, "api_key": OTHER.api_key}
    return moved(flora, workspaces=(first, second | other))


@pytest.mark.parametrize("of_other", [False, True])
async def test_a_run_of_unknown_workspace_is_read_with_the_key_that_shows_it(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, *, of_other: bool
) -> None:
    """A second workspace was configured after the run was heard of: the key that shows it gives it
    its workspace."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        services = await open_on(flora, **_both(flora))
        run_id = flora.start("icon-pack", workspace=OTHER if of_other else None).run_id
        await _known_before_the_id(services, run_id)
        clock.move(60)
        explanation = await services.explainer.explain(run_id)
        assert explanation is not None
        assert not any("not configured" in one.text for one in explanation.sentences)
        assert await services.poller.next_due_at() is not None
        await services.poller.poll_due()
        found = await the_run(services, run_id)
        expected = OTHER.workspace_id if of_other else flora.world.options.workspace_id
        assert (found.run.workspace_id, found.tracking) == (expected, Tracking.SETTLED)


@pytest.mark.parametrize(
    ("other", "tracking"),
    [
        ({}, Tracking.LOST),
        ({"api_key": "sk_refused"}, Tracking.ACTIVE),
        ({"api_key": None}, Tracking.ACTIVE),
    ],
)
async def test_a_run_of_unknown_workspace_is_lost_when_every_key_denies_it(
    make_flora: MakeFlora,
    open_on: OpenServices,
    clock: HandClock,
    other: dict[str, Any],
    tracking: Tracking,
) -> None:
    """A key that cannot read its workspace leaves it open whether the run is there."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        for workspace in (None, OTHER):
            flora.start("icon-pack", workspace=workspace)
        services = await open_on(flora, **_both(flora, **other))
        await _known_before_the_id(services, "run_of_nobody")
        for _ in range(24):
            clock.move(300)
            await services.poller.poll_due()
        record = await the_run(services, "run_of_nobody")
        assert record.tracking is tracking
        assert record.checks > 5
