"""`/api/runs`: what is listed, shown and taken over, and what is refused."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.store.making import NOW, seen
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve, Site
from tests.web.serving import chunk, post, wire
from tracker.core.run import RunError, RunStatus
from tracker.store.queries import techniques
from tracker.store.queries.techniques import TechniqueRow
from tracker.web.http import Limits

WORKSPACES = [
    {"id": "ws_a", "api_key": "sk_test_a", "webhook_secrets": "whsec_a"},
    {"id": "ws_b", "api_key": "sk_test_b", "webhook_secrets": "whsec_b"},
]


async def _track(site: Site, run_id: str, **more: Any) -> Any:
    return await site.client.post("/api/runs/track", json={"run_id": run_id} | more)


async def _ids(site: Site, query: str = "") -> list[str]:
    answer = await site.client.get(f"/api/runs{query}")
    assert answer.status_code == 200
    return [run["run_id"] for run in answer.json()["runs"]]


def _refused_fields(answer: httpx.Response) -> list[str]:
    """The fields that a 400 names, in their order; each message is a predicate in plain words."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "input_validation_error")
    for fault in error["fields"]:
        assert fault["message"].startswith(("must", "is ", "unknown", "tag", "'")), fault
        assert not {"instance", "validation", "dictionary"} & {*fault["message"].split()}, fault
    return [fault["field"] for fault in error["fields"]]


async def test_a_run_is_taken_over_once(site: Site) -> None:
    """201 with the run, due at once; 200 from then on."""
    first = await _track(site, "run_1", technique_id="tech_1")
    assert first.status_code == 201
    run = first.json()
    assert (run["run_id"], run["source"], run["tracking"]) == ("run_1", "track", "active")
    assert run["technique_id"] == "tech_1"
    assert run["next_check_at"] <= run["first_seen_at"]
    second = await _track(site, "run_1")
    assert (second.status_code, second.json()["technique_id"]) == (200, "tech_1")


async def test_floras_whole_answer_is_taken_and_its_state_is_not_believed(site: Site) -> None:
    """What the caller says of the run's state is no observation of it."""
    answer = await _track(
        site,
        "run_1",
        status="completed",
        progress=100,
        created_at=1_750_000_000_000,
        charged_cost=0.5,
        outputs=[{"output_id": "a", "type": "text", "url": "text"}],
        poll_url="https://app.flora.ai/api/v1/techniques/tech_1/runs/run_1",
        something_new={"nested": [1]},
    )
    assert answer.status_code == 201
    run = answer.json()
    assert (run["status"], run["progress"], run["outputs"]) == ("pending", 0, [])
    assert run["charged_cost"] is None
    assert run["poll_url"] == "https://app.flora.ai/api/v1/techniques/tech_1/runs/run_1"


async def test_the_technique_of_floras_other_starts_is_taken(site: Site) -> None:
    """They show it as an object; one that is none is ignored, as all fields that nobody knows."""
    shown = {"technique_id": "tech_2", "name": "Two"}
    for number, (fields, technique_id) in enumerate(
        [
            ({"technique": shown}, "tech_2"),
            ({"technique": shown, "technique_id": "tech_1"}, "tech_1"),
            ({"technique": {"technique_id": 5}}, None),
            ({"technique": "Two"}, None),
        ]
    ):
        answer = await _track(site, f"run_{number}", **fields)
        assert (answer.status_code, answer.json()["technique_id"]) == (201, technique_id)


async def test_runs_are_listed_newest_first_page_by_page(site: Site) -> None:
    """Pages neither repeat nor skip a run, and the last one has no cursor."""
    for number in range(7):
        await _track(site, f"run_{number}")
    seen: list[str] = []
    query = "?limit=3"
    for _ in range(3):
        answer = (await site.client.get(f"/api/runs{query}")).json()
        seen += [run["run_id"] for run in answer["runs"]]
        query = f"?limit=3&cursor={answer['meta']['next_cursor']}"
    assert seen == [f"run_{number}" for number in reversed(range(7))]
    assert answer["meta"] == {"next_cursor": None}


async def test_a_list_is_filtered(site: Site) -> None:
    """By status, technique (its id or slug), workspace and tracking, alone and together; nothing is
    no filter."""
    await _track(site, "run_1", technique_id="tech_1", workspace_id="ws_1")
    await _track(site, "run_2", technique_id="tech_2", workspace_id="ws_1")
    body = event("run_3")
    await site.client.post(PATH, content=body, headers=signed(body))
    await site.services.applier.drain()
    assert await _ids(site, "?status=completed") == ["run_3"]
    assert await _ids(site, "?technique_id=tech_1") == ["run_1"]
    row = TechniqueRow(technique_id="tech_2", name="Two", slug="icon-pack")
    await techniques.define(site.services.database, row, NOW)
    assert await _ids(site, "?technique_id=icon-pack") == ["run_2"]
    assert await _ids(site, "?technique_id=another") == []
    page = (await site.client.get("/runs?technique=icon-pack")).text
    assert "/runs/run_2" in page
    assert "/runs/run_1" not in page
    assert await _ids(site, "?workspace_id=ws_1&status=pending") == ["run_2", "run_1"]
    assert await _ids(site, "?tracking=settled") == []
    every = "?status=&technique_id=&workspace_id=&project_id=&tag=&tracking=&cursor=&limit="
    assert len(await _ids(site, every)) == 3


async def test_the_timeline_shows_what_was_seen(site: Site) -> None:
    """Oldest first: who said what, and when."""
    await _track(site, "run_1")
    body = event("run_1", status="failed")
    await site.client.post(PATH, content=body, headers=signed(body))
    await site.services.applier.drain()
    events = (await site.client.get("/api/runs/run_1/events")).json()["events"]
    assert [(one["source"], one["status"]) for one in events] == [
        ("track", "pending"),
        ("callback", "failed"),
    ]
    assert all(one["at"].endswith("Z") and one["run_id"] == "run_1" for one in events)
    assert events[1]["detail"]["source"] == "callback"
    assert [one["detail"]["at"] for one in events] == [one["at"] for one in events]


async def test_an_unknown_run_is_not_found(site: Site) -> None:
    """Whatever stands in its place in the path."""
    for run_id in ("run_1", "run%00", "r" * 300, "%ff", "..", "run_1%2Fevents"):
        for path in (f"/api/runs/{run_id}", f"/api/runs/{run_id}/events"):
            answer = await site.client.get(path)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "not_found"


WRONG_QUERIES = [
    ("?status=done", "status"),
    ("?tracking=gone", "tracking"),
    ("?limit=0", "limit"),
    ("?limit=101", "limit"),
    ("?limit=many", "limit"),
    ("?cursor=of-another-service", "cursor"),
    ("?technique_id=%00", "technique_id"),
    (f"?workspace_id={'w' * 300}", "workspace_id"),
]


async def test_a_wrong_query_is_refused_by_field(small_site: Site) -> None:
    """400 that names what is wrong, never a list of everything."""
    for query, field in WRONG_QUERIES:
        answer = await small_site.client.get(f"/api/runs{query}")
        assert _refused_fields(answer) == [field], query


INPUT = {"id": "a", "type": "text", "value": "v"}
WRONG_STARTS: list[tuple[Any, list[str]]] = [
    ({}, ["technique", "inputs"]),
    ({"technique": "", "inputs": []}, ["technique", "inputs"]),
    ({"technique": 5, "inputs": {}}, ["technique", "inputs"]),
    ({"technique": "t", "inputs": [{"id": "a", "type": "text"}]}, ["inputs.0.value"]),
    ({"technique": "t", "inputs": [INPUT, INPUT | {"value": 5}]}, ["inputs.1.value"]),
    ({"technique": "t", "inputs": [INPUT], "idempotencyKey": "k"}, ["idempotencyKey"]),
    ({"technique": "t", "inputs": [INPUT], "idempotency_key": "schlüssel"}, ["idempotency_key"]),
    ([], ["body"]),
    ("text", ["body"]),
]


async def test_a_wrong_start_is_refused_by_field(small_site: Site) -> None:
    """Nothing leaves for FLORA before the whole request makes sense."""
    for body, fields in WRONG_STARTS:
        answer = await small_site.client.post("/api/runs", json=body)
        assert _refused_fields(answer) == fields, body


WRONG_TRACKS: list[tuple[Any, str]] = [
    ({}, "run_id"),
    ({"run_id": ""}, "run_id"),
    ({"run_id": "r" * 256}, "run_id"),
    ({"run_id": "a\0b"}, "run_id"),
    ({"run_id": 5}, "run_id"),
    ({"run_id": "run_1", "workspace_id": 5}, "workspace_id"),
]


async def test_a_wrong_track_is_refused_by_field(small_site: Site) -> None:
    """Only ids are needed, but those have to be ids."""
    for body, field in WRONG_TRACKS:
        answer = await small_site.client.post("/api/runs/track", json=body)
        assert _refused_fields(answer) == [field], body


async def test_what_is_not_json_is_refused(small_site: Site) -> None:
    """400 `invalid_json`, as FLORA says it."""
    for body in (b"", b"{", b"\xff", b"[" * 5000, b'{"run_id": "\\ud800"}', b"{'run_id': 1}"):
        for path in ("/api/runs", "/api/runs/track"):
            answer = await small_site.client.post(path, content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.alone
async def test_a_body_is_bounded(serve: Serve, sqlite_url: str) -> None:
    """413 beyond a mebibyte, 408 where it does not come."""
    async with serve(sqlite_url, limits=Limits(api_read_seconds=0.1)) as site:
        large = b'{"run_id": "' + b"r" * 1024 * 1024 + b'"}'
        answer = await site.client.post("/api/runs/track", content=large)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
        async with wire(site.base_url) as connection:
            head = post("/api/runs", b"", "Transfer-Encoding: chunked")
            await connection.send(head, chunk(b"{"))
            assert (await connection.answer()).status == 408
            assert await connection.hung_up()


@pytest.mark.alone
async def test_a_refused_post_with_a_body_does_not_spoil_the_connection(small_site: Site) -> None:
    """What was not read is not taken for the next request."""
    inner = post("/api/runs/track", b'{"run_id":"run_1"}')
    async with wire(small_site.base_url) as connection:
        await connection.send(post("/api/nothing", inner))
        answer = await connection.answer()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert await connection.hung_up()
    assert await _ids(small_site) == []


async def test_several_workspaces_have_to_be_named(serve: Serve, sqlite_url: str) -> None:
    """400 with the field where none is named or none is known by that name."""
    async with serve(sqlite_url, flora_webhook_secret=(), workspaces=WORKSPACES) as site:
        start = {"technique": "tech_1", "inputs": [{"id": "a", "type": "text", "value": "v"}]}
        for path, body in (("/api/runs", start), ("/api/runs/track", {"run_id": "run_1"})):
            for more in ({}, {"workspace_id": "ws_of_somebody_else"}):
                answer = await site.client.post(path, json=body | more)
                assert answer.status_code == 400
                fields = answer.json()["error"]["fields"]
                assert [fault["field"] for fault in fields] == ["workspace_id"]
        named = await _track(site, "run_1", workspace_id="ws_b")
        assert (named.status_code, named.json()["workspace_id"]) == (201, "ws_b")


async def test_runs_taken_over_at_the_same_moment_are_one(site: Site) -> None:
    """One of the callers is told that it is new, the others that it was known."""
    answers = await asyncio.gather(*(_track(site, "run_1") for _ in range(10)))
    assert sorted(answer.status_code for answer in answers) == [200] * 9 + [201]
    assert await _ids(site) == ["run_1"]


async def test_failed_runs_are_filtered_by_what_to_do(site: Site) -> None:
    """`retry_advice` stands in each run, and narrows the list; an unknown one is refused."""
    for number, code in enumerate(("model_timeout", "GENERATION_NO_RESULT", "MODEL_TIMEOUT")):
        await site.services.writer.submit(
            seen(f"run_{number}", RunStatus.FAILED, facts={"error": RunError(code, "words")})
        )
    await site.services.writer.submit(seen("run_9", RunStatus.COMPLETED))
    listed = await site.client.get("/api/runs", params={"retry_advice": "retry_now"})
    assert {run["run_id"] for run in listed.json()["runs"]} == {"run_0", "run_2"}
    assert {run["retry_advice"] for run in listed.json()["runs"]} == {"retry_now"}
    done = await site.client.get("/api/runs/run_9")
    assert done.json()["retry_advice"] is None
    wrong = await site.client.get("/api/runs", params={"retry_advice": "perhaps"})
    assert (wrong.status_code, wrong.json()["error"]["fields"][0]["field"]) == (400, "retry_advice")
    shown = await site.client.get("/runs", params={"advice": "retry_later"})
    assert "run_1" in shown.text
    assert "run_0" not in shown.text
    page = await site.client.get("/runs/run_0")
    assert "A temporary fault at FLORA: start the run again." in page.text
