"""The pages of batches: the progress of each, and the result of every row."""

import re

from tests.support.waiting import eventually
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML
from tracker.core.clock import utc_now
from tracker.simulator import Options, running
from tracker.starting.sheet import read_csv
from tracker.store.queries import batches
from tracker.store.queries.batches import BatchEntry, BatchRow


async def test_a_batch_shows_the_result_of_each_row(serve: Serve, sqlite_url: str) -> None:
    """Each row with its run and cost; the list shows the progress."""
    options = Options(speed=1000, failures=0)
    async with running(options) as flora:
        settings = {
            "flora_base_url": flora.base_url,
            "flora_api_key": options.api_key,
            "tracker_poll_interval": 0.1,
        }
        async with serve(sqlite_url, **settings) as site:
            assert (
                "tracker batch TECHNIQUE" in (await site.client.get("/batches", headers=HTML)).text
            )
            sheet = read_csv(b"prompt\ngarden tools\nkitchen\n<b>camping</b>\n")
            plan, _ = await site.services.batches.plan("icon-pack", sheet, name="<i>icons</i>.csv")
            await site.services.batches.run(
                plan, concurrency=2, wait=False, on_progress=lambda _: None
            )
            site.client.headers.update(HTML)

            async def all_ended() -> bool:
                await site.services.poller.poll_due()
                return "3 of 3" in (await site.client.get("/batches")).text

            await eventually(all_ended)
            listed = (await site.client.get("/batches")).text
            assert "&lt;i&gt;icons&lt;/i&gt;.csv" in listed
            assert "$0.75" in listed
            link = re.search(r'href="(/batches/[^"]+)"', listed)
            assert link is not None
            page = (await site.client.get(link[1])).text
            assert len(re.findall(r'href="/runs/run_', page)) == 3
            assert (await site.client.get("/batches/none")).status_code == 404


async def test_rows_are_paged(small_site: Site) -> None:
    """A hundred on a page, with links to the next ones and back to the first."""
    one = BatchRow(
        batch_id="bat_1",
        workspace_slot="default",
        technique_id="tech_1",
        name="sheet.csv",
        created_at=utc_now(),
    )
    rows = [BatchEntry(position=n, line=n + 1, digest=f"{n:064}") for n in range(1, 104)]
    await batches.keep(small_site.services.database, one, rows)
    small_site.client.headers.update(HTML)
    first = (await small_site.client.get("/batches/bat_1")).text
    assert len(re.findall(r'<tr role="row" id="row-', first)) == 100
    more = re.search(r'href="([^"]+)" rel="next"', first)
    assert more is not None
    rest = (await small_site.client.get(more[1])).text
    assert re.findall(r'<tr role="row" id="row-(\d+)"', rest) == ["101", "102", "103"]
    assert "First rows" in rest
    assert (await small_site.client.get("/batches/bat_1?after=x")).status_code == 400
