"""Histories that cannot be read as a whole: bad pages, cursors, deletions, and long ones."""

import base64
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from tests.simulator.conftest import Flora, ServeFlora
from tests.support.clocks import HandClock


async def _read_all(flora: Flora, limit: int = 10) -> list[str]:
    """The identifiers on all pages, in their order."""
    listed: list[str] = []
    query: dict[str, Any] = {"limit": limit}
    while True:
        page = await flora.path("/technique-runs", **query)
        listed += [item["run_id"] for item in page["technique_runs"]]
        query["cursor"] = page["meta"]["next_cursor"]
        if query["cursor"] is None:
            return listed


def _cursor(offset: int) -> str:
    return base64.urlsafe_b64encode(b'{"offset":%d}' % offset).rstrip(b"=").decode()


@pytest.mark.parametrize("of", ["offset", "run"])
async def test_a_page_cannot_be_read(serve_flora: ServeFlora, of: str) -> None:
    """Every page with the bad item is 400; all others can be read."""
    flora = await serve_flora(history=30)
    runs = await _read_all(flora)
    await flora.set(**({"bad_offset": 12} if of == "offset" else {"bad_runs": [runs[12]]}))

    async def status(offset: int, limit: int) -> int:
        query = {"cursor": _cursor(offset), "limit": limit}
        return (await flora.get("/technique-runs", params=query)).status_code

    assert [await status(*page) for page in ((0, 12), (3, 10), (12, 1), (13, 17))] == [
        *(200, 400, 400, 200)
    ]
    assert (await flora.get(f"/runs/{runs[12]}")).status_code == 200


async def test_a_page_is_too_long(serve_flora: ServeFlora) -> None:
    """The page with the bad item is readable, but longer than a client accepts."""
    flora = await serve_flora(history=30, bad_offset=12, bad_bytes=1_000_000)
    first, second = [
        await flora.get("/technique-runs", params={"cursor": _cursor(offset), "limit": 10})
        for offset in (0, 10)
    ]
    assert len(first.content) < 20_000 < 1_000_000 < len(second.content)


async def test_an_item_lacks_fields(serve_flora: ServeFlora) -> None:
    """The fields of the bad item alone are null, and its page is answered."""
    flora = await serve_flora(history=30, bad_offset=12, bad_fields=("run_id", "status"))
    page = await flora.path("/technique-runs", limit=20)
    lacking = [n for n, item in enumerate(page["technique_runs"]) if item["run_id"] is None]
    assert lacking == [12]
    assert page["technique_runs"][12]["status"] is None
    assert page["technique_runs"][12]["technique_run_id"] is not None


@pytest.mark.parametrize(("name", "cursor"), [("number", 20), ("object", {"offset": 20})])
async def test_cursors_of_another_type(serve_flora: ServeFlora, name: str, cursor: object) -> None:
    """The cursor is a number, which leads to the next page as text, or an object."""
    flora = await serve_flora(history=30, cursor_type=name)
    page = await flora.path("/technique-runs", limit=20)
    assert page["meta"]["next_cursor"] == cursor
    if name == "number":
        assert len(await _read_all(flora)) == 30


async def test_deep_pages_cannot_be_read(serve_flora: ServeFlora) -> None:
    """From an offset on, all pages are 400."""
    flora = await serve_flora(history=30, max_offset=20)
    query = {"cursor": _cursor(20)}
    assert (await flora.get("/technique-runs", params=query)).status_code == 400
    query = {"cursor": _cursor(19)}
    assert (await flora.get("/technique-runs", params=query)).status_code == 200


async def test_cursors_may_be_opaque(serve_flora: ServeFlora, clock: HandClock) -> None:
    """They lead through the list, show no offset, and are refused when they are old."""
    flora = await serve_flora(history=30, opaque_cursors=True, cursor_seconds=600)
    listed = await _read_all(flora)
    assert len(listed) == len(set(listed)) == 30
    cursor = (await flora.path("/technique-runs"))["meta"]["next_cursor"]
    assert b"offset" not in base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))

    async def status(cursor: str) -> int:
        return (await flora.get("/technique-runs", params={"cursor": cursor})).status_code

    assert await status(_cursor(10)) == 400
    clock.move(600)
    assert await status(cursor) == 200
    await flora.set(cursor_epoch=1)
    assert await status(cursor) == 400
    cursor = (await flora.path("/technique-runs"))["meta"]["next_cursor"]
    clock.move(601)
    assert await status(cursor) == 400


async def test_runs_are_deleted_while_pages_are_read(serve_flora: ServeFlora) -> None:
    """After each page one of its runs is gone, so that another one slips past the next page."""
    flora = await serve_flora(history=25)
    there = await _read_all(flora)
    await flora.set(deletions=1)
    listed = await _read_all(flora)
    await flora.set(deletions=0)
    left = await _read_all(flora)
    assert len(left) == 25 - len(flora.world.deleted)
    missed = set(left) - set(listed)
    assert missed == {there[10], there[21]}
    gone = next(iter(flora.world.deleted))
    assert (await flora.get(f"/runs/{gone}")).status_code == 404


async def test_runs_are_deleted_on_demand(serve_flora: ServeFlora) -> None:
    """They leave lists and reads, and stay in the simulator's own records."""
    flora = await serve_flora(history=3)
    started = (await flora.start()).json()["run_id"]
    url = f"{flora.world.root}/simulator/deletions"
    there = await _read_all(flora)
    assert (await flora.post(url, json={"run_ids": [started, there[2]]})).is_success
    assert await _read_all(flora) == [there[1], there[3]]
    assert (await flora.get(f"/runs/{started}")).status_code == 404
    (record,) = (await flora.path("/simulator/runs"))["runs"]
    assert (record["run_id"], record["deleted"]) == (started, True)
    assert (await flora.post(url, json={"run_ids": "all"})).status_code == 400


async def test_old_runs_are_removed(serve_flora: ServeFlora, clock: HandClock) -> None:
    """Runs older than the retention are neither listed nor read."""
    flora = await serve_flora(history=10, history_seconds=1000, retention=540)
    oldest = flora.world.preset("technique").run_id(0)
    assert len(await _read_all(flora)) == 5
    assert (await flora.get(f"/runs/{oldest}")).status_code == 404
    started = (await flora.start()).json()["run_id"]
    clock.move(500)
    assert await _read_all(flora) == [started]
    clock.move(50)
    assert await _read_all(flora) == []


async def test_floras_clock_may_be_off(serve_flora: ServeFlora, clock: HandClock) -> None:
    """Its clock as a whole, or the header's alone."""
    flora = await serve_flora(clock_offset=90)
    answer = await flora.start()
    now = clock().timestamp()
    assert answer.json()["created_at"] == (now + 90) * 1000
    assert parsedate_to_datetime(answer.headers["date"]).timestamp() == now + 90
    await flora.set(clock_offset=0, date_offset=-5)
    answer = await flora.start()
    assert answer.json()["created_at"] == now * 1000
    assert parsedate_to_datetime(answer.headers["date"]).timestamp() == now - 5


async def test_a_long_history_costs_little(serve_flora: ServeFlora, clock: HandClock) -> None:
    """A hundred thousand runs are there at once, each the same in the list and alone."""
    flora = await serve_flora(history=100_000, history_generations=3, failures=0.1)
    cursor = _cursor(99_900)
    page = await flora.path("/technique-runs", cursor=cursor, limit=100)
    assert page["meta"] == {"next_cursor": None, "total_estimate": 100_000}
    item = page["technique_runs"][57]
    path = f"/techniques/{item['technique']['technique_id']}/runs/{item['run_id']}"
    assert (await flora.path(path)).items() <= item.items()
    assert {run["status"] for run in page["technique_runs"]} == {"completed", "failed"}
    newest = (await flora.path("/technique-runs"))["technique_runs"]
    created = [run["created_at"] for run in newest]
    assert created == sorted(created, reverse=True)
    assert 0 < clock().timestamp() * 1000 - newest[0]["completed_at"] < 60_000
    age = clock().timestamp() * 1000 - page["technique_runs"][-1]["created_at"]
    assert age == pytest.approx(30 * 86_400_000, rel=0.01)
    generations = (await flora.path("/generations"))["generations"]
    assert len({run["generation_id"] for run in generations}) == 3
    assert flora.world.runs == {}


async def test_a_long_history_is_filtered(serve_flora: ServeFlora) -> None:
    """By technique, status and project, as runs that were started are."""
    flora = await serve_flora(history=400, failures=0.5)

    async def count(**query: str) -> int:
        listed = await flora.path("/technique-runs", **query)
        return int(listed["meta"]["total_estimate"])

    assert 0 < await count(technique_id="tech_icon-pack") < 20
    assert await count(status="failed") + await count(status="completed") == 400
    assert await count(project_id="prj_other") == 0


async def test_a_long_history_does_not_change_with_the_options(serve_flora: ServeFlora) -> None:
    """It belongs to the first workspace and does not change with the options."""
    flora = await serve_flora(history=20)
    before = await flora.path("/technique-runs")
    await flora.set(failures=1, missing_bills=1, price_factor=9)
    assert await flora.path("/technique-runs") == before
    await flora.set(workspace_id="ws_2")
    assert await _read_all(flora) == []
