"""`/endpoints` and `/messages`: what is shown, and what the buttons do."""

from collections.abc import AsyncIterator
from datetime import timedelta

import httpx
import pytest
from sqlalchemy import update

from tests.support.endpoint import SECRET, Receiver
from tests.support.webhooks import add_endpoint, add_message
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, TOKEN, csrf_of, sign_in
from tracker.core.clock import utc_now
from tracker.core.events import MessageState
from tracker.settings import EndpointSettings, TokenSettings
from tracker.settings.tokens import Scope
from tracker.store.queries.audit import list_audit
from tracker.store.queries.endpoints import get_endpoint, get_message
from tracker.store.schema import endpoints

READER = "a-token-that-only-reads"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A program that receives webhooks."""
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def hooked(serve: Serve, sqlite_url: str, receiver: Receiver) -> AsyncIterator[Site]:
    """A site whose settings have the endpoint `shop`; its client has signed in. The database also
    knows `crm`, which is in no settings of this process."""
    shop = EndpointSettings(id="shop", url=receiver.url, secrets=[SECRET], allow_private=True)
    reader = TokenSettings(name="reader", token=READER, scopes={Scope.READ})
    async with serve(
        sqlite_url, tracker_api_token=TOKEN, endpoints=(shop,), tokens=(reader,)
    ) as site:
        db = site.services.database
        await add_endpoint(db, "shop", url=receiver.url)
        await add_endpoint(db, "crm")
        await add_message(db, "msg_1", "shop", None, 500, created_at=utc_now())
        await add_message(db, "msg_2", "crm", 204)
        await add_message(db, "msg_3", "shop", 500, state="failed", created_at=utc_now())
        await sign_in(site.client)
        site.client.headers.update(HTML)
        yield site


async def press(client: httpx.AsyncClient, page: str, action: str, **fields: str) -> str:
    """Send the form of an action on a page; the page that answers."""
    shown = await client.get(page)
    assert f'action="{page}/{action}"' in shown.text
    fields["csrf_token"] = csrf_of(shown.text)
    answer = await client.post(f"{page}/{action}", data=fields)
    assert answer.status_code == 200, answer.text
    # A page that is reloaded after the action does nothing.
    again = await client.get(f"{page}/{action}")
    assert (again.status_code, again.headers["location"]) == (303, page)
    return answer.text


async def test_endpoints_and_messages_are_shown(hooked: Site) -> None:
    """Endpoints with health and backlog; messages by state; one with each attempt's answer, which
    is shown as text."""
    client = hooked.client
    shown = (await client.get("/endpoints")).text
    assert 'href="/endpoints/shop"' in shown
    assert "/messages?endpoint=shop&amp;state=failed" in shown
    listed = (await client.get("/messages", params={"state": "pending"})).text
    assert "/messages/msg_1" in listed
    assert "/messages/msg_3" not in listed
    assert (await client.get("/messages", params={"state": "sent"})).status_code == 400
    message = (await client.get("/messages/msg_1")).text
    assert "the connection was refused" in message
    assert "&lt;b&gt;an answer&lt;/b&gt;" in message
    for path in ("/endpoints/nobody", "/messages/msg_9"):
        assert (await client.get(path)).status_code == 404


async def test_a_test_event_is_sent(hooked: Site, receiver: Receiver) -> None:
    """The answer is shown, a failed one too; an endpoint that is not in the settings is named."""
    assert "answered 200" in await press(hooked.client, "/endpoints/shop", "test")
    [got] = receiver.got
    assert (got.event, got.verified) == ("tracker.test", True)
    receiver.status = 500
    assert "it answered HTTP 500" in await press(hooked.client, "/endpoints/shop", "test")
    unknown = await press(hooked.client, "/endpoints/crm", "test")
    assert "is not in the settings of this process" in unknown


async def test_a_python_handler_is_shown_as_one(hooked: Site) -> None:
    """With its function and without a test event; an attempt returned or failed, without a
    status."""
    db = hooked.services.database
    await add_endpoint(db, "store-image", url="python:shop.store_image")
    await add_message(db, "msg_4", "store-image", None, created_at=utc_now())
    assert "Python handler shop.store_image" in (await hooked.client.get("/endpoints")).text
    page = (await hooked.client.get("/endpoints/store-image")).text
    assert "shop.store_image" in page
    assert "python:" not in page
    assert "/endpoints/store-image/test" not in page
    message = (await hooked.client.get("/messages/msg_4")).text
    assert "no answer</" not in message
    csrf = csrf_of(page)
    path = "/endpoints/store-image/test"
    answer = await hooked.client.post(path, data={"csrf_token": csrf})
    assert "resend one of its messages" in answer.text


async def test_a_disabled_endpoint_is_enabled(hooked: Site) -> None:
    """The overview reports it too; its page has the button only then; the audit log knows."""
    db = hooked.services.database
    disabled = {"state": "disabled", "disabled_at": utc_now(), "disabled_reason": "gone for good"}
    change = update(endpoints).where(endpoints.c.endpoint_id == "crm").values(**disabled)
    await db.write(lambda connection: connection.execute(change).rowcount)
    for path in ("/endpoints", "/"):
        assert "gone for good" in (await hooked.client.get(path)).text
    page = await press(hooked.client, "/endpoints/crm", "enable")
    assert 'action="/endpoints/crm/enable"' not in page
    row = await get_endpoint(db, "crm")
    assert row is not None
    assert row.enabled
    entries, _ = await list_audit(db, limit=50)
    assert ("TRACKER_API_TOKEN", "enable_endpoint") in {(one.actor, one.action) for one in entries}


async def test_the_overview_warns_of_messages_that_wait_for_long(hooked: Site) -> None:
    """For more than an hour, with the last error of an endpoint that fails; not before."""
    db = hooked.services.database
    told = "Messages to the endpoint crm have waited"
    failing = {"failing_since": utc_now(), "last_error": "status 502"}
    change = update(endpoints).where(endpoints.c.endpoint_id == "crm").values(**failing)
    await db.write(lambda connection: connection.execute(change).rowcount)
    for minutes in (50, 70):
        created_at = utc_now() - timedelta(minutes=minutes)
        await add_message(db, f"msg_{minutes}", "crm", 502, created_at=created_at)
        page = (await hooked.client.get("/")).text
        assert (told in page) is (minutes == 70)
    assert "Last error: status 502." in page
    assert (
        'href="/endpoints/crm">Show endpoint</a> <a href="/runbook.html#trackermessageslate"'
        in page
    )
    gone = update(endpoints).where(endpoints.c.endpoint_id == "crm")
    gone = gone.values(configured_at=utc_now() - timedelta(days=1))  # no process has it configured
    await db.write(lambda connection: connection.execute(gone).rowcount)
    assert told not in (await hooked.client.get("/")).text


async def test_messages_are_sent_again(hooked: Site) -> None:
    """One that was delivered, and all that failed since a time; a wrong time is a 400."""
    db = hooked.services.database
    await press(hooked.client, "/messages/msg_2", "resend")
    await press(hooked.client, "/endpoints/shop", "recover", since="24")
    for message_id in ("msg_2", "msg_3"):
        row = await get_message(db, message_id)
        assert row is not None
        assert row.state is MessageState.PENDING
        assert row.next_attempt_at is not None
        assert row.next_attempt_at < utc_now() + timedelta(seconds=1)
    csrf = csrf_of((await hooked.client.get("/endpoints/shop")).text)
    wrong = await hooked.client.post(
        "/endpoints/shop/recover", data={"since": "999", "csrf_token": csrf}
    )
    assert wrong.status_code == 400


async def test_a_token_that_only_reads_changes_nothing(hooked: Site) -> None:
    """It sees no buttons, and requests are refused; in the API too."""
    async with hooked.another(headers=HTML) as reader:
        await sign_in(reader, READER)
        page = (await reader.get("/endpoints/shop")).text
        assert "/endpoints/shop/test" not in page
        headers = {"X-CSRF-Token": csrf_of(page)}
        for path in ("/endpoints/shop/enable", "/messages/msg_3/resend"):
            assert (await reader.post(path, headers=headers)).status_code == 403
    bearer = {"Authorization": f"Bearer {READER}", "Accept": "application/json"}
    async with hooked.another(headers=bearer) as reader:
        assert (await reader.get("/api/messages")).status_code == 200
        assert (await reader.post("/api/messages/msg_3/resend")).status_code == 403
