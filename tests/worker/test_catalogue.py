"""The catalogue: read as a whole on a schedule, and one definition at a time before a start."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.clocks import HandClock
from tests.support.waiting import eventually
from tests.worker.conftest import Hurry, MakeFlora, OpenServices, reads_of
from tracker.core.errors import (
    FloraRefusal,
    FloraUnreachable,
    InvalidRequest,
    NotFound,
    SettingsError,
)
from tracker.flora.parse import ports
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.simulator.catalogue import SimulatedTechnique, load_catalogue
from tracker.simulator.options import SimulatedWorkspace
from tracker.starting.catalogue import LEASE
from tracker.starting.start import StartRequest
from tracker.store import coordination
from tracker.store.queries import starts, techniques
from tracker.store.queries.techniques import TechniqueRow
from tracker.worker import Worker

HOUR = 3600
FACE = {"id": "face", "type": "imageUrl", "value": "https://example.com/a.png"}
PHOTO = FACE | {"id": "photo"}


def start(inputs: list[dict[str, Any]], technique: str = "cctv-cam", key: str | None = None) -> Any:
    return StartRequest(technique=technique, inputs=inputs, idempotency_key=key)


async def kept(services: Services, technique_id: str = "tech_cctv-cam") -> TechniqueRow:
    row = await techniques.get(services.database, technique_id)
    assert row is not None
    return row


def show(flora: Simulator, *, without: Sequence[str] = (), broken: Sequence[str] = ()) -> None:
    """Let FLORA's list lack some techniques, and show others without their ids."""

    class Broken(SimulatedTechnique):
        def list_item(self) -> dict[str, Any]:
            return super().list_item() | {"technique_id": None}

    shown = [
        Broken(**{name: getattr(one, name) for name in SimulatedTechnique.__dataclass_fields__})
        if key in broken
        else one
        for key, one in load_catalogue().items()
        if key not in without
    ]
    flora.world.techniques = lambda: shown  # type: ignore[method-assign]


# The whole list


async def test_a_sync_brings_every_technique(services: Services, flora: Simulator) -> None:
    """One walk over the list; what is left out of it does not replace what is known."""
    definition = await services.catalogue.definition(next(iter(services.workspaces)), "cctv-cam")
    report = await services.catalogue_sync.sync()
    assert report.complete
    assert (report.new, report.back, report.gone) == (37, 0, 0)
    assert [(one.pages, one.techniques) for one in report.lists] == [(1, 38)]
    assert reads_of(flora) == {"techniques.get": 1, "techniques.list": 1}
    rows = await techniques.list_all(services.database)
    assert {row.technique_id for row in rows} == set(load_catalogue())
    row = await kept(services)
    assert (row.inputs, row.slug) == (definition.inputs, "cctv-cam")
    assert (await kept(services, "tech_sigil")).defined_at is None


async def test_what_disappears_is_marked_until_it_is_back(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A technique that a complete sync lacks stays, marked with when that was seen."""
    await services.catalogue_sync.sync()
    clock.move(HOUR)
    show(flora, without=["tech_sigil", "tech_mugshot"])
    assert (await services.catalogue_sync.sync()).gone == 2
    assert (await kept(services, "tech_sigil")).gone_at == clock()
    assert (await kept(services)).gone_at is None
    clock.move(HOUR)
    show(flora, without=["tech_mugshot"])
    report = await services.catalogue_sync.sync()
    assert (report.new, report.back, report.gone) == (0, 1, 0)
    assert (await kept(services, "tech_sigil")).gone_at is None
    assert (await kept(services, "tech_mugshot")).gone_at is not None


async def test_a_sync_that_failed_marks_nothing(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Where one workspace's list could not be read, nothing has disappeared."""
    other = SimulatedWorkspace(
        workspace_id="ws_other", api_key="sk_test_other", webhook_secret="whsec_other"
    )
    async with make_flora(more_workspaces=(other,)) as flora:
        first = flora.world.options.workspaces[0]
        services = await open_on(
            flora,
            flora_api_key=None,
            flora_webhook_secret=(),
            workspaces=[{"id": one.workspace_id, "api_key": one.api_key} for one in (first, other)],
        )
        assert (await services.catalogue_sync.sync()).complete
        clock.move(HOUR)
        show(flora, without=["tech_sigil"])
        flora.world.options = replace(flora.world.options, more_workspaces=())
        report = await services.catalogue_sync.sync()
        assert [one.error is None for one in report.lists] == [True, False]
        assert "401" in (report.lists[1].error or "")
        assert (report.complete, report.gone) == (False, 0)
        assert (await kept(services, "tech_sigil")).gone_at is None


async def test_an_item_that_cannot_be_read_makes_a_sync_incomplete(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """It may be a technique that is known; the others are taken all the same."""
    await services.catalogue_sync.sync()
    clock.move(HOUR)
    show(flora, without=["tech_mugshot"], broken=["tech_sigil"])
    report = await services.catalogue_sync.sync()
    assert "no technique_id" in (report.lists[0].error or "")
    assert (report.lists[0].techniques, report.gone) == (36, 0)


async def test_an_empty_list_is_not_believed(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A FLORA that shows no technique at all has not lost them all."""
    await services.catalogue_sync.sync()
    clock.move(HOUR)
    flora.world.techniques = list  # type: ignore[method-assign]
    assert (await services.catalogue_sync.sync()).gone == 0


async def test_one_process_syncs_at_a_time(services: Services, clock: HandClock) -> None:
    """A sync that begins during another one steps aside; once that has ended it does not."""
    lease = ("catalogue", "another process")
    assert await coordination.take_lease(services.database, *lease, clock(), LEASE)
    assert (await services.catalogue_sync.sync()).skipped
    await coordination.drop_lease(services.database, *lease)
    assert not (await services.catalogue_sync.sync()).skipped


async def test_a_scheduled_sync_comes_every_six_hours(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """Whichever process looks; one that failed is due again soon."""
    sync = services.catalogue_sync
    show(flora, broken=["tech_sigil"])
    failed = await sync.sync_if_due()
    assert failed is not None
    assert not failed.complete
    show(flora)
    assert await sync.sync_if_due() is None
    clock.move(601)
    assert await sync.sync_if_due() is not None
    clock.move(6 * HOUR - 1)
    assert await sync.sync_if_due() is None
    clock.move(1)
    assert await sync.sync_if_due() is not None


async def test_a_worker_reads_the_catalogue_soon_after_its_start(services: Services) -> None:
    """Nobody has to ask for it."""
    worker = Worker(services)
    await worker.start()
    try:

        async def is_there() -> bool:
            return len(await techniques.list_all(services.database)) == 38

        await eventually(is_there)
    finally:
        await worker.stop()


# One definition


async def test_wrong_inputs_are_found_before_anything_is_paid(
    services: Services, flora: Simulator
) -> None:
    """Every fault in one error, nothing sent, and the key is free for the corrected request."""
    wrong = [{"id": "nose", "type": "text", "value": "x"}, FACE | {"type": "text"}]
    with pytest.raises(InvalidRequest) as refused:
        await services.starter.start(start(wrong, key="key-1"))
    assert [fault.field for fault in refused.value.fields] == ["inputs.0.id", "inputs.1.type"]
    assert await starts.get(services.database, "default", "key-1") is None
    assert reads_of(flora) == {"techniques.get": 1}
    started = await services.starter.start(start([FACE], key="key-1"))
    assert not started.replayed
    assert reads_of(flora) == {"techniques.get": 1, "runs.start": 1}


async def test_a_definition_is_read_by_id_too_and_once(
    services: Services, flora: Simulator, open_on: OpenServices
) -> None:
    """Five starts at the same moment read it once, and a process that comes later not at all."""
    with pytest.raises(InvalidRequest):
        await services.starter.start(start([FACE | {"id": "x"}], "tech_cctv-cam"))
    other = await open_on(flora)
    await asyncio.gather(
        *(one.starter.start(start([FACE], "tech_cctv-cam")) for one in (services, other) * 2),
        other.starter.start(start([PHOTO], "tech_wireframe")),
        other.starter.start(start([PHOTO], "tech_wireframe")),
    )
    assert reads_of(flora) == {"techniques.get": 2, "runs.start": 6}


async def test_an_old_definition_is_read_again(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """After an hour, and not before; a slug's too."""
    for seconds, technique, reads in (
        (0, "cctv-cam", 1),
        (HOUR - 1, "cctv-cam", 1),
        (0, "tech_cctv-cam", 1),
        (1, "cctv-cam", 2),
        (HOUR, "tech_cctv-cam", 3),
        (0, "cctv-cam", 3),
    ):
        clock.move(seconds)
        await services.starter.start(start([FACE], technique))
        assert reads_of(flora)["techniques.get"] == reads


async def test_a_definition_is_read_again_once_flora_has_refused_inputs(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """What fitted the definition and was refused shows that it may have changed."""
    unfit = FACE | {"value": "an-element-that-is-none"}
    for seconds, reads in ((0, 1), (30, 1), (40, 1), (0, 2), (0, 2)):
        clock.move(seconds)
        with pytest.raises(FloraRefusal) as refused:
            await services.starter.start(start([unfit]))
        assert [fault.field for fault in refused.value.fields] == ["inputs[0].value"]
        assert reads_of(flora)["techniques.get"] == reads


async def test_a_stored_definition_serves_while_flora_does_not(
    services: Services, flora: Simulator, clock: HandClock, hurry: Hurry
) -> None:
    """An old one is used where FLORA gives none, and it is not asked with every start."""
    hurry(services, flora)
    (workspace,) = services.workspaces
    await services.catalogue.definition(workspace, "cctv-cam")
    clock.move(2 * HOUR)
    flora.world.options = replace(flora.world.options, errors=1.0)
    definition = await services.catalogue.definition(workspace, "cctv-cam")
    assert [port.id for port in ports(definition.inputs)] == ["face"]
    asked = reads_of(flora)["techniques.get"]
    assert await services.catalogue.definition(workspace, "cctv-cam") == definition
    assert reads_of(flora)["techniques.get"] == asked
    with pytest.raises(FloraRefusal, match=r"50[03]"):
        await services.catalogue.definition(workspace, "sigil")


async def test_many_who_wait_for_one_definition_wait_no_longer_than_one(
    open_on: OpenServices, flora: Simulator
) -> None:
    """FLORA accepts connections and answers nothing: as many starts, one after the other, would ask
    for the technique that none of them got."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        root = f"http://127.0.0.1:{silent.getsockname()[1]}/api/v1"
        services = await open_on(flora, flora_base_url=root, flora_workspace_id="ws_simulator")
        async with asyncio.timeout(15):
            starting = [services.starter.start(start([FACE]), wait=2) for _ in range(10)]
            found = await asyncio.gather(*starting, return_exceptions=True)
    assert {type(one) for one in found} == {FloraUnreachable}


async def test_an_empty_definition_checks_nothing(services: Services, flora: Simulator) -> None:
    """Where even the single read shows no inputs, FLORA alone decides."""
    row = TechniqueRow(technique_id="tech_cctv-cam", name="CCTV Cam", slug="cctv-cam")
    await techniques.define(services.database, row, services.clock())
    with pytest.raises(FloraRefusal) as refused:
        await services.starter.start(start([FACE | {"id": "nose"}]))
    assert refused.value.code == "input_validation_error"


async def test_a_listed_technique_is_read_before_its_first_start(
    services: Services, flora: Simulator
) -> None:
    """The list's empty inputs are no definition."""
    await services.catalogue_sync.sync()
    with pytest.raises(InvalidRequest):
        await services.starter.start(start([FACE | {"id": "nose"}], "tech_cctv-cam"))
    assert reads_of(flora) == {"techniques.list": 1, "techniques.get": 1}


async def test_a_repeated_start_is_not_checked_again(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """A key that has started a run answers with it, whatever the definition says by now."""
    first = await services.starter.start(start([FACE], key="key-1"))
    changed = TechniqueRow(
        technique_id="tech_cctv-cam", name="CCTV Cam", inputs=({"id": "other", "type": "text"},)
    )
    await techniques.define(services.database, changed, clock())
    clock.move(2 * HOUR)
    asked = reads_of(flora)
    again = await services.starter.start(start([FACE], key="key-1"))
    assert (again.replayed, again.record.run.run_id) == (True, first.record.run.run_id)
    assert reads_of(flora) == asked


async def test_a_technique_that_flora_lacks_cannot_be_started(
    services: Services, flora: Simulator
) -> None:
    """By id as by slug: FLORA says that it does not exist, and nothing is kept."""
    for technique in ("nonesuch", "tech_nonesuch"):
        with pytest.raises(NotFound):
            await services.starter.start(start([FACE], technique))
    assert await techniques.list_all(services.database) == []


async def test_what_can_name_no_technique_is_not_asked_for(
    services: Services, flora: Simulator
) -> None:
    """FLORA would answer a path of several parts with something else altogether."""
    for technique in ("", "a/b", "a/", "x" * 256, "a\0"):
        with pytest.raises(InvalidRequest) as refused:
            await services.starter.start(start([FACE], technique))
        assert [fault.field for fault in refused.value.fields] == ["technique"]
        assert await services.catalogue.find(technique) is None
    assert reads_of(flora) == {}


async def test_one_workspaces_slug_is_not_anothers(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """Where there are several workspaces, each is asked what its slug stands for."""
    other = SimulatedWorkspace(
        workspace_id="ws_other", api_key="sk_test_other", webhook_secret="whsec_other"
    )
    async with make_flora(more_workspaces=(other,)) as flora:
        first = flora.world.options.workspaces[0]
        services = await open_on(
            flora,
            flora_api_key=None,
            flora_webhook_secret=(),
            workspaces=[{"id": one.workspace_id, "api_key": one.api_key} for one in (first, other)],
        )
        for workspace in (*services.workspaces, *services.workspaces):
            found = await services.catalogue.definition(workspace, "cctv-cam")
            assert found.technique_id == "tech_cctv-cam"
        assert reads_of(flora)["techniques.get"] == 2


async def test_a_technique_is_found_to_be_shown(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """By id or slug, with its definition; what FLORA no longer has is still shown."""
    find = services.catalogue.find
    await services.catalogue_sync.sync()
    for name in ("tech_cctv-cam", "cctv-cam"):
        found = await find(name)
        assert found is not None
        assert [port["id"] for port in found.inputs] == ["face"]
    assert await find("nonesuch") is None
    old = TechniqueRow(technique_id="tech_old", name="Old", slug="old")
    await techniques.define(services.database, old, clock())
    clock.move(2 * HOUR)
    assert (await find("old")) == (await find("tech_old")) == await kept(services, "tech_old")


async def test_who_may_only_read_keeps_no_start_waiting(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """However many names are looked up at once, at most one lookup is in the queue in which starts
    and polls wait; who waits too long for that is shown what is known. A name that was read lately
    waits for none."""
    (workspace,) = services.workspaces
    limit = workspace.require_client().request_limit
    find = services.catalogue.find
    assert await find("cctv-cam") is not None
    old = TechniqueRow(technique_id="tech_old", name="Old", inputs=({"id": "a"},))
    await techniques.define(services.database, old, clock())
    services.catalogue.renewal_seconds = 60.0
    finding = [asyncio.create_task(find(f"nonesuch-{number}")) for number in range(40)]
    most = 0
    while not all(one.done() for one in finding):
        most = max(most, limit.state().waiting + limit.state().in_flight)
        await asyncio.sleep(0)
    assert (most, await asyncio.gather(*finding)) == (1, [None] * 40)
    services.catalogue.renewal_seconds = 0.2
    async with services.catalogue._finding:
        assert await find("cctv-cam") is not None
        clock.move(2 * HOUR)
        assert await find("tech_old") == await kept(services, "tech_old")
        with pytest.raises(FloraUnreachable, match="too many others"):
            await find("nonesuch")


async def test_what_is_known_is_shown_without_flora(
    services: Services, flora: Simulator, hurry: Hurry
) -> None:
    """A listed technique is shown as far as it is known; an unknown one cannot be told."""
    await services.catalogue_sync.sync()
    flora.world.options = replace(flora.world.options, cut=1.0)
    hurry(services, flora)
    found = await services.catalogue.find("tech_sigil")
    assert found is not None
    assert (found.name, found.inputs) == ("Sigil", ())
    with pytest.raises(FloraUnreachable):
        await services.catalogue.find("nonesuch")


async def test_without_a_key_only_what_is_known_is_there(
    open_on: OpenServices, flora: Simulator
) -> None:
    """The database is shown; a start, and reading a definition for one, need the key."""
    services = await open_on(flora, flora_api_key=None)
    row = TechniqueRow(technique_id="tech_a", name="A")
    await techniques.define(services.database, row, services.clock())
    assert await services.catalogue.find("tech_a") is not None
    assert await services.catalogue.find("nonesuch") is None
    assert (await services.catalogue_sync.sync()).lists == []
    (workspace,) = services.workspaces
    with pytest.raises(SettingsError, match="FLORA_API_KEY"):
        await services.catalogue.definition(workspace, "nonesuch")
