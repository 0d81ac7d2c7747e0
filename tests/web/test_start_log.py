"""`GET /api/starts` and the page of the same name."""

from datetime import timedelta
from functools import partial

from tests.web.conftest import Serve
from tests.web.flora import START, with_flora
from tests.web.test_starts import _start
from tracker.core.clock import utc_now
from tracker.store.queries.starts import StartState, mark, of_key, take


async def test_starts_whose_outcome_is_not_known_are_listed(
    serve: Serve, database_url: str
) -> None:
    """504 with Retry-After for the caller; the list has who started it, and no callback address."""
    async with with_flora(serve, database_url, gateway_starts=1.0, gateway_works=0.0) as (
        site,
        flora,
    ):
        starter, passed = site.services.starter, 0.0

        async def wait_in_vain(_: float) -> None:
            nonlocal passed
            passed += starter.deadline

        starter.sleep, starter.monotonic = wait_in_vain, lambda: passed
        answer = await _start(site, "key-1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "start_pending")
        assert int(answer.headers["retry-after"]) > 0
        assert (await _start(site, "key-1")).status_code == 504
        assert flora.world.counts["runs.start", 502] + flora.world.counts["runs.start", 503] <= 1
        page = (await site.client.get("/api/starts")).json()
        (start,) = page["starts"]
        assert (start["idempotency_key"], start["state"]) == ("key-1", "in_doubt")
        assert (start["inputs"], start["run_id"]) == (START["inputs"], None)
        assert start["workspace_id"] == flora.world.options.workspace_id
        assert start["sent_at"] is not None
        assert not any("token" in name or "url" in name for name in start)
        assert page["meta"] == {"next_cursor": None}
        for state, count in (("in_doubt", 1), ("unresolved", 0), ("", 1)):
            listed = await site.client.get("/api/starts", params={"state": state})
            assert len(listed.json()["starts"]) == count
        wrong = await site.client.get("/api/starts", params={"state": "lost"})
        assert wrong.status_code == 400
        shown = await site.client.get("/starts", headers={"accept": "text/html"})
        assert shown.status_code == 200
        assert "key-1" in shown.text
        assert "tracker starts resolve" in shown.text
        database = site.services.database
        (row,) = await of_key(database, "key-1")
        error = row.with_possible(["run_1"])
        at = (row.workspace_id, "key-1", "test", utc_now(), timedelta(seconds=30))
        assert await take(database, *at)
        mark_it = partial(mark, database, row.workspace_id, "key-1", holder="test")
        assert await mark_it(state=StartState.UNRESOLVED, error=error)
        (start,) = (await site.client.get("/api/starts")).json()["starts"]
        assert start["possible_runs"] == ["run_1"]
        assert not start["error"].keys() & {"possible", "excluded"}
        shown = await site.client.get("/starts", headers={"accept": "text/html"})
        assert 'href="/runs/run_1"' in shown.text
