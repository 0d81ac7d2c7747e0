"""`/api/deliveries`: the callbacks as they came."""

from tests.store.making import quarantined
from tests.support.deliveries import keep
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Site


async def keep_quarantined(site: Site, body: bytes, delivery_id: str) -> None:
    at = site.services.clock()  # which the other callbacks have their times from
    await keep(site.services.database, quarantined(delivery_id, at=at, body=body))


async def test_callbacks_are_listed_and_filtered(site: Site) -> None:
    """Newest first, in pages, by outcome and run; a wrong outcome is a 400."""
    for run_id in ("run_1", "run_2", "run_3"):
        body = event(run_id)
        await site.client.post(PATH, content=body, headers=signed(body))
    await site.services.applier.drain()
    await keep_quarantined(site, event("run_4"), "whd_4")

    async def listed(**query: str) -> list[str | None]:
        answer = await site.client.get("/api/deliveries", params=query)
        assert answer.status_code == 200, answer.text
        return [one["run_id"] or one["delivery_id"] for one in answer.json()["deliveries"]]

    assert await listed() == ["whd_4", "run_3", "run_2", "run_1"]
    assert await listed(outcome="quarantined") == ["whd_4"]
    assert await listed(outcome="applied", run_id="run_2") == ["run_2"]
    page = (await site.client.get("/api/deliveries", params={"limit": "3"})).json()
    assert "body" not in page["deliveries"][0]
    assert await listed(cursor=page["meta"]["next_cursor"]) == ["run_1"]
    wrong = await site.client.get("/api/deliveries", params={"outcome": "lost"})
    assert wrong.status_code == 400


async def test_a_quarantined_callback_is_replayed(site: Site) -> None:
    """It is applied to its run; one that is still not understood stays, with the reason."""
    client = site.client
    await keep_quarantined(site, event("run_1"), "whd_good")
    await keep_quarantined(site, b'{"type": "run.paused"}', "whd_bad")
    done = await client.post("/api/deliveries/whd_good/replay")
    assert (done.status_code, done.json()["outcome"]) == (200, "applied")
    assert (await client.get("/api/runs/run_1")).status_code == 200
    assert (await client.post("/api/deliveries/whd_good/replay")).json()["already"] is True
    still = (await client.post("/api/deliveries/whd_bad/replay")).json()
    assert still["outcome"] == "quarantined"
    assert "neither" in still["reason"]
    for unknown in ("whd_none", "x" * 600, "%00"):
        assert (await client.post(f"/api/deliveries/{unknown}/replay")).status_code == 404
