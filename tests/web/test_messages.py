"""`/api/messages`: what was sent to endpoints."""

from datetime import timedelta

from tests.support.webhooks import NOW, add_endpoint, add_message
from tests.web.conftest import Site
from tracker.store.queries import endpoints


async def test_messages_are_listed_and_filtered(site: Site) -> None:
    """Newest first, in pages, by endpoint, state, event and run; a wrong state is a 400."""
    db = site.services.database
    await add_endpoint(db, "shop")
    await add_message(db, "msg_1", "shop", 500, 204)
    await add_message(db, "msg_2", "shop", created_at=NOW + timedelta(seconds=1), run_id="run_2")
    await add_message(
        db, "msg_3", "crm", 500, created_at=NOW + timedelta(seconds=2), event="run.lost"
    )
    await add_message(
        db, "msg_4", "crm", 410, created_at=NOW + timedelta(seconds=3), state="failed"
    )

    async def listed(**query: str) -> list[str]:
        answer = await site.client.get("/api/messages", params=query)
        assert answer.status_code == 200, answer.text
        return [one["message_id"] for one in answer.json()["messages"]]

    assert await listed() == ["msg_4", "msg_3", "msg_2", "msg_1"]
    assert await listed(endpoint_id="shop") == ["msg_2", "msg_1"]
    assert await listed(state="pending", endpoint_id="") == ["msg_3", "msg_2"]
    assert await listed(state="failed") == ["msg_4"]
    assert await listed(event="run.lost") == ["msg_3"]
    assert await listed(run_id="run_2") == ["msg_2"]
    first = (await site.client.get("/api/messages", params={"limit": 3})).json()
    assert await listed(cursor=first["meta"]["next_cursor"]) == ["msg_1"]
    assert (await site.client.get("/api/messages", params={"state": "sent"})).status_code == 400


async def test_a_message_shows_its_body_and_attempts(small_site: Site) -> None:
    """The body as it was sent, and each attempt with status, answer and error."""
    db, client = small_site.services.database, small_site.client
    await add_message(db, "msg_1", "shop", None, 500, 204)
    shown = (await client.get("/api/messages/msg_1")).json()
    assert (shown["state"], shown["attempts"]) == ("delivered", 3)
    assert shown["body"] == {"type": "run.settled", "data": {"run_id": "run_1"}}
    log = shown["attempt_log"]
    assert [one["status"] for one in log] == [None, 500, 204]
    assert "refused" in log[0]["error"]
    assert (log[1]["answer"], log[2]["error"]) == ("<b>an answer</b>", None)
    for unknown in ("msg_2", "x" * 300):
        assert (await client.get(f"/api/messages/{unknown}")).status_code == 404


async def test_a_message_is_sent_again(site: Site) -> None:
    """Whatever its state, it is due now, under the same id."""
    db, client = site.services.database, site.client
    await add_endpoint(db, "shop")
    await add_message(db, "msg_1", "shop", 204)
    await add_message(db, "msg_2", "shop", 500, state="failed")
    for message_id in ("msg_1", "msg_2"):
        answer = await client.post(f"/api/messages/{message_id}/resend")
        assert answer.status_code == 200, answer.text
        shown = answer.json()
        assert (shown["message_id"], shown["state"]) == (message_id, "pending")
        assert shown["next_attempt_at"] is not None
    assert (await client.post("/api/messages/msg_9/resend")).status_code == 404


async def test_a_large_backlog_is_not_counted_to_its_end(site: Site) -> None:
    """Counts end at a limit, and that of one endpoint hides nothing pending of another."""
    db = site.services.database
    for endpoint_id in ("crm", "idle", "shop"):
        await add_endpoint(db, endpoint_id)
    for number in range(5):
        await add_message(db, f"msg_{number}", "crm", created_at=NOW + timedelta(seconds=number))
        await add_message(db, f"msg_failed_{number}", "crm", 500, state="failed")
    await add_message(db, "msg_last", "shop", created_at=NOW + timedelta(hours=1))
    found = await endpoints.backlogs(db, most=3)
    assert (found["crm"].pending, found["crm"].failed, found["crm"].oldest_at) == (3, 3, NOW)
    assert (found["shop"].pending, found["shop"].oldest_at) == (1, NOW + timedelta(hours=1))
    assert (found["idle"].pending, found["idle"].oldest_at) == (0, None)
