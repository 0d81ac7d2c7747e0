"""A start goes to the workspace that it is stored for, whenever its API key is replaced."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.clocks import HandClock
from tests.support.waiting import NO_SWEEPS
from tests.web.callbacks import event, signature
from tests.worker.conftest import the_run
from tests.worker.doubt import GATEWAY, attempt, change, request, state_of
from tracker.core.errors import SettingsError
from tracker.services import Services, open_services
from tracker.settings import read_settings
from tracker.settings.load import Rotation
from tracker.simulator import Options, Simulator, running
from tracker.simulator.options import SimulatedWorkspace

OTHERS_KEY = "sk_test_others"
NEXT_KEY = "sk_test_next"
DATA = {"run_id": "run_of_the_first", "run_type": "technique", "status": "completed"}


@dataclass
class Rotated:
    """A tracker that reads its key from a file, and its FLORA, which knows two workspaces."""

    services: Services
    flora: Simulator
    rotation: Rotation
    file: Path

    def replace(self, key: str) -> None:
        """FLORA takes the new key of that workspace only, and the file holds it."""
        if key == NEXT_KEY:
            change(self.flora, api_key=key)
        else:
            change(self.flora, api_key="sk_test_which_nobody_has")
        self.file.write_text(key)

    def before_sending(self, act: Callable[[], object]) -> None:
        """Call `act` when a start has been prepared and is about to be sent."""
        of = self.services.starter.sender.address_of

        async def then(token: str | None) -> str | None:
            act()
            return await of(token)

        self.services.starter.sender.address_of = then  # type: ignore[method-assign]

    @property
    def runs(self) -> list[str]:
        """The workspace of each run that FLORA has."""
        return [run.workspace.workspace_id for run in self.flora.world.runs.values()]


@pytest.fixture
async def rotated(clock: HandClock, database_url: str, tmp_path: Path) -> AsyncIterator[Rotated]:
    file = tmp_path / "key"
    other = SimulatedWorkspace(workspace_id="ws_other", api_key=OTHERS_KEY, webhook_secret="w")
    async with running(Options(failures=0, more_workspaces=(other,)), clock=clock) as flora:
        file.write_text(flora.world.options.api_key)
        (tmp_path / "tracker.toml").write_text('flora_api_key = "file:key"')
        environ = {
            "FLORA_WEBHOOK_SECRET": flora.world.options.webhook_secret,
            "TRACKER_CONFIG": str(tmp_path / "tracker.toml"),
            "TRACKER_DATABASE_URL": database_url,
            "FLORA_BASE_URL": flora.base_url,
            "TRACKER_RECONCILE_CRON": NO_SWEEPS,
        }
        loaded = read_settings(environ)
        rotation = Rotation(loaded.settings, loaded, lambda: read_settings(environ))
        async with open_services(rotation, wall=clock, seconds=clock.seconds) as services:
            yield Rotated(services, flora, rotation, file)


@pytest.mark.parametrize("noticed", ["by a 401", "before"])
async def test_a_start_never_goes_to_another_workspace(rotated: Rotated, noticed: str) -> None:
    """The key is replaced by another workspace's after the start was stored: nothing is started,
    the error says why, and with a right key the same start is sent."""
    assert await attempt(rotated.services) is not None
    rotated.replace(OTHERS_KEY)
    if noticed == "before":
        rotated.before_sending(rotated.rotation.check)
    with pytest.raises(SettingsError, match="is of workspace ws_other"):
        await rotated.services.starter.start(request("key-2", workspace_id="ws_simulator"))
    assert rotated.runs == ["ws_simulator"]
    assert await state_of(rotated.services.database, "key-2") == "stored"
    rotated.replace(NEXT_KEY)
    rotated.rotation.check()
    assert await attempt(rotated.services, "key-2", workspace_id="ws_simulator") is not None
    assert rotated.runs == ["ws_simulator"] * 2


@pytest.mark.parametrize("noticed", ["by a 401", "before"])
async def test_a_start_goes_on_with_a_new_key(rotated: Rotated, noticed: str) -> None:
    """The key is replaced by another of the same workspace: the start succeeds, once."""
    assert await attempt(rotated.services) is not None
    rotated.replace(NEXT_KEY)
    if noticed == "before":
        rotated.before_sending(rotated.rotation.check)
    assert await attempt(rotated.services, "key-2") is not None
    assert rotated.runs == ["ws_simulator"] * 2


async def test_a_new_key_counts_once_its_file_is_there(rotated: Rotated) -> None:
    """The settings name the file before it is there: the next refusal after that finds the key."""
    change(rotated.flora, api_key=NEXT_KEY)
    (rotated.file.parent / "tracker.toml").write_text('flora_api_key = "file:next"')
    assert await attempt(rotated.services) is None
    assert rotated.rotation.stale is not None
    (rotated.file.parent / "next").write_text(NEXT_KEY)
    [workspace] = rotated.services.workspaces
    workspace.require_client().breaker.accepted()  # lets the next request through at once
    assert await attempt(rotated.services, "key-2") is not None


async def test_a_start_in_doubt_never_goes_to_another_workspace(
    rotated: Rotated, clock: HandClock
) -> None:
    """Nor when it is sent again: it stays in doubt until there is a right key."""
    change(rotated.flora, **GATEWAY)
    assert await attempt(rotated.services) is None
    change(rotated.flora, gateway_starts=0.0)
    clock.move(rotated.services.recovery.doubt.total_seconds() + 60)
    rotated.replace(OTHERS_KEY)
    rotated.before_sending(rotated.rotation.check)
    for _ in range(3):
        clock.move(60)
        await rotated.services.recovery.recover()
    assert rotated.runs == []
    assert await state_of(rotated.services.database) == "in_doubt"
    rotated.replace(NEXT_KEY)
    rotated.rotation.check()
    clock.move(600)
    await rotated.services.recovery.recover()
    assert rotated.runs == ["ws_simulator"]


async def test_a_callback_does_not_tell_whose_the_new_key_is(
    rotated: Rotated, clock: HandClock
) -> None:
    """The key is replaced by another workspace's, and a run of the first calls back before FLORA
    has listed any of the second: the runs of the second are swept and polled."""
    services, flora = rotated.services, rotated.flora
    [workspace] = services.workspaces
    assert (await services.sweeper.sweep(workspace)).error is None
    rotated.replace(OTHERS_KEY)
    rotated.rotation.check()
    body = event("run_of_the_first", data=DATA | {"workspace_id": "ws_simulator"})
    signed = signature(body, flora.world.options.webhook_secret, at=clock())
    await services.receiver.receive(body, signature=signed, webhook_id=None)[1]
    await services.applier.drain()
    run = flora.start(workspace=flora.world.options.workspaces[1])
    clock.move(100)
    assert (await services.sweeper.sweep(workspace)).error is None
    assert (await services.poller.poll_due()).trouble is None
    assert (await the_run(services, run.run_id)).run.settled
    assert workspace.workspace_id == "ws_other"


async def test_a_new_signing_secret_leaves_the_workspace_known(
    services: Services, flora: Simulator
) -> None:
    """Its API key is the same, so FLORA is not asked again whose it is."""
    [workspace] = services.workspaces
    known = await services.workspaces.id_of(workspace)
    services.workspaces.rotate(
        workspace.place, api_key=flora.world.options.api_key, secrets=("whsec_new",)
    )
    assert (workspace.workspace_id, [*services.workspaces.signers]) == (known, ["whsec_new"])
