"""Runs that progress with the clock and end, and the history that lists them."""

import pytest

from tests.simulator.conftest import Flora, MakeFlora
from tests.support.clocks import HandClock


async def test_a_run_goes_from_pending_to_completed(flora: Flora, clock: HandClock) -> None:
    """As the clock moves a run is pending, running and completed, and then has all its details."""
    started = (await flora.start()).json()
    assert (started["status"], started["progress"]) == ("pending", 0)
    path = f"/techniques/icon-pack/runs/{started['run_id']}"
    seen = []
    for _ in range(31):
        seen.append((await flora.get(path)).json())
        clock.move(1)
    statuses = [shown["status"] for shown in seen]
    assert list(dict.fromkeys(statuses)) == ["pending", "running", "completed"]
    progress = [shown["progress"] for shown in seen]
    assert progress == sorted(progress)
    assert 0 < progress[statuses.index("running") + 1] < 100
    end = seen[-1]
    assert end["progress"] == 100
    assert end["charged_cost"] == 0.25
    assert end["created_at"] < end["started_at"] < end["completed_at"]
    assert end["completed_at"] - end["created_at"] == pytest.approx(20_000, abs=10_000)
    assert [output["type"] for output in end["outputs"]] == ["imageUrl"] * 4
    assert (
        end["poll_url"]
        == f"http://127.0.0.1:8750/api/v1/techniques/tech_icon-pack/runs/{end['run_id']}"
    )


async def test_a_failed_run_costs_nothing(make_flora: MakeFlora, clock: HandClock) -> None:
    """Failed runs carry one of FLORA's codes, cost 0 and have no outputs."""
    flora = make_flora(failures=1)
    runs = [(await flora.start()).json()["run_id"] for _ in range(40)]
    clock.move(30)
    ends = [(await flora.get(f"/runs/{run_id}")).json() for run_id in runs]
    assert {end["status"] for end in ends} == {"failed"}
    assert {end["charged_cost"] for end in ends} == {0}
    assert not any("outputs" in end for end in ends)
    assert {end["error_code"] for end in ends} == {
        "model_timeout",
        "safety_blocked",
        "input_unreachable",
        "internal_error",
        "provider_error",
    }
    assert any("error_message" not in end for end in ends)
    assert any("<b>" in end.get("error_message", "") for end in ends)
    unreachable = [end for end in ends if end["error_code"] == "input_unreachable"]
    assert all("started_at" not in end for end in unreachable)


async def test_runs_fail_at_their_rate(make_flora: MakeFlora) -> None:
    """About the configured share of runs fails."""
    flora = make_flora()
    for _ in range(400):
        flora.world.start(flora.world.sample_request("icon-pack"))
    failed = sum(record["end"]["status"] == "failed" for record in flora.world.records())
    assert 35 <= failed <= 85


async def test_a_text_output_holds_the_text(flora: Flora, clock: HandClock) -> None:
    """A text output's `url` is the text; the others link to the simulator."""
    question = [{"id": "question", "type": "text", "value": "Will it rain?"}]
    run_id = (await flora.start("tarot-pull", inputs=question)).json()["run_id"]
    clock.move(30)
    card, reading = (await flora.get(f"/runs/{run_id}")).json()["outputs"]
    assert card["url"] == f"http://127.0.0.1:8750/media/{card['output_id']}.png"
    assert reading["url"] == "Tarot Pull: reading\n“Made by the simulator” ✓"


async def test_an_unreachable_input_fails_the_run(flora: Flora, clock: HandClock) -> None:
    """A link to a host under `.invalid` fails its run, after a start that was answered as usual."""
    photo = [{"id": "photo", "type": "imageUrl", "value": "https://photos.invalid/1.png"}]
    started = await flora.start("wireframe", inputs=photo)
    assert started.is_success
    clock.move(30)
    end = (await flora.get(f"/runs/{started.json()['run_id']}")).json()
    assert (end["status"], end["error_code"]) == ("failed", "input_unreachable")


async def test_the_same_seed_makes_the_same_world(make_flora: MakeFlora) -> None:
    """A seed determines identifiers, ends and durations; another seed makes others."""
    records = []
    for seed in (7, 7, 8):
        flora = make_flora(seed=seed, drop=0.4, duplicate=0.3, bad_signature=0.2)
        for _ in range(20):
            await flora.start(callback_url="http://127.0.0.1:1/never")
        records.append(flora.world.records())
    first, again, other = records
    assert first == again
    assert not {run["run_id"] for run in first} & {run["run_id"] for run in other}
    assert [run["end"]["status"] for run in first] != [run["end"]["status"] for run in other]


async def test_speed_divides_durations(make_flora: MakeFlora) -> None:
    """Ten times the speed makes a tenth of the duration."""
    durations = []
    for speed in (1, 10):
        flora = make_flora(speed=speed, failures=0)
        end = (await flora.start()) and flora.world.records()[0]["end"]
        durations.append(end["completed_at"] - end["created_at"])
    assert durations[0] == pytest.approx(10 * durations[1], abs=20)


async def test_times_may_be_seconds(make_flora: MakeFlora, clock: HandClock) -> None:
    """With the unit `s` the API shows seconds; the records stay in milliseconds."""
    flora = make_flora(time_unit="s", failures=0)
    run_id = (await flora.start()).json()["run_id"]
    clock.move(30)
    shown = (await flora.get(f"/runs/{run_id}")).json()
    end = flora.world.records()[0]["end"]
    for name in ("created_at", "started_at", "completed_at"):
        assert shown[name] * 1000 == pytest.approx(end[name])
    assert end["created_at"] == clock().timestamp() * 1000 - 30_000


async def test_a_run_is_found_only_under_its_technique(flora: Flora) -> None:
    """A run of another technique is 404; `/runs/{id}` shows any."""
    run_id = (await flora.start()).json()["run_id"]
    assert (await flora.get(f"/techniques/mugshot/runs/{run_id}")).status_code == 404
    assert (await flora.get(f"/techniques/tech_icon-pack/runs/{run_id}")).status_code == 200
    assert (await flora.get(f"/runs/{run_id}")).status_code == 200
    assert (await flora.get("/runs/run_nobody")).status_code == 404


async def test_the_history_is_newest_first_and_paged(flora: Flora, clock: HandClock) -> None:
    """Pages of the history give every run once, newest first, 20 a page where no limit is given."""
    started = []
    for _ in range(45):
        started.append((await flora.start()).json()["run_id"])
        clock.move(0.1)
    listed, query, sizes = [], {}, []
    while True:
        page = (await flora.get("/technique-runs", params=query)).json()
        listed += [item["run_id"] for item in page["technique_runs"]]
        sizes.append(len(page["technique_runs"]))
        if page["meta"]["next_cursor"] is None:
            break
        query = {"cursor": page["meta"]["next_cursor"]}
    assert sizes == [20, 20, 5]
    assert listed == started[::-1]
    assert page["meta"]["total_estimate"] == 45


async def test_a_history_item_is_a_run_and_more(flora: Flora, clock: HandClock) -> None:
    """An item of the history has all that a read has, and the workspace and technique."""
    run_id = (await flora.start()).json()["run_id"]
    clock.move(30)
    (item,) = (await flora.get("/technique-runs")).json()["technique_runs"]
    read = (await flora.get(f"/runs/{run_id}")).json()
    assert item == read | {
        "technique_run_id": run_id,
        "workspace_id": "ws_simulator",
        "project_id": "prj_simulator",
        "technique": {"technique_id": "tech_icon-pack", "name": "Icon Pack"},
    }


async def test_the_history_may_leave_details_out(make_flora: MakeFlora, clock: HandClock) -> None:
    """Without `history_outputs` a completed item has no outputs and no cost, but a poll_url."""
    flora = make_flora(history_outputs=False, failures=0.5)
    for _ in range(20):
        await flora.start()
    clock.move(30)
    items = (await flora.get("/technique-runs")).json()["technique_runs"]
    completed = [item for item in items if item["status"] == "completed"]
    failed = [item for item in items if item["status"] == "failed"]
    assert completed
    assert failed
    assert not any("outputs" in item or "charged_cost" in item for item in completed)
    assert all("poll_url" in item for item in completed)
    assert all(item["charged_cost"] == 0 for item in failed)


async def test_the_history_is_filtered(make_flora: MakeFlora, clock: HandClock) -> None:
    """Filters on status, technique, project and workspace select runs."""
    flora = make_flora(failures=0)
    await flora.start()
    clock.move(30)
    photo = [{"id": "photo", "type": "imageUrl", "value": "https://example.com/1.png"}]
    await flora.start("wireframe", inputs=photo)

    async def techniques(**query: str) -> list[str]:
        items = (await flora.get("/technique-runs", params=query)).json()["technique_runs"]
        return [item["technique"]["technique_id"] for item in items]

    assert await techniques(status="completed") == ["tech_icon-pack"]
    assert await techniques(status="pending") == ["tech_wireframe"]
    assert await techniques(technique_id="tech_wireframe") == ["tech_wireframe"]
    assert await techniques(project_id="prj_other") == []
    assert len(await techniques(workspace_id="ws_simulator", project_id="prj_simulator")) == 2
    assert (await flora.get("/technique-runs?workspace_id=ws_other")).status_code == 403
    assert (await flora.get("/technique-runs?status=done")).status_code == 400


async def test_a_generation_is_a_run_of_its_own_kind(flora: Flora, clock: HandClock) -> None:
    """A generation is read at `/runs` and listed at `/generations`, not among technique runs."""
    body = {"prompt": "a mug", "type": "video", "model": "m-1"}
    started = (await flora.post("/generate", json=body)).json()
    assert started["type"] == "generation"
    assert started["model"] == {"model_id": "m-1"}
    clock.move(30)
    read = (await flora.get(f"/runs/{started['run_id']}")).json()
    assert read["status"] == "completed"
    assert read["outputs"][0]["type"] == "videoUrl"
    (item,) = (await flora.get("/generations")).json()["generations"]
    assert item["generation_id"] == started["run_id"]
    assert item["model"] == {"model_id": "m-1"}
    assert (await flora.get("/technique-runs")).json()["technique_runs"] == []


async def test_some_unfinished_runs_show_zeros(flora: Flora) -> None:
    """As in FLORA's examples an unfinished run may show a cost and an end of 0."""
    answers = [(await flora.start()).json() for _ in range(40)]
    zeros = [answer for answer in answers if answer.get("completed_at") == 0]
    assert 0 < len(zeros) < 40
    assert all(answer["charged_cost"] == 0 for answer in zeros)
