"""Refused starts, and idempotency keys."""

from ipaddress import ip_address

import pytest

from tests.simulator.conftest import Flora, MakeFlora
from tests.support.clocks import HandClock
from tracker.simulator import SimulatedWorkspace
from tracker.simulator.callbacks import Address, refusal

PROMPT = {"id": "prompt", "type": "text", "value": "tools"}
PHOTO = {"id": "photo", "type": "imageUrl", "value": "https://example.com/1.png"}


@pytest.mark.parametrize(
    ("technique", "body", "field"),
    [
        ("icon-pack", {"inputs": []}, "inputs"),
        ("icon-pack", {"inputs": "prompt"}, "inputs"),
        ("icon-pack", {"inputs": ["prompt"]}, "inputs[0]"),
        ("icon-pack", {"inputs": [PROMPT, PROMPT]}, "inputs[1].id"),
        ("icon-pack", {"inputs": [PROMPT | {"id": "nothing"}]}, "inputs[0].id"),
        ("icon-pack", {"inputs": [PROMPT | {"type": "imageUrl"}]}, "inputs[0].type"),
        ("icon-pack", {"inputs": [PROMPT | {"type": "audioUrl"}]}, "inputs[0].type"),
        ("icon-pack", {"inputs": [PROMPT | {"value": 5}]}, "inputs[0].value"),
        ("icon-pack", {"mode": "later"}, "mode"),
        ("icon-pack", {"mode": None}, "mode"),
        ("icon-pack", {"callback_url": 5}, "callback_url"),
        ("icon-pack", {"callback_url": "http://flora.example.com/"}, "callback_url"),
        ("icon-pack", {"idempotency_key": ""}, "idempotency_key"),
        ("wireframe", {"inputs": [PHOTO | {"value": "a photo"}]}, "inputs[0].value"),
        ("fit-checks", {"inputs": [PHOTO | {"id": "person"}]}, "inputs.outfit"),
        ("room-render", {"inputs": [PHOTO | {"id": "plan"}]}, "inputs[0].type"),
    ],
)
async def test_bad_input_is_refused_by_field(
    flora: Flora, technique: str, body: dict[str, object], field: str
) -> None:
    """A start that cannot be used is a 400 that names the field, and nothing runs."""
    answer = await flora.start(technique, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "input_validation_error")
    assert field in [item["field"] for item in error["fields"]]
    assert all(item["message"] for item in error["fields"])
    assert flora.world.runs == {}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_json_is_refused(flora: Flora, content: bytes) -> None:
    """What cannot be parsed is `invalid_json`."""
    answer = await flora.post("/techniques/icon-pack/runs", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_every_technique_starts_with_its_sample_inputs(flora: Flora) -> None:
    """Each technique accepts the inputs that its definition asks for; answers are 200 and 201."""
    statuses = {
        (await flora.start(technique.technique_id, inputs=technique.sample_inputs())).status_code
        for technique in flora.world.techniques()
    }
    assert statuses == {200, 201}


async def test_an_input_may_have_several_values(flora: Flora) -> None:
    """Where a technique allows several values for an input, it may come more than once."""
    asset = PHOTO | {"id": "asset"}
    inputs = [asset, asset, PHOTO | {"id": "texture"}]
    assert (await flora.start("texture-matchers", inputs=inputs)).is_success


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "unauthorized"),
        ("Bearer ", "unauthorized"),
        ("Basic sk_test_simulator", "unauthorized"),
        ("Bearer sk_test_other", "invalid_api_key"),
    ],
)
async def test_a_key_is_required(flora: Flora, header: str | None, code: str) -> None:
    """Without the workspace's key every route answers 401, with a request-id as always."""
    del flora.headers["authorization"]
    headers = {} if header is None else {"authorization": header}
    for path in ("/techniques", "/technique-runs", "/runs/run_1", "/generations"):
        answer = await flora.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
        assert answer.headers["request-id"].startswith("req_")


async def test_a_workspace_sees_its_own_runs_only(make_flora: MakeFlora) -> None:
    """With several workspaces, a key reads the runs that were started with it and no others."""
    other = SimulatedWorkspace(workspace_id="ws_2", api_key="sk_2", webhook_secret="whsec_2")
    flora = make_flora(more_workspaces=(other,))
    run_id = (await flora.start()).json()["run_id"]
    flora.headers["authorization"] = "Bearer sk_2"
    assert (await flora.get(f"/runs/{run_id}")).status_code == 404
    assert (await flora.get("/technique-runs")).json()["technique_runs"] == []
    await flora.start()
    (item,) = (await flora.get("/technique-runs")).json()["technique_runs"]
    assert item["workspace_id"] == "ws_2"


async def test_a_start_beyond_the_credits_is_refused(make_flora: MakeFlora) -> None:
    """Starts are refused with 402 once what remains does not cover the cost."""
    flora = make_flora(credits=0.6, failures=0)
    statuses = [(await flora.start()).status_code for _ in range(3)]
    assert [status < 300 for status in statuses] == [True, True, False]
    assert statuses[2] == 402


@pytest.mark.parametrize("form", ["body", "header", "both"])
async def test_a_used_key_gives_the_original_answer(
    flora: Flora, clock: HandClock, form: str
) -> None:
    """The same key and body start one run and answer twice the same, for 24 hours."""

    async def start(value: str = "tools") -> tuple[int, bytes, bool]:
        content: dict[str, object] = {"mode": "async", "inputs": [PROMPT | {"value": value}]}
        content |= {"idempotency_key": "k"} if form != "header" else {}
        headers = {"Idempotency-Key": "k"} if form != "body" else {}
        answer = await flora.post("/techniques/icon-pack/runs", json=content, headers=headers)
        replayed = answer.headers.get("idempotent-replayed") == "true"
        return answer.status_code, answer.content, replayed

    status, body, replayed = await start()
    assert not replayed
    clock.move(24 * 3600 - 1)
    assert await start() == (status, body, True)
    assert (await start("another"))[0] == 422
    assert len(flora.world.runs) == 1
    clock.move(2)
    assert not (await start())[2]
    assert len(flora.world.runs) == 2


async def test_a_used_key_may_be_a_conflict(make_flora: MakeFlora, clock: HandClock) -> None:
    """In the mode `conflict` a second use is 409 for two hours and starts nothing."""
    flora = make_flora(idempotency="conflict", failures=0)
    assert (await flora.start(idempotency_key="k")).is_success
    clock.move(2 * 3600 - 1)
    again = await flora.start(idempotency_key="k")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "idempotency_duplicate")
    assert len(flora.world.runs) == 1
    clock.move(2)
    assert (await flora.start(idempotency_key="k")).is_success


async def test_a_refused_start_leaves_its_key_unused(flora: Flora) -> None:
    """A key that came with bad input may be used again."""
    assert (await flora.start(idempotency_key="k", inputs=[])).status_code == 400
    assert (await flora.start(idempotency_key="k")).is_success


async def _private(host: str, port: int) -> list[Address]:
    return [ip_address("93.184.215.14"), ip_address("10.0.0.1")]


async def _public(host: str, port: int) -> list[Address]:
    return [ip_address("93.184.215.14")]


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/flora",
        "https://93.184.215.14/flora",
        "http://127.0.0.1:8000/callbacks/flora",
        "http://localhost:8000/",
        "http://[::1]:8000/",
        "https://127.0.0.1/",
    ],
)
async def test_a_callback_may_go_to_public_https_or_loopback(url: str) -> None:
    """Public https addresses are accepted, and this machine under either scheme."""
    assert await refusal(url, _public) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/flora",
        "http://10.0.0.1/",
        "https://10.0.0.1/",
        "https://192.168.1.1/",
        "https://169.254.169.254/latest",
        "https://[fd00::1]/",
        "https://intranet/",
        "https://db.internal/",
        "https://printer.local/",
        "https://rebound.example.com/",
        "ftp://hooks.example.com/",
        "https:///path",
        "https://hooks.example.com:port/",
        "https://[::1/",
        "https://bücher.example/",
        "callbacks/flora",
        "",
    ],
)
async def test_any_other_callback_address_is_refused(url: str) -> None:
    """Plain http, private and internal hosts, names that resolve to them, and invalid URLs."""
    assert await refusal(url, _private)
