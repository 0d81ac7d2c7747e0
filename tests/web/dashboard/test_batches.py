"""The pages of batches: the progress of each, and the result of every row."""

import re

import pytest

from tests.web.conftest import Serve
from tests.web.dashboard.conftest import HTML
from tracker.simulator import Options, running
from tracker.starting.sheet import read_csv
from tracker.web.dashboard import batches as page


async def test_a_batch_shows_the_result_of_each_row(
    serve: Serve, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row with its run and cost, in pages; the list shows the progress."""
    monkeypatch.setattr(page, "ROWS", 2)
    options = Options(speed=1000, failures=0)
    async with running(options) as flora:
        settings = {"flora_base_url": flora.base_url, "flora_api_key": options.api_key}
        async with serve(sqlite_url, **settings) as site:
            assert (
                "tracker batch TECHNIQUE" in (await site.client.get("/batches", headers=HTML)).text
            )
            sheet = read_csv(b"prompt\ngarden tools\nkitchen\n<b>camping</b>\n")
            plan, _ = await site.services.batches.plan("icon-pack", sheet, name="<i>icons</i>.csv")
            await site.services.batches.run(plan, concurrency=2, wait=True, tell=lambda _: None)
            site.client.headers.update(HTML)
            listed = (await site.client.get("/batches")).text
            assert "&lt;i&gt;icons&lt;/i&gt;.csv" in listed
            assert "3 of 3" in listed
            assert "$0.75" in listed
            link = re.search(r'href="(/batches/[^"]+)"', listed)
            assert link is not None
            first = (await site.client.get(link[1])).text
            assert len(re.findall(r'href="/runs/run_', first)) == 2
            more = re.search(r'href="([^"]+)" rel="next"', first)
            assert more is not None
            rest = (await site.client.get(more[1])).text
            assert len(re.findall(r'href="/runs/run_', rest)) == 1
            assert "First rows" in rest
            assert (await site.client.get(f"{link[1]}?after=x")).status_code == 400
            assert (await site.client.get("/batches/none")).status_code == 404
