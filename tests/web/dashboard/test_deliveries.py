"""The page of deliveries: problems first, and actions on many of them at once."""

import re
from datetime import timedelta

import httpx

from tests.support.deliveries import Delivered, keep
from tests.web.callbacks import event
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, TOKEN, csrf_of, sign_in
from tests.web.dashboard.test_actions import outcome, quarantine
from tracker.core.clock import utc_now
from tracker.core.record import Delivery, DeliveryOutcome
from tracker.settings import TokenSettings
from tracker.store.queries import audit


async def _quarantine(site: Site, *names: str, reason: str) -> None:
    for name in names:
        delivery = Delivery(
            delivery_id=f"whd_{name}", received_at=utc_now(), body=event(run_id=f"run_{name}")
        )
        quarantined = DeliveryOutcome.QUARANTINED
        await keep(
            site.services.database,
            Delivered(delivery=delivery, outcome=quarantined, reason=reason),
        )


def _form_of(page: str, cause: str) -> dict[str, str]:
    """The hidden fields of the form of a cause."""
    form = next(each for each in page.split("<form")[1:] if f'value="{cause}"' in each)
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form))


async def test_causes_of_quarantine_come_first(browser: httpx.AsyncClient, closed: Site) -> None:
    """Each with its number and a link to its deliveries; a filtered page has the list alone."""
    await _quarantine(closed, "1", "2", reason="an older version did not understand it")
    await _quarantine(closed, "3", reason="it names another workspace")
    page = (await browser.get("/deliveries")).text
    problems, _, rows = page.partition("<table")
    assert problems.index("2 quarantined") < problems.index("1 quarantined")
    assert rows.count('<input type="checkbox"') == 3
    cause = "/deliveries?outcome=quarantined&amp;cause=it%20names%20another%20workspace"
    assert f'href="{cause}"' in problems
    shown = (await browser.get(cause.replace("&amp;", "&"))).text
    assert "whd_3" in shown
    assert "whd_1" not in shown
    assert "Problems" not in shown


async def test_what_waits_for_too_long_is_a_problem(
    browser: httpx.AsyncClient, closed: Site
) -> None:
    """A callback that waits to be applied for minutes is named with what to do; a fresh one is
    not."""
    for name, age in (("fresh", timedelta(0)), ("old", timedelta(minutes=5))):
        received = utc_now() - age
        delivery = Delivery(delivery_id=f"whd_{name}", received_at=received, body=event())
        waiting = DeliveryOutcome.WAITING
        await keep(closed.services.database, Delivered(delivery=delivery, outcome=waiting))
        page = (await browser.get("/deliveries")).text
        assert ("Problems" in page) is (name == "old")
    assert "2 waiting" in page
    assert "tracker poll" in page


async def test_a_cause_is_replayed(browser: httpx.AsyncClient, closed: Site) -> None:
    """Those with the cause are applied, up to the last that the page showed; the others stay."""
    await _quarantine(closed, "1", "2", reason="an older version did not understand it")
    await _quarantine(closed, "3", reason="it names another workspace")
    await quarantine(closed, b'{"type": "run.paused"}', "whd_4")
    fields = _form_of(
        (await browser.get("/deliveries")).text, "an older version did not understand it"
    )
    await _quarantine(closed, "5", reason="an older version did not understand it")
    answer = await browser.post("/deliveries", data={**fields, "action": "replay"})
    assert "Replayed: 2 deliveries applied, 1 still quarantined." in answer.text
    states = [await outcome(closed, f"whd_{number}") for number in range(1, 6)]
    assert states == ["applied", "applied", "quarantined", "quarantined", "quarantined"]


async def test_a_selection_is_acknowledged(browser: httpx.AsyncClient, closed: Site) -> None:
    """The page, the banner and the count of the overview stop naming them; they stay."""
    await _quarantine(closed, "1", "2", "3", reason="made up")
    page = (await browser.get("/deliveries")).text
    chosen = {
        "csrf_token": csrf_of(page),
        "delivery_id": ["whd_1", "whd_2"],
        "action": "acknowledge",
    }
    answer = await browser.post("/deliveries?outcome=quarantined", data=chosen)
    assert "2 deliveries acknowledged." in answer.text
    assert re.findall(r'id="row-(\w+)"', answer.text) == ["whd_3"]
    assert "1 callback is quarantined" in (await browser.get("/")).text
    kept = (await browser.get("/deliveries?outcome=acknowledged")).text
    assert re.findall(r'id="row-(\w+)"', kept) == ["whd_2", "whd_1"]
    entries, _ = await audit.list_audit(
        closed.services.database, action=audit.Action.ACKNOWLEDGE, limit=9
    )
    assert {one.detail["delivery_id"] for one in entries} == {"whd_1", "whd_2"}
    assert {one.actor for one in entries} == {"TRACKER_API_TOKEN"}
    answer = await browser.post("/deliveries/whd_3/acknowledge", data={"csrf_token": csrf_of(page)})
    assert "Acknowledged" in answer.text
    assert "quarantined" not in (await browser.get("/")).text.split("Runs now")[0]
    answer = await browser.post("/deliveries/whd_3/replay", data={"csrf_token": csrf_of(page)})
    assert "applied to run run_3" in answer.text


async def test_a_form_that_makes_no_sense_changes_nothing(
    browser: httpx.AsyncClient, closed: Site
) -> None:
    """Nothing selected is a message; an unknown action or time is a 400; no CSRF token is a 403."""
    await _quarantine(closed, "1", reason="made up")
    fields = {"csrf_token": csrf_of((await browser.get("/deliveries")).text)}
    nothing = await browser.post("/deliveries", data={**fields, "action": "replay"})
    assert "Nothing was selected" in nothing.text
    for wrong in (
        {"action": "delete", "delivery_id": "whd_1"},
        {"action": "replay", "cause": "made up", "until": "now"},
    ):
        assert (await browser.post("/deliveries", data={**fields, **wrong})).status_code == 400
    forged = {"action": "replay", "delivery_id": "whd_1"}
    assert (await browser.post("/deliveries", data=forged)).status_code == 403
    assert await outcome(closed, "whd_1") == "quarantined"


async def test_a_read_token_sees_the_problems_and_no_action(serve: Serve, sqlite_url: str) -> None:
    """Nothing to select, no button, and a request all the same is refused."""
    reader = TokenSettings(name="producer", token="r" * 20, scopes={"read"})
    async with serve(sqlite_url, tracker_api_token=TOKEN, tokens=(reader,)) as site:
        await _quarantine(site, "1", reason="made up")
        await sign_in(site.client, "r" * 20)
        page = (await site.client.get("/deliveries", headers=HTML)).text
        assert "1 quarantined" in page
        for offered in ("checkbox", 'name="action"', "Replay", "Acknowledge"):
            assert offered not in page
        fields = {"csrf_token": csrf_of(page), "action": "replay", "delivery_id": "whd_1"}
        assert (await site.client.post("/deliveries", data=fields)).status_code == 403
