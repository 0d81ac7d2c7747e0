"""Which requests a key takes for the one that it was stored with."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from tests.support.clocks import HandClock
from tests.worker.conftest import Hurry, MakeFlora, OpenServices, reads_of
from tests.worker.doubt import GATEWAY, OTHER, attempt, change, request, state_of
from tracker.core.errors import (
    FloraRefusal,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
)
from tracker.services import Services
from tracker.simulator import Simulator
from tracker.simulator.catalogue import SimulatedTechnique
from tracker.starting.start import Started
from tracker.store.queries import starts
from tracker.store.schema import starts as starts_table

BUILDING = {"id": "building", "type": "imageUrl", "value": "https://example.com/a.png"}
MATERIAL = {"id": "material", "type": "text", "value": "brick"}
GIVEN, REVERSED = [BUILDING, MATERIAL], [MATERIAL, BUILDING]
IMAGES = [
    {"id": "image", "type": "imageUrl", "value": f"https://example.com/{name}.png"}
    for name in ("a", "b")
]
REFERENCE = {"id": "reference", "type": "imageUrl", "value": "https://example.com/r.png"}
TWO_HOURS = 7200


def untyped(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The inputs as `--input ID=VALUE` and a mapping in Python give them."""
    return [one | {"type": None} for one in inputs]


async def start(
    services: Services,
    inputs: list[dict[str, Any]],
    technique: str = "tech_facade-swap",
    **changes: Any,
) -> Started:
    """Start these inputs with the same key as always, and wait a moment for the outcome."""
    asked = request(technique=technique, inputs=inputs, **changes)
    return await services.starter.start(asked, wait=20.0)


def remove(flora: Simulator) -> None:
    """FLORA has no technique any more."""
    flora.world.technique = lambda reference: None  # type: ignore[method-assign]


def change_type(flora: Simulator, input_id: str, type_: str) -> None:
    """FLORA takes another type for an input from now on."""
    world, before = flora.world, flora.world.technique

    def technique(reference: str) -> SimulatedTechnique | None:
        found = before(reference)
        return found and replace(
            found,
            inputs=tuple(
                replace(one, type=type_) if one.id == input_id else one for one in found.inputs
            ),
        )

    world.technique = technique  # type: ignore[method-assign]


@pytest.mark.parametrize("again", [REVERSED, untyped(GIVEN), untyped(REVERSED)])
async def test_order_and_types_that_are_left_out_make_no_other_request(
    services: Services, flora: Simulator, again: list[dict[str, Any]]
) -> None:
    """The key returns its run; whoever is refused takes another key and pays twice."""
    first = await start(services, GIVEN)
    asked = reads_of(flora)
    replayed = await start(services, again)
    assert replayed.replayed
    assert replayed.record.run.run_id == first.record.run.run_id
    assert reads_of(flora) == asked


async def test_several_values_of_an_input_have_an_order(
    services: Services, flora: Simulator
) -> None:
    """The values of one input may be a sequence. Their order decides; their place among the other
    inputs does not."""
    technique = "tech_color-transfer"
    first = await start(services, [*IMAGES, REFERENCE], technique)
    between = [IMAGES[0], REFERENCE, IMAGES[1]]
    assert (await start(services, between, technique)).record == first.record
    with pytest.raises(IdempotencyConflict, match="other inputs"):
        await start(services, [*reversed(IMAGES), REFERENCE], technique)


@pytest.mark.parametrize(
    "other",
    [
        [BUILDING],
        [*GIVEN, MATERIAL],
        [BUILDING, MATERIAL | {"value": "glass"}],
        untyped([BUILDING, MATERIAL | {"value": "glass"}]),
        [BUILDING, MATERIAL | {"type": "imageUrl"}],
    ],
)
async def test_another_value_or_type_is_another_request(
    services: Services, other: list[dict[str, Any]]
) -> None:
    """And so is an input more or less."""
    await start(services, GIVEN)
    with pytest.raises(IdempotencyConflict, match="other inputs"):
        await start(services, other)


async def test_another_request_at_the_same_moment_is_refused(
    open_on: OpenServices, flora: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the first has not been sent when the other comes: its tags may still change then, but
    not once the key has started a run."""
    one, two = await open_on(flora), await open_on(flora)
    kept, waits = asyncio.Event(), asyncio.Event()
    address_of = one.starter.sender.address_of

    async def after_the_other(token: str | None) -> str | None:
        kept.set()
        await waits.wait()
        return await address_of(token)

    async def wait(seconds: float) -> None:
        waits.set()
        await asyncio.sleep(seconds)

    monkeypatch.setattr(one.starter.sender, "address_of", after_the_other)
    two.starter.sleep = wait
    first = asyncio.create_task(start(one, GIVEN))
    await kept.wait()
    with pytest.raises(IdempotencyConflict, match="other tags"):
        await start(two, GIVEN, tags={"team": "red"})
    assert not (await first).replayed
    assert (await start(two, REVERSED)).record.run == (await first).record.run


async def test_text_that_no_database_stores_is_the_same_in_any_order(services: Services) -> None:
    """NUL is replaced in what is stored and sent."""
    odd = MATERIAL | {"value": "red\0brick"}
    first = await start(services, [BUILDING, odd])
    assert (await start(services, [odd, BUILDING])).record.run == first.record.run


async def test_a_refused_start_is_sent_in_its_first_order(
    make_flora: MakeFlora, open_on: OpenServices
) -> None:
    """FLORA compares bodies, too, and refuses a known key with another one."""
    async with make_flora(credits=0.0) as flora:
        services = await open_on(flora)
        with pytest.raises(FloraRefusal):
            await start(services, GIVEN)
        change(flora, credits=100.0)
        run = (await start(services, untyped(REVERSED))).record.run
        assert [*flora.world.runs[run.run_id].request.inputs] == GIVEN
        row = await starts.get(services.database, "ws_simulator", "key-1")
        assert row is not None
        assert row.inputs == GIVEN


async def test_a_start_in_doubt_is_repeated_as_it_was_sent(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock, hurry: Hurry
) -> None:
    """The same bytes, in whatever order the caller names the inputs by then."""
    async with make_flora(**GATEWAY) as flora:
        services = await open_on(flora)
        hurry(services, flora)
        sent: list[bytes] = []

        async def note(asked: httpx.Request) -> None:
            if asked.method == "POST":
                sent.append(asked.content)

        [workspace] = services.workspaces
        client = workspace.require_client().http
        client.event_hooks = client.event_hooks | {"request": [note]}
        assert await attempt(services, technique="tech_facade-swap", inputs=GIVEN) is None
        assert await state_of(services.database) == "in_doubt"
        change(flora, gateway_starts=0.0)
        clock.move(200)
        await start(services, REVERSED)
        assert len(sent) == 2
        assert sent[0] == sent[1]


@pytest.mark.parametrize("inputs", [GIVEN, untyped(GIVEN)])
@pytest.mark.parametrize("is_removed", [True, False])
async def test_a_known_key_needs_no_definition(
    services: Services,
    flora: Simulator,
    clock: HandClock,
    inputs: list[dict[str, Any]],
    is_removed: bool,
) -> None:
    """The key returns its run although FLORA has removed the technique, or takes other types."""
    first = await start(services, inputs)
    if is_removed:
        remove(flora)
    else:
        change_type(flora, "material", "videoUrl")
    clock.move(TWO_HOURS)
    again = await start(services, inputs)
    assert again.record.run.run_id == first.record.run.run_id


async def test_a_known_key_needs_no_slug(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """Also where a slug counts only once the process has read it, because there are several
    workspaces; another technique is another request all the same."""
    async with make_flora(more_workspaces=(OTHER,)) as flora:
        own = flora.world.options.workspaces[0]
        settings = {
            "flora_api_key": None,
            "flora_webhook_secret": (),
            "workspaces": [{"id": o.workspace_id, "api_key": o.api_key} for o in (own, OTHER)],
        }
        asked: dict[str, Any] = {"technique": "facade-swap", "workspace_id": own.workspace_id}
        first = await start(await open_on(flora, **settings), GIVEN, **asked)
        restarted = await open_on(flora, **settings)
        for name in ("icon-pack", "tech_icon-pack"):
            with pytest.raises(IdempotencyConflict, match="another technique"):
                await start(restarted, GIVEN, **asked | {"technique": name})
        remove(flora)
        again = await start(restarted, GIVEN, **asked)
        assert again.record.run.run_id == first.record.run.run_id
        with pytest.raises(NotFound):
            await start(restarted, GIVEN, **asked | {"technique": "nonesuch"})


async def test_an_unsent_start_takes_the_types_of_the_definition(
    make_flora: MakeFlora, open_on: OpenServices, clock: HandClock
) -> None:
    """FLORA refused the start, then changed an input's type: the same call starts a run."""
    async with make_flora(credits=0.0) as flora:
        services = await open_on(flora)
        with pytest.raises(FloraRefusal):
            await start(services, untyped(GIVEN))
        change(flora, credits=100.0)
        change_type(flora, "material", "imageUrl")
        clock.move(TWO_HOURS)
        with pytest.raises(InvalidRequest) as refused:
            await start(services, untyped(GIVEN))
        assert "https link" in refused.value.fields[0].message
        change_type(flora, "building", "text")
        change_type(flora, "material", "text")
        clock.move(TWO_HOURS)
        run = (await start(services, untyped(REVERSED))).record.run
        sent = [BUILDING | {"type": "text"}, MATERIAL]
        assert [*flora.world.runs[run.run_id].request.inputs] == sent


async def test_what_retention_leaves_is_compared(
    services: Services, flora: Simulator, clock: HandClock
) -> None:
    """The inputs are gone, and a digest of them is left."""
    first = await start(services, GIVEN)
    gone = update(starts_table).values(inputs=[])
    await services.database.write(lambda connection: connection.execute(gone).rowcount)
    for inputs in (GIVEN, untyped(GIVEN)):
        assert (await start(services, inputs)).record.run == first.record.run
    for inputs in ([BUILDING], untyped([BUILDING]), []):
        with pytest.raises(IdempotencyConflict, match="other inputs"):
            await start(services, inputs)
    remove(flora)
    clock.move(TWO_HOURS)
    assert (await start(services, untyped(GIVEN))).record.run == first.record.run


async def test_an_older_version_compares_the_digest_of_the_first_order(services: Services) -> None:
    """During a rolling upgrade it recognises a request that it would have stored itself."""
    from tracker.core.starts import digest_of

    await start(services, untyped(REVERSED))
    row = await starts.get(services.database, "ws_simulator", "key-1")
    assert row is not None
    assert row.fingerprint == digest_of([row.technique_id, REVERSED])
