"""`POST /api/runs` against a FLORA that spends nothing."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.support.waiting import eventually, free_port, send_once
from tests.web.conftest import Serve, Site
from tests.web.flora import START, with_flora
from tests.web.mounting import PREFIX
from tracker.simulator import Options, running


async def _start(site: Site, key: str | None = None, **more: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await site.client.post("/api/runs", json=START | more, headers=headers)


async def test_a_run_is_started_and_tracked(serve: Serve, database_url: str) -> None:
    """201 with the run that FLORA now has, and it is listed from then on."""
    async with with_flora(serve, database_url) as (site, flora):
        answer = await _start(site)
        assert answer.status_code == 201
        run = answer.json()
        assert list(flora.world.runs) == [run["run_id"]]
        assert (run["source"], run["tracking"]) == ("start", "active")
        assert run["inputs"] == START["inputs"]
        assert run["technique_id"].startswith("tech_")
        assert run["workspace_id"] == flora.world.options.workspace_id
        assert "Idempotent-Replayed" not in answer.headers
        shown = await site.client.get(f"/api/runs/{run['run_id']}")
        assert shown.json() == run


@pytest.mark.parametrize("account", ["replay", "conflict"])
async def test_a_key_starts_one_run_however_often_it_is_sent(
    serve: Serve, database_url: str, account: str
) -> None:
    """In the header, in the body or in both, and at the same moment: 201 once, then 200."""
    async with with_flora(serve, database_url, idempotency=account) as (site, flora):
        answers = await asyncio.gather(
            _start(site, "key-1"),
            _start(site, None, idempotency_key="key-1"),
            _start(site, "key-1", idempotency_key="key-1"),
        )
        answers.append(await _start(site, "key-1"))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]
        assert len({answer.json()["run_id"] for answer in answers}) == 1
        for answer in answers:
            replayed = answer.headers.get("Idempotent-Replayed")
            assert replayed == ("true" if answer.status_code == 200 else None)
        assert len(flora.world.runs) == 1
        assert (await _start(site, "key-2")).status_code == 201


@pytest.mark.parametrize("account", ["replay", "conflict"])
async def test_five_at_the_same_moment_get_one_run(
    serve: Serve, database_url: str, account: str
) -> None:
    """One run and five equal answers, whichever of two processes is asked, and in either form."""
    async with (
        with_flora(serve, database_url, idempotency=account) as (one, flora),
        serve(
            database_url,
            flora_base_url=flora.base_url,
            flora_api_key=flora.world.options.api_key,
            flora_workspace_id=flora.world.options.workspace_id,
        ) as other,
    ):
        answers = await asyncio.gather(
            _start(one, "key-1"),
            _start(other, "key-1"),
            _start(one, None, idempotency_key="key-1"),
            _start(other, None, idempotency_key="key-1"),
            _start(one, "key-1"),
        )
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 201]
        assert [answer.json() for answer in answers] == [answers[0].json()] * 5
        for answer in answers:
            replayed = answer.headers.get("Idempotent-Replayed")
            assert replayed == ("true" if answer.status_code == 200 else None)
        assert list(flora.world.runs) == [answers[0].json()["run_id"]]


async def test_a_body_is_the_same_in_any_order(serve: Serve, database_url: str) -> None:
    """Of its inputs, also at the same moment; FLORA gets one of both."""
    inputs = [
        {"id": "building", "type": "imageUrl", "value": "https://example.com/a.png"},
        {"id": "material", "type": "text", "value": "brick"},
    ]
    async with with_flora(serve, database_url) as (site, flora):
        body = {"technique": "facade-swap", "idempotency_key": "key-1"}
        answers = await asyncio.gather(
            *(_start(site, None, **body, inputs=one) for one in (inputs, inputs[::-1]) * 2)
        )
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]
        assert [answer.json() for answer in answers] == [answers[0].json()] * 4
        assert len(flora.world.runs) == 1


async def test_a_key_is_not_used_for_another_body(serve: Serve, database_url: str) -> None:
    """422, and nothing is started."""
    async with with_flora(serve, database_url) as (site, flora):
        await _start(site, "key-1")
        other = [{"id": "prompt", "type": "text", "value": "flowers"}]
        answer = await _start(site, "key-1", inputs=other)
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "idempotency_conflict"
        assert len(flora.world.runs) == 1


async def test_two_keys_for_one_start_are_refused(serve: Serve, sqlite_url: str) -> None:
    """Which of them was meant cannot be told; a key that no header can carry is refused too."""
    async with with_flora(serve, sqlite_url) as (site, flora):
        answer = await _start(site, "key-1", idempotency_key="key-2")
        assert answer.status_code == 400
        assert [f["field"] for f in answer.json()["error"]["fields"]] == ["idempotency_key"]
        twice = [("Idempotency-Key", "key-1"), ("Idempotency-Key", "key-2")]
        answer = await site.client.post("/api/runs", json=START, headers=twice)
        assert answer.status_code == 400
        long = await _start(site, "k" * 256)
        assert [f["field"] for f in long.json()["error"]["fields"]] == ["Idempotency-Key"]
        assert not flora.world.runs


async def test_what_flora_refuses_comes_through(serve: Serve, sqlite_url: str) -> None:
    """Its 400, 402 and 404, with its code, its words and its fields."""
    async with with_flora(serve, sqlite_url, credits=0.0) as (site, flora):
        unpaid = await _start(site)
        assert (unpaid.status_code, unpaid.json()["error"]["code"]) == (402, "insufficient_credits")
        unknown = await _start(site, technique="no-such-technique")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
        # The id of an element would do as well, so that only FLORA can tell that this is none.
        element = [{"id": "face", "type": "imageUrl", "value": "no element"}]
        wrong = await _start(site, technique="cctv-cam", inputs=element)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "input_validation_error")
        assert wrong.json()["error"]["fields"] == [
            {"field": "inputs[0].value", "message": "must be an http or https link"}
        ]
        assert not flora.world.runs


async def test_what_does_not_fit_the_technique_is_refused_unpaid(
    serve: Serve, sqlite_url: str
) -> None:
    """In FLORA's shape with every field, and the key is free for the corrected request."""
    async with with_flora(serve, sqlite_url) as (site, flora):
        wrong = [
            {"id": "logo", "type": "imageUrl", "value": "http://example.com/a.svg"},
            {"id": "font", "type": "text", "value": "serif"},
        ]
        answer = await _start(site, "key-1", technique="logo-stylist", inputs=wrong)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "input_validation_error")
        assert [fault["field"] for fault in error["fields"]] == [
            "inputs.0.value",
            "inputs.1.id",
            "inputs.style",
        ]
        assert all(set(fault) == {"field", "message"} for fault in error["fields"])
        needs_sound = await _start(site, technique="video-scene-builder")
        assert "FLORA's starts take only" in needs_sound.text
        assert ("runs.start", 400) not in flora.world.counts
        corrected = [
            {"id": "logo", "type": "imageUrl", "value": "https://example.com/a.svg"},
            {"id": "style", "type": "text", "value": "serif"},
        ]
        answer = await _start(site, "key-1", technique="logo-stylist", inputs=corrected)
        assert answer.status_code == 201
        assert len(flora.world.runs) == 1


async def test_without_a_key_for_flora_a_start_says_so(small_site: Site) -> None:
    """503 that names the variable; there is nothing to try again until someone sets it."""
    answer = await _start(small_site)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_configured")
    assert "FLORA_API_KEY" in answer.json()["error"]["message"]


async def test_a_flora_that_cannot_be_reached_is_a_502(serve: Serve, sqlite_url: str) -> None:
    """Nothing was started, and the caller may try again with the same key."""
    nobody = f"http://127.0.0.1:{free_port()}/api/v1"
    async with serve(
        sqlite_url,
        flora_base_url=nobody,
        flora_api_key="sk_test_1",
        flora_workspace_id="ws_1",
    ) as site:
        send_once(site.services)
        answer = await _start(site, technique="tech_1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "flora_unreachable")


@pytest.mark.served_twice
async def test_a_started_run_asks_for_a_callback_where_there_is_an_address(
    serve: Serve, sqlite_url: str, is_mounted: bool
) -> None:
    """FLORA calls back under the public address, with its path, and the callback ends the run."""
    port = free_port()
    async with (
        running(Options(failures=0, run_seconds=0.2)) as flora,
        serve(
            sqlite_url,
            port=port,
            flora_base_url=flora.base_url,
            flora_api_key=flora.world.options.api_key,
            flora_webhook_secret=flora.world.options.webhook_secret,
            tracker_public_url=f"http://127.0.0.1:{port}{PREFIX if is_mounted else ''}",
        ) as site,
    ):
        run = (await _start(site)).json()

        async def ended() -> bool:
            shown = (await site.client.get(f"/api/runs/{run['run_id']}")).json()
            return bool(shown["ended_via"] == "callback" and shown["status"] == "completed")

        await eventually(ended)


@pytest.mark.parametrize("code", ["insufficient_credits", "paid_plan_required"])
async def test_no_credits_and_no_plan_are_reported_as_what_they_are(
    serve: Serve, database_url: str, code: str
) -> None:
    """402 with FLORA's code and words, whichever status FLORA chose; the key stays in use."""
    refuse = {"refuse": {"runs.start": code}}
    async with with_flora(serve, database_url, **refuse) as (site, flora):
        answer = await _start(site)
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, code)
        assert flora.world.runs == {}
        [workspace] = site.services.workspaces
        assert not workspace.require_client().breaker.open
