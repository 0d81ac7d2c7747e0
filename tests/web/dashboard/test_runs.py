"""The page of runs: search, order, count and CSV; and starting a failed run again."""

import asyncio
import csv
import io
import re
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any
from urllib.parse import quote

from tests.support.logs import capture_logs
from tests.support.started import of_start
from tests.support.waiting import eventually
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML
from tests.web.flora import with_flora
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.starting.start import StartRequest
from tracker.store.queries import batches, starts
from tracker.store.queries import runs as read
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.web.http import Limits


def _run(number: int, status: RunStatus = RunStatus.COMPLETED, **facts: Any) -> Observed:
    """A run of a technique: the later its number, the newer, cheaper and longer it is."""
    created = utc_now() - timedelta(minutes=100 - number)
    observation = Observation(
        run_id=f"run_{number}",
        source=Source.POLL,
        at=utc_now(),
        status=status,
        technique_id="tech_1",
        created_at=created,
        completed_at=created + timedelta(seconds=number),
        charged_cost=Decimal(100 - number) / 4,
        **facts,
    )
    return of_start(
        Observed(observation=observation),
        inputs=[{"id": "prompt", "type": "text", "value": f"=garden tool {number}."}],
    )


async def _page(site: Site, path: str) -> str:
    answer = await site.client.get(path, headers=HTML)
    assert answer.status_code == 200, answer.text
    return answer.text


def _listed(page: str) -> list[str]:
    return re.findall(r'<tr role="row" id="row-(run_\d+)"', page)


async def test_a_prompt_a_sheet_and_a_cell_find_their_runs(site: Site) -> None:
    """The search finds what a run was asked for, and leads from a cell or the name of a sheet to
    the row and to the batch; the batch is a filter."""
    services = site.services
    entry = BatchEntry(position=16, line=17, digest="0" * 24, carried={"SKU": "AB-<16>"})
    batch = BatchRow(
        batch_id="bat_1",
        workspace_id="ws_1",
        technique_id="tech_1",
        name="<spring>.csv",
        created_at=utc_now(),
        columns=["SKU"],
    )
    await batches.keep(services.database, batch, [entry])
    await starts.reserve(
        services.database,
        starts.StartRow(
            workspace_id="ws_1",
            idempotency_key=entry.key,
            technique_id="tech_1",
            fingerprint="",
            inputs=[],
            created_at=utc_now(),
        ),
    )
    await services.writer.submit(of_start(_run(1), workspace_id="ws_1", idempotency_key=entry.key))
    await services.writer.submit(_run(2))
    for text in ("tool 1.", "AB-<16>", "<spring>", "bat_1"):
        page = await _page(site, f"/runs?text={quote(text)}")
        assert _listed(page) == ["run_1"], text
        assert "1 run<" in page
    page = await _page(site, "/runs?text=AB-")
    assert 'href="/batches/bat_1?row=16">row 16 of &lt;spring&gt;.csv</a>' in page
    assert 'href="/runs?batch=bat_1"' in await _page(site, "/runs?text=spring")
    assert _listed(await _page(site, "/runs?batch=bat_1")) == ["run_1"]
    run = await _page(site, "/runs/run_1")
    assert 'href="/batches/bat_1?row=16">row 16 of &lt;spring&gt;.csv</a>' in run
    assert "AB-&lt;16&gt;" in run
    start = await starts.of_run(services.database, "run_1")
    assert start is not None
    await services.writer.submit(start.became(_run(3).observation, callback_expected=True))
    for query in ("text=AB-", "text=spring", "batch=bat_1"):
        assert _listed(await _page(site, f"/runs?{query}")) == ["run_3", "run_1"], query


async def test_runs_are_sorted_and_counted(small_site: Site) -> None:
    """By cost and by duration, page by page, with the number of results above; a wrong order and a
    cursor of another one are readable 400s."""
    writer = small_site.services.writer
    await writer.submit_all([_run(number) for number in range(60)])
    newest = [f"run_{number}" for number in reversed(range(60))]
    for sort, expected in (("", newest), ("duration", newest), ("cost", newest[::-1])):
        first = await _page(small_site, f"/runs?sort={sort}")
        assert "60 runs" in first
        older = re.search(r'href="([^"]+)" rel="next"', first)
        assert older is not None
        second = await _page(small_site, older[1].replace("&amp;", "&"))
        assert _listed(first) + _listed(second) == expected, sort
    assert 'aria-sort="descending"' in first
    assert "most expensive first" in first
    cursor = re.search(r"cursor=([^\"&]+)", await _page(small_site, "/runs"))
    assert cursor is not None
    for wrong in ("sort=price", f"sort=cost&cursor={cursor[1]}"):
        answer = await small_site.client.get(f"/runs?{wrong}", headers=HTML)
        assert answer.status_code == 400, wrong


async def test_the_present_filter_is_exported_as_csv(serve: Serve, sqlite_url: str) -> None:
    """All pages of it in its order, up to a bound; no cell is a formula for a spreadsheet."""
    async with serve(sqlite_url, limits=Limits(csv_page=4)) as site:
        writer = site.services.writer
        await writer.submit_all([_run(number) for number in range(11)])
        error = RunError("=cmd()", "no")
        await writer.submit(_run(11, RunStatus.FAILED, error=error))
        page = await _page(site, "/runs?state=completed&sort=cost")
        link = re.search(r'href="(/runs\.csv[^"]+)"', page)
        assert link is not None
        answer = await site.client.get(link[1].replace("&amp;", "&"))
        assert answer.headers["Content-Type"].startswith("text/csv")
        assert "runs.csv" in answer.headers["Content-Disposition"]
        rows = list(csv.DictReader(io.StringIO(answer.text.removeprefix("\ufeff"))))
        assert [row["run_id"] for row in rows] == [f"run_{number}" for number in range(11)]
        assert rows[0]["charged_cost"] == "25"
        failed = (await site.client.get("/runs.csv?state=failed")).text
        assert ",'=cmd()," in failed
    async with serve(sqlite_url, limits=Limits(csv_page=4, csv_runs=6)) as site:
        assert len((await site.client.get("/runs.csv")).text.splitlines()) == 7
        assert (await site.client.get("/runs.csv?state=asleep")).status_code == 400


async def test_a_generation_is_no_unknown_technique(small_site: Site) -> None:
    """It has none."""
    run = _run(1, run_type="generation")
    observation = replace(run.observation, technique_id=None)
    await small_site.services.writer.submit(replace(run, observation=observation))
    cell = re.search(r'data-label="Technique".*?</td>', await _page(small_site, "/runs"))
    assert cell is not None
    assert "generation" in cell[0]
    assert "unknown" not in cell[0]


async def test_a_list_shows_small_pictures_and_icons(small_site: Site) -> None:
    """The first outputs: pictures that are loaded late, each with its name and a fixed size, and
    icons for everything else; no link that is not one."""
    outputs = (
        Output("a", "imageUrl", "https://cdn.example/1.png"),
        Output("b", "videoUrl", "https://cdn.example/2.mp4"),
        Output("c", "text", "A poem"),
        Output("d", "imageUrl", "javascript:alert(1)"),
    )
    await small_site.services.writer.submit(_run(1, outputs=outputs))
    page = await _page(small_site, "/runs")
    picture = re.search(r'<img src="https://cdn.example/1.png"[^>]*>', page)
    assert picture is not None
    assert 'alt="Image 1"' in picture[0]
    assert 'loading="lazy"' in picture[0]
    assert 'width="40" height="40"' in picture[0]
    assert '<span class="sr">Video</span>' in page
    assert '<span class="rest">+1</span>' in page
    assert "javascript:" not in page


async def test_a_failed_run_is_started_again_once(serve: Serve, sqlite_url: str) -> None:
    """Its page names the price, and starts the same inputs as one new run, however often the button
    is pressed, on the page of whichever run of the start; where the input is at fault there is no
    button."""
    options = {"speed": 1000.0, "failures": 1, "failure_codes": ("model_timeout",)}
    async with with_flora(serve, sqlite_url, **options) as (site, flora):
        site.client.headers.update(HTML)
        request = StartRequest(
            technique="icon-pack",
            inputs=[{"id": "prompt", "type": "text", "value": "tools"}],
            tags={"campaign": "spring"},
        )
        run_id = (await site.services.starter.start(request)).record.run.run_id

        async def settled() -> bool:
            await site.services.poller.poll_due()
            record = await read.get_run(site.services.database, run_id)
            return record is not None and record.run.settled

        await eventually(settled)
        page = await _page(site, f"/runs/{run_id}")
        assert "A temporary fault at FLORA: start the run again." in page
        assert "Start again, up to $0.25" in page
        address = f"/runs/{run_id}/retry"
        dearer = await site.client.post(address, data={"cost": "0.1"})
        assert "The price has changed. Nothing was started." in dearer.text
        assert len(flora.world.runs) == 1
        flora.world.change({"slow_starts": 1.0, "slow_seconds": 300.0})  # 0.3 s at its speed
        press = partial(site.client.post, address, data={"cost": "0.25"})
        with capture_logs() as lines:
            answers = [*await asyncio.gather(press(), press()), await press()]
        assert [line["event"] for line in lines].count("run.started") == 1
        assert [answer.status_code for answer in answers] == [303, 303, 303]
        assert len(flora.world.runs) == 2
        (new,) = set(flora.world.runs) - {run_id}
        assert {answer.headers["Location"] for answer in answers} == {f"/runs/{new}"}
        assert f'href="/runs/{new}"' in await _page(site, f"/runs/{run_id}")
        again = await read.get_run(site.services.database, new)
        assert again is not None
        assert again.tags == {"campaign": "spring"}
        start = await starts.of_run(site.services.database, run_id)
        assert start is not None
        timeout = RunError("model_timeout", "")
        further = _run(1, RunStatus.FAILED, error=timeout, workspace_id=start.workspace_id)
        of_start = replace(further.observation, technique_id=start.technique_id)
        await site.services.writer.submit(start.became(of_start, callback_expected=True))
        page = await _page(site, "/runs/run_1")
        assert f'Started again as <a class="id" href="/runs/{new}"' in page
        answer = await site.client.post("/runs/run_1/retry", data={"cost": "0.25"})
        assert answer.headers["Location"] == f"/runs/{new}"
        assert len(flora.world.runs) == 2
    facts = {"error": RunError("safety_blocked", "no"), "workspace_id": "ws_1"}
    async with serve(sqlite_url, flora_api_key="sk_test", flora_workspace_id="ws_1") as site:
        await site.services.writer.submit(_run(1, RunStatus.FAILED, **facts))
        assert "Start again" not in await _page(site, "/runs/run_1")
        answer = await site.client.post("/runs/run_1/retry", data={"cost": ""}, headers=HTML)
        assert "cannot be started again" in answer.text
