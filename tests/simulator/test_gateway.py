"""A gateway in front of FLORA, refused routes, statuses and techniques that change."""

from collections import Counter

import pytest

from tests.simulator.conftest import Flora, ServeFlora, SlowStarts
from tests.support.clocks import HandClock
from tests.support.waiting import assert_takes_less
from tracker.simulator import Options, SimulatedWorkspace, running
from tracker.simulator.faults import GatewayFault

KEY = {"idempotency_key": "k"}
PATHS = {"starts": "/techniques", "reads": "/runs/run_1", "pages": "/technique-runs"}


async def test_a_gateway_answers_while_the_start_is_executed(serve_flora: ServeFlora) -> None:
    """The answer is HTML without FLORA's headers, and the run exists under its key."""
    flora = await serve_flora(gateway=1)
    answer = await flora.start(**KEY)
    assert answer.status_code in (502, 503, 504)
    assert answer.headers["content-type"].startswith("text/html")
    assert f"<h1>{answer.status_code} " in answer.text
    assert "request-id" not in answer.headers
    assert len(flora.world.runs) == 1
    await flora.set(gateway=0)
    assert (await flora.start(**KEY)).json()["run_id"] in flora.world.runs


async def test_a_gateway_gives_up_before_a_slow_start_does(
    serve_flora: ServeFlora, slow_starts: SlowStarts
) -> None:
    """The gateway answers after `gateway_seconds`, and the run starts later."""
    flora = await serve_flora(
        gateway_starts=1, gateway_seconds=2, slow_starts=1, slow_run="last", speed=100
    )
    flora.world.sleep = slow_starts.sleep
    assert (await flora.start()).status_code >= 502
    assert not flora.world.runs
    slow_starts.release()
    await flora.quiet()
    assert len(flora.world.runs) == 1


async def test_a_gateway_may_forward_nothing(serve_flora: ServeFlora) -> None:
    """Nothing runs where no request reaches FLORA."""
    flora = await serve_flora(gateway=1, gateway_works=0)
    assert (await flora.start()).status_code >= 502
    await flora.quiet()
    assert not flora.world.runs


@pytest.mark.parametrize("kind", ["starts", "reads", "pages"])
async def test_a_gateway_answers_one_kind_of_request(serve_flora: ServeFlora, kind: str) -> None:
    """Starts, single reads and lists each have a rate of their own."""
    flora = await serve_flora(gateway_answers=["404"], **{f"gateway_{kind}": 1})
    run_id = flora.world.start(flora.world.sample_request("icon-pack")).run_id
    answers = {
        "starts": await flora.start(),
        "reads": await flora.get(f"/techniques/icon-pack/runs/{run_id}"),
        "pages": await flora.get("/technique-runs"),
    }
    assert [name for name, answer in answers.items() if answer.status_code == 404] == [kind]


@pytest.mark.parametrize(("answer", "body"), [("empty", ""), ("page", "<html>")])
async def test_a_gateway_may_answer_200(serve_flora: ServeFlora, answer: str, body: str) -> None:
    """A 200 without a body, or with a page that is not FLORA's."""
    flora = await serve_flora(gateway_pages=1, gateway_answers=[answer])
    page = await flora.get("/technique-runs")
    assert page.status_code == 200
    assert page.text[:6] == body


async def test_a_gateway_requires_no_key(serve_flora: ServeFlora) -> None:
    """It answers before FLORA checks the key."""
    flora = await serve_flora(gateway=1)
    assert (await flora.get("/workspaces", headers={"authorization": ""})).status_code >= 502


def test_a_gateway_answers_at_its_rate_and_repeatably() -> None:
    """About the configured share of requests, the same ones for the same seed."""
    options = Options(gateway_starts=0.3)
    struck = [GatewayFault(options, "runs.start", number).strikes for number in range(1000)]
    assert 240 <= sum(struck) <= 360
    assert struck == [GatewayFault(options, "runs.start", n).strikes for n in range(1000)]
    assert not any(GatewayFault(options, "runs.get", number).strikes for number in range(100))


async def test_options_change_for_a_time(serve_flora: ServeFlora, clock: HandClock) -> None:
    """A change may start later and last for a time, by the simulator's clock."""
    flora = await serve_flora()
    await flora.set(after=60, seconds=30, gateway=1, gateway_answers="404")
    seen = []
    for _ in range(5):
        seen.append((await flora.get("/technique-runs")).status_code)
        clock.move(25)
    assert seen == [200, 200, 200, 404, 200]
    assert flora.world.options.gateway_answers == ("502", "503", "504")


async def test_planned_options_change_at_their_time(
    serve_flora: ServeFlora, clock: HandClock
) -> None:
    """A change may be planned: here the key is replaced, and the old one refused."""
    flora = await serve_flora()
    flora.world.change({"api_key": "sk_new"}, after=60)
    run_id = (await flora.start()).json()["run_id"]
    clock.move(60)
    assert (await flora.get("/workspaces")).json()["error"]["code"] == "invalid_api_key"
    flora.headers["authorization"] = "Bearer sk_new"
    assert (await flora.path(f"/runs/{run_id}"))["run_id"] == run_id
    assert [run["run_id"] for run in (await flora.path("/technique-runs"))["technique_runs"]]
    assert "api_key" not in await flora.path("/simulator/faults")


async def test_workspaces_of_a_key(serve_flora: ServeFlora) -> None:
    """`GET /workspaces` names the one workspace of a key; a key may come to belong to another."""
    other = SimulatedWorkspace(workspace_id="ws_2", api_key="sk_2", webhook_secret="whsec_2")
    flora = await serve_flora(more_workspaces=(other,))

    async def shown(key: str) -> list[str]:
        headers = {"authorization": f"Bearer {key}"}
        answer = (await flora.get("/workspaces", headers=headers)).json()
        assert answer["meta"] == {"next_cursor": None}
        assert all(one["name"] for one in answer["workspaces"])
        return [one["workspace_id"] for one in answer["workspaces"]]

    assert await shown("sk_test_simulator") == ["ws_simulator"]
    assert await shown("sk_2") == ["ws_2"]
    run_id = (await flora.start()).json()["run_id"]
    await flora.set(workspace_id="ws_3")
    assert await shown("sk_test_simulator") == ["ws_3"]
    assert (await flora.get(f"/runs/{run_id}")).status_code == 404


@pytest.mark.parametrize(
    ("route", "path", "code", "status"),
    [
        ("generations.list", "/generations", "not_found", 404),
        ("generations.list", "/generations", "forbidden", 403),
        ("filtered", "/technique-runs?technique_id=tech_icon-pack", "not_found", 404),
        ("filtered", "/technique-runs?technique_id=tech_icon-pack", "forbidden", 403),
        ("workspaces.list", "/workspaces", "not_found", 404),
    ],
)
async def test_a_route_is_refused(
    serve_flora: ServeFlora, route: str, path: str, code: str, status: int
) -> None:
    """That route answers the error in FLORA's shape, and every other one works."""
    flora = await serve_flora(refuse={route: code})
    answer = await flora.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert (await flora.get("/technique-runs")).status_code == 200


@pytest.mark.parametrize(
    ("code", "status"), [("paid_plan_required", 403), ("insufficient_credits", 402)]
)
async def test_starts_are_refused(serve_flora: ServeFlora, code: str, status: int) -> None:
    """About the configured share of starts is refused, without a run."""
    flora = await serve_flora(refuse={"runs.start": code}, refusals=0.5)
    statuses = Counter([(await flora.start()).status_code for _ in range(40)])
    assert 8 <= statuses[status] <= 32
    assert len(flora.world.runs) == 40 - statuses[status]


async def test_errors_may_have_details(serve_flora: ServeFlora) -> None:
    """Each field then has a code, and its valid values where these are few."""
    flora = await serve_flora(field_details=True)
    fields = (await flora.start(mode="later", inputs=[])).json()["error"]["fields"]
    assert [field["code"] for field in fields] == ["invalid", "invalid_value"]
    assert fields[1]["valid_values"] == ["async", "stream"]


async def test_a_status_may_be_new(serve_flora: ServeFlora, clock: HandClock) -> None:
    """A run shows an undocumented status from its start on, and ends with another one."""
    flora = await serve_flora(queued=1, cancelled=1, cancelled_name="aborted")
    started = (await flora.start(callback_url="http://127.0.0.1:1/")).json()
    assert started["status"] == "queued"
    clock.move(8)
    path = f"/techniques/icon-pack/runs/{started['run_id']}"
    running = await flora.path(path)
    assert running["status"] == "queued"
    assert running["started_at"]
    clock.move(30)
    end = await flora.path(path)
    assert (end["status"], end["charged_cost"]) == ("aborted", 0)
    assert end["completed_at"]
    assert not {"outputs", "error_code"} & end.keys()
    listed = await flora.path("/technique-runs", status="aborted")
    assert len(listed["technique_runs"]) == 1
    await flora.quiet()
    assert flora.world.deliveries == []


async def test_prices_rise(serve_flora: ServeFlora, clock: HandClock) -> None:
    """After the change the catalogue shows new prices, and runs have these costs."""
    flora = await serve_flora()
    await flora.set(prices={"icon-pack": 20}, price_factor=2)
    listed = (await flora.path("/techniques", limit=100))["techniques"]
    prices = {item["technique_id"]: item["run_cost"] for item in listed}
    assert (prices["tech_icon-pack"], prices["tech_cctv-cam"]) == (20, 0.3)
    assert (await flora.path("/techniques/icon-pack"))["run_cost"] == 20
    run_id = (await flora.start()).json()["run_id"]
    clock.move(30)
    assert (await flora.path(f"/techniques/icon-pack/runs/{run_id}"))["charged_cost"] == 20


async def test_a_technique_gains_an_input(serve_flora: ServeFlora) -> None:
    """Its definition shows the new input, and starts may have it."""
    flora = await serve_flora()
    style = {"id": "style", "type": "text", "value": "flat"}
    prompt = {"id": "prompt", "type": "text", "value": "tools"}
    assert (await flora.start(inputs=[prompt, style])).status_code == 400
    await flora.set(new_inputs={"icon-pack": "style:text?"})
    shown = (await flora.path("/techniques/icon-pack"))["inputs"][-1]
    assert (shown["id"], shown["type"], shown["optional"]) == ("style", "text", True)
    assert (await flora.start(inputs=[prompt, style])).is_success
    assert (await flora.start()).is_success


async def test_each_value_may_make_a_run(serve_flora: ServeFlora) -> None:
    """Each value of an input starts a run; the answer is the first of them."""
    flora = await serve_flora(run_per_value=True)
    link = {"type": "imageUrl", "value": "https://example.com/1.png"}
    other = link | {"value": "https://example.com/2.png"}
    inputs = [link | {"id": "asset"}, other | {"id": "asset"}, link | {"id": "texture"}]
    answer = await flora.start("texture-matchers", inputs=inputs, **KEY)
    runs = list(flora.world.runs.values())
    assert answer.json()["run_id"] == runs[0].run_id
    assert [[item["id"] for item in run.inputs] for run in runs] == [["asset", "texture"]] * 2
    assert [run.inputs[0]["value"][-5:] for run in runs] == ["1.png", "2.png"]
    again = await flora.start("texture-matchers", inputs=inputs, **KEY)
    assert again.json()["run_id"] == runs[0].run_id
    assert len(flora.world.runs) == 2


async def test_an_unreachable_value_fails_its_own_run_only(serve_flora: ServeFlora) -> None:
    """Where each value makes a run, one with a link under `.invalid` does not fail the others."""
    flora = await serve_flora(run_per_value=True)
    hosts = {"asset": ("photos.invalid", "example.com"), "texture": ("example.com",)}
    inputs = [
        {"id": name, "type": "imageUrl", "value": f"https://{host}/1.png"}
        for name in hosts
        for host in hosts[name]
    ]
    await flora.start("texture-matchers", inputs=inputs)
    assert [run.error_code for run in flora.world.runs.values()] == ["input_unreachable", None]


async def test_a_gateway_closes_with_the_simulator() -> None:
    """Requests that it has forwarded do not delay the end of the simulator."""
    options = Options(gateway=1, gateway_seconds=0.01, slow_starts=1)
    headers = {"Authorization": f"Bearer {options.api_key}"}

    async def started_and_closed() -> None:
        async with (
            running(options) as simulator,
            Flora(base_url=simulator.base_url, headers=headers) as flora,
        ):
            assert (await flora.start()).status_code >= 502

    await assert_takes_less(5, started_and_closed)
