"""Actions: only from pages of the dashboard, and each shows its result."""

from collections.abc import AsyncIterator
from datetime import timedelta

import httpx
import pytest

from tests.store.making import callback
from tests.support.deliveries import Delivered, keep
from tests.web.callbacks import event
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, TOKEN, csrf_of, sign_in
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, DeliveryOutcome, Observed
from tracker.core.run import RunStatus
from tracker.operations.retention import Ages
from tracker.simulator import Options, Simulator, running
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import get_delivery

REPLAY = "/deliveries/whd_run_1/replay"


async def quarantine(site: Site, body: bytes, delivery_id: str = "whd_run_1") -> None:
    """Keep a callback as one that was not understood."""
    await keep(
        site.services.database,
        Delivered(
            delivery=Delivery(
                delivery_id=delivery_id,
                received_at=utc_now(),
                body=body,
            ),
            outcome=DeliveryOutcome.QUARANTINED,
            reason="an older version did not understand it",
        ),
    )


async def outcome(site: Site, delivery_id: str = "whd_run_1") -> str:
    row = await get_delivery(site.services.database, delivery_id)
    assert row is not None
    return row.outcome.value


async def test_a_quarantined_delivery_is_replayed(browser: httpx.AsyncClient, closed: Site) -> None:
    """The page's form does it, and the answer names the run."""
    await quarantine(closed, event())
    csrf = csrf_of((await browser.get("/deliveries/whd_run_1")).text)
    answer = await browser.post(REPLAY, data={"csrf_token": csrf})
    assert answer.status_code == 200
    assert "applied to run run_1" in answer.text
    assert await outcome(closed) == "applied"
    assert "Replay</button>" not in answer.text


async def test_a_failed_replay_shows_the_reason(browser: httpx.AsyncClient, closed: Site) -> None:
    """The delivery stays quarantined, and can be replayed again."""
    await quarantine(closed, b'{"type": "run.paused"}')
    csrf = csrf_of((await browser.get("/deliveries/whd_run_1")).text)
    answer = await browser.post(REPLAY, headers={"X-CSRF-Token": csrf, "HX-Request": "true"})
    assert "Still quarantined: the type is neither" in answer.text
    assert await outcome(closed) == "quarantined"


async def test_a_removed_body_is_shown_as_removed(browser: httpx.AsyncClient, closed: Site) -> None:
    """The page shows that retention removed it, and a replay does nothing."""
    at = utc_now() - timedelta(days=40)
    await keep(closed.services.database, callback("run_1", at=at))
    ages = Ages(runs=timedelta(days=90), bodies=timedelta(days=30))
    assert (await closed.services.pruner.prune(ages))["bodies"] == 1
    page = (await browser.get("/deliveries/whd_run_1")).text
    assert "Removed by retention" in page
    assert "Raw body" not in page
    assert "whd_run_1" in (await browser.get("/deliveries")).text
    answer = await browser.post(REPLAY, data={"csrf_token": csrf_of(page)})
    assert "it had been applied before" in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-CSRF-Token": ""},
        {"X-CSRF-Token": "wrong"},
        {"X-CSRF-Token": "é"},
    ],
    ids=str,
)
async def test_a_page_of_another_site_changes_nothing(
    browser: httpx.AsyncClient, closed: Site, headers: dict[str, str]
) -> None:
    """The cookie alone, which any page can make a browser send, is not enough."""
    await quarantine(closed, event())
    encoded = {name: value.encode() for name, value in headers.items()}
    assert (await browser.post(REPLAY, headers=encoded)).status_code == 403
    assert await outcome(closed) == "quarantined"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
async def test_the_right_token_from_another_origin_is_not_enough(
    browser: httpx.AsyncClient, closed: Site, headers: dict[str, str]
) -> None:
    """A request that the browser marks as cross-site is refused."""
    await quarantine(closed, event())
    csrf = csrf_of((await browser.get("/")).text)
    answer = await browser.post(REPLAY, headers={**headers, "X-CSRF-Token": csrf})
    assert answer.status_code in (303, 403)
    assert await outcome(closed) == "quarantined"


async def test_another_sessions_token_is_not_ours(browser: httpx.AsyncClient, closed: Site) -> None:
    """Each session has its own token, and it works in no other session."""
    await quarantine(closed, event())
    async with closed.another() as other:
        await sign_in(other)
        theirs = csrf_of((await other.get("/", headers=HTML)).text)
    assert (await browser.post(REPLAY, data={"csrf_token": theirs})).status_code == 403


async def test_under_api_the_cookie_needs_the_token_too(browser: httpx.AsyncClient) -> None:
    """A start, which costs money, is refused with the cookie alone."""
    start = {"technique": "icon-pack", "inputs": [{"id": "a", "type": "text", "value": "b"}]}
    assert (await browser.post("/api/runs", json=start)).status_code == 401
    csrf = csrf_of((await browser.get("/")).text)
    shown = await browser.post("/api/runs", json=start, headers={"X-CSRF-Token": csrf})
    assert shown.status_code == 503  # it is let in: there is only no key to start it with


async def test_the_bearer_token_needs_nothing_besides(closed: Site) -> None:
    """No browser sends it by itself."""
    await quarantine(closed, event())
    headers = {**HTML, "Authorization": f"Bearer {TOKEN}"}
    assert (await closed.client.post(REPLAY, headers=headers)).status_code == 200
    assert await outcome(closed) == "applied"


@pytest.mark.served_twice
async def test_an_action_loaded_again_leads_to_its_page(browser: httpx.AsyncClient) -> None:
    """A reload after an action shows the page and repeats nothing."""
    answer = await browser.get("/deliveries/whd%2F1%3Fx/replay")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/deliveries/whd%2F1%3Fx")
    answer = await browser.get("/runs/run_1/check")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/runs/run_1")


@pytest.mark.parametrize("action", ["check", "retry"])
async def test_only_a_post_does_something(browser: httpx.AsyncClient, action: str) -> None:
    """`HEAD` needs no more than the scope `read`: it leads to the page, as `GET` does."""
    answer = await browser.head(f"/runs/run_1/{action}")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/runs/run_1")


@pytest.fixture
async def flora() -> AsyncIterator[Simulator]:
    """A FLORA whose runs end at once."""
    async with running(Options(speed=1000, failures=0)) as simulator:
        yield simulator


def flash_of(page: str) -> str:
    """The flash message of a page."""
    return page.partition('id="flash"')[2].partition("</div>")[0]


async def test_check_now_reads_the_run_from_flora(
    serve: Serve, sqlite_url: str, flora: Simulator
) -> None:
    """The answer shows FLORA's state; then nothing is left to check, also for an older page."""
    options = flora.world.options
    settings = {"flora_base_url": flora.base_url, "flora_api_key": options.api_key}
    async with (
        serve(sqlite_url, **settings) as site,
        httpx.AsyncClient(base_url=flora.base_url) as api,
    ):
        started = await api.post(
            "/techniques/icon-pack/runs",
            headers={"Authorization": f"Bearer {options.api_key}"},
            json={"mode": "async", "inputs": [{"id": "prompt", "type": "text", "value": "x"}]},
        )
        run_id = started.json()["run_id"]
        await flora.quiet()
        await site.services.tracker.track(
            run_id, technique="tech_icon-pack", workspace_id=None, poll_url=None
        )
        site.client.headers.update(HTML)
        before = await site.client.get(f"/runs/{run_id}")
        assert 'id="check"' in before.text
        answer = await site.client.post(f"/runs/{run_id}/check")
        assert "FLORA reports completed. All details are fetched." in answer.text
        record = await read.get_run(site.services.database, run_id)
        assert record is not None
        assert record.run.settled
        assert 'id="check"' not in answer.text
        again = await site.client.post(f"/runs/{run_id}/check")
        assert "the bill is checked again" in flash_of(again.text)


async def test_check_now_without_a_key(small_site: Site) -> None:
    """There is no button, and an older page's answer says why."""
    await small_site.services.writer.submit(
        Observed(
            observation=Observation(
                run_id="run_1", source=Source.HISTORY, at=utc_now(), status=RunStatus.RUNNING
            )
        )
    )
    page = await small_site.client.get("/runs/run_1", headers=HTML)
    assert "Check now" not in page.text
    answer = await small_site.client.post("/runs/run_1/check", headers=HTML)
    assert "No FLORA API key is set for this workspace" in flash_of(answer.text)
