"""The simulator's own routes, and the files behind output links."""

import httpx
import pytest

from tests.simulator.conftest import Flora, MakeFlora
from tests.simulator.receiver import Receiver
from tests.support.clocks import HandClock
from tracker.simulator import Options, running

ROOT = "http://127.0.0.1:8750"


async def test_records_contain_the_end_in_advance(flora: Flora, clock: HandClock) -> None:
    """A record shows the run as it is now, and under `end` as a read will show it when it ended."""
    run_id = (await flora.start()).json()["run_id"]
    (before,) = (await flora.get(f"{ROOT}/simulator/runs")).json()["runs"]
    assert (before["run_id"], before["status"]) == (run_id, "pending")
    clock.move(30)
    (after,) = (await flora.get(f"{ROOT}/simulator/runs")).json()["runs"]
    assert after["status"] == "completed"
    assert after["end"] == before["end"] == (await flora.get(f"/runs/{run_id}")).json()
    assert after["run_type"] == "technique"


async def test_requests_are_counted_by_route_and_status(flora: Flora) -> None:
    """Every request to the API is counted, but not requests for the counts."""
    await flora.get("/techniques")
    await flora.get("/techniques")
    await flora.get("/runs/run_nobody")
    await flora.get(f"{ROOT}/simulator/runs")
    counts = (await flora.get(f"{ROOT}/simulator/requests")).json()
    assert counts == {
        "total": 3,
        "requests": [
            {"route": "runs.get_any", "status": 404, "count": 1},
            {"route": "techniques.list", "status": 200, "count": 2},
        ],
    }


async def test_attempts_are_listed(receiver: Receiver) -> None:
    """Each attempt at a callback is listed with the receiver's answer."""
    receiver.script = [500]
    async with running(Options(speed=5000)) as simulator, httpx.AsyncClient() as client:
        run = simulator.start(callback_url=receiver.url)
        await simulator.quiet()
        kept = (await client.get(f"{simulator.root}/simulator/deliveries")).json()["deliveries"]
    assert [(sent["run_id"], sent["number"], sent["status"]) for sent in kept] == [
        (run.run_id, 1, 500),
        (run.run_id, 2, 200),
    ]


async def test_faults_change_at_run_time(flora: Flora) -> None:
    """New rates hold from the next request on, and the rest stays as it was."""
    changed = await flora.post(f"{ROOT}/simulator/faults", json={"errors": 1, "drop": "40%"})
    assert changed.json()["errors"] == 1
    assert changed.json()["drop"] == 0.4
    assert changed.json()["failures"] == 0
    assert (await flora.get(f"{ROOT}/simulator/faults")).json() == changed.json()
    assert (await flora.get("/techniques")).status_code in (500, 503)
    await flora.post(f"{ROOT}/simulator/faults", json={"errors": 0, "history_outputs": False})
    assert (await flora.get("/techniques")).status_code == 200
    assert flora.world.options.history_outputs is False


@pytest.mark.parametrize(
    "change",
    [{"drop": 2}, {"drop": "many"}, {"drop": True}, {"seed": 1}, {"history_outputs": 1}, {"x": 0}],
)
async def test_bad_rates_are_refused(flora: Flora, change: dict[str, object]) -> None:
    """An invalid rate is a 400 with its name, and changes nothing."""
    before = flora.world.options
    answer = await flora.post(f"{ROOT}/simulator/faults", json=change)
    assert answer.status_code == 400
    assert flora.world.options == before


@pytest.mark.parametrize(
    ("technique", "position", "content_type", "magic"),
    [
        ("icon-pack", 0, "image/png", b"\x89PNG\r\n\x1a\n"),
        ("product-lookbook-grid", 1, "application/pdf", b"%PDF-1.4"),
        ("ugc-creation", 0, "video/mp4", b"\x00\x00\x00\x1cftypisom"),
        ("ugc-creation", 1, "audio/wav", b"RIFF"),
    ],
)
async def test_output_links_lead_to_files(
    flora: Flora, technique: str, position: int, content_type: str, magic: bytes
) -> None:
    """A link of each type serves a file of that type, whole or the range that is asked for."""
    run = flora.world.start(flora.world.sample_request(technique))
    url = run.outputs[position].url
    whole = await flora.get(url)
    assert whole.headers["content-type"] == content_type
    assert whole.content.startswith(magic)
    part = await flora.get(url, headers={"Range": "bytes=4-9"})
    assert part.status_code == 206
    assert part.content == whole.content[4:10]
    assert part.headers["content-range"] == f"bytes 4-9/{len(whole.content)}"
    beyond = await flora.get(url, headers={"Range": "bytes=999999-"})
    assert beyond.status_code == 416


@pytest.mark.parametrize("name", ["nothing.png", "nothing", "..%2Fsecret.png", ".png"])
async def test_other_media_are_not_found(flora: Flora, name: str) -> None:
    """Only outputs of this world have files."""
    assert (await flora.get(f"{ROOT}/media/{name}")).status_code == 404


async def test_each_output_has_its_own_file(flora: Flora) -> None:
    """Two outputs differ in their bytes."""
    await flora.start()
    (run,) = flora.world.runs.values()
    files = {(await flora.get(output.url)).content for output in run.outputs}
    assert len(files) == len(run.outputs) == 4


async def test_an_unknown_route_answers_in_floras_shape(make_flora: MakeFlora) -> None:
    """Unknown paths and methods are errors with a code, as everything else."""
    flora = make_flora()
    assert (await flora.get("/nothing")).json()["error"]["code"] == "not_found"
    assert (await flora.delete("/techniques")).json()["error"]["code"] == "method_not_allowed"
