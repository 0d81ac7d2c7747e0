"""The pages of batches: rows by outcome and error, numbered pages, retry, the outputs as a ZIP."""

import asyncio
import html
import io
import re
import tempfile
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, update

from tests.support.endpoint import Receiver
from tests.support.waiting import eventually
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, csrf_of, sign_in
from tests.web.flora import with_flora
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.core.run import RunError, RunStatus
from tracker.delivering import downloads
from tracker.settings import TokenSettings
from tracker.settings.tokens import Scope
from tracker.simulator import Simulator
from tracker.starting.sheet import read_csv
from tracker.store.queries import batches, sheet_rows
from tracker.store.queries.batches import BatchEntry, BatchRow
from tracker.store.schema import run_outputs, starts
from tracker.web.http import Limits
from tracker.worker import Worker

SHEET = b"SKU,client,prompt\n" + b"".join(
    f"SKU-{number},<b>&Co,garden tool {number}\n".encode() for number in range(1, 11)
)
TOKEN = "a-token-of-the-tests"
READER = "a-token-that-only-reads"


@dataclass(frozen=True, slots=True)
class BatchSite:
    """A site with a worker and a finished batch: some rows have failed."""

    site: Site
    flora: Simulator
    batch_id: str

    async def page(self, query: str = "") -> str:
        """The page of the batch."""
        answer = await self.site.client.get(f"/batches/{self.batch_id}{query}")
        assert answer.status_code == 200, answer.text
        return answer.text


@asynccontextmanager
async def finished(serve: Serve, url: str, **options: Any) -> AsyncIterator[BatchSite]:
    given = {"seed": 4, "run_seconds": 0.2, "speed": 10.0, "failures": 0.4, **options}
    async with with_flora(serve, url, **given) as (site, flora):
        worker = Worker(site.services)
        await worker.start()
        try:
            sheet = read_csv(SHEET)
            plan, _ = await site.services.batches.plan("icon-pack", sheet, name="<i>icons</i>.csv")
            run = site.services.batches.run
            await run(plan, concurrency=4, wait=True, on_progress=lambda _: None)
            site.client.headers.update(HTML)
            yield BatchSite(site, flora, plan.batch.batch_id)
        finally:
            await worker.stop()


def shown_rows(page: str) -> list[int]:
    """The positions of the rows on a page."""
    return [int(number) for number in re.findall(r'<tr role="row" id="row-(\d+)"', page)]


async def test_a_row_shows_all_its_runs(serve: Serve, database_url: str) -> None:
    """It has failed if one of them did, also where others completed; a retry pays these again, and
    says so. Each run leads to the others and to the row."""
    async with finished(serve, database_url, failures=0.0) as found:
        services, client = found.site.services, found.site.client
        batch = await batches.get(services.database, found.batch_id)
        assert batch is not None
        first = (await services.batches.rows(batch))[0]
        assert first.start is not None
        at, further = utc_now(), "run_further"
        own = Observation(run_id=further, source=Source.START, at=at)
        await services.writer.submit(first.start.became(own, callback_expected=True))
        assert "1 of 10" not in (page := await found.page())
        assert "9 of 10 rows finished" in page
        error = RunError("model_timeout", "too long")
        read = {"status": RunStatus.FAILED, "error": error, "completed_at": at}
        poll = Observation(run_id=further, source=Source.POLL, at=at, **read)
        await services.writer.submit(Observed(observation=poll))
        page = await found.page()
        assert "finished, 1 failed" in page
        assert "model_timeout: too long" in page
        assert f"2 runs: {' '.join(map(linked, (first.run_ids[0], further)))}" in plain(page)
        retry = (await client.get(f"/batches/{found.batch_id}/retry")).text
        assert "1 failed row has completed runs: all runs of a row are started" in retry
        for run_id in (first.run_ids[0], further):
            shown = (await client.get(f"/runs/{run_id}")).text
            assert "One of the 2 runs of a start" in shown
            assert f"row 1 of {html.escape(batch.name)}" in shown
            assert "Its row was started again" not in shown


def linked(run_id: str) -> str:
    return f'<a class="id" href="/runs/{run_id}">{run_id}</a>'


def plain(page: str) -> str:
    """A page with single spaces."""
    return re.sub(r"\s+", " ", page)


async def test_rows_are_shown_by_outcome_and_by_error(serve: Serve, database_url: str) -> None:
    """The split, the reasons of failures and the filters agree; rows are named by the sheet's first
    carried column and show their pictures; the list shows the same split."""
    async with finished(serve, database_url) as found:
        page = await found.page()
        failed = await sheet_rows.error_groups(found.site.services.database, found.batch_id)
        count = sum(group.count for group in failed)
        assert 2 <= count <= 8
        assert f"finished, {count} failed" in page
        assert "&lt;i&gt;icons&lt;/i&gt;.csv" in page
        assert shown_rows(page) == list(range(1, 11))
        assert ">SKU-7</a>" in page or ">SKU-7</span>" in page
        assert "&lt;b&gt;&amp;Co · garden tool" in page
        assert page.count('class="thumb image"') == 4 * (10 - count)
        table = re.search(r'href="(/api/batches/[^"]+results.csv[^"]*)"', page)
        assert table is not None
        assert (await found.site.client.get(table[1])).text.startswith("\ufeffSKU,client,row,")
        only = shown_rows(await found.page("?show=failed"))
        assert len(only) == count
        group = failed[0]
        assert f"<strong>{group.count}</strong> {group.code}" in page
        assert group.advice is not None
        assert group.advice.sentence in page
        assert len(shown_rows(await found.page(f"?show=failed&error={group.code}"))) == group.count
        assert shown_rows(await found.page("?show=running")) == []
        assert len(shown_rows(await found.page("?show=completed"))) == 10 - count
        listed = (await found.site.client.get("/batches")).text
        assert f"finished, {count} failed" in listed
        assert "&lt;i&gt;icons&lt;/i&gt;.csv" in listed
        assert 'class="thumb image"' in listed
        for wrong in ("?show=asleep", "?after=x", "?row=x"):
            answer = await found.site.client.get(f"/batches/{found.batch_id}{wrong}")
            assert answer.status_code == 400, wrong


@pytest.mark.served_twice
async def test_many_rows_are_reached_by_page_and_by_row(small_site: Site) -> None:
    """A hundred on a page, with numbered pages of which the near ones are named, and a way to any
    row; rows may be missing from the sheet."""
    one = BatchRow(
        batch_id="bat_1",
        workspace_id="default",
        technique_id="tech_1",
        name="sheet.csv",
        created_at=utc_now(),
    )
    numbers = [number for number in range(1, 2004) if not 101 <= number <= 103]
    rows = [BatchEntry(position=n, line=n + 1, digest=f"{n:064}") for n in numbers]
    await batches.keep(small_site.services.database, one, rows)
    small_site.client.headers.update(HTML)
    first = (await small_site.client.get("/batches/bat_1")).text
    assert shown_rows(first) == list(range(1, 101))
    pages = re.search(r'aria-label="Pages of rows">(.*?)</nav>', first, re.DOTALL)
    assert pages is not None
    links = dict(re.findall(r'<a href="([^"]+)"[^>]*>(\d+)</a>', pages[1]))
    assert list(links.values()) == ["1", "2", "3", "20"]
    last = (await small_site.client.get(list(links)[-1])).text
    assert shown_rows(last) == list(range(1904, 2004))
    for row, begins in ((1, 1), (100, 1), (104, 104), (150, 104), (1500, 1404), (5000, 1904)):
        answer = await small_site.client.get(f"/batches/bat_1?row={row}")
        assert answer.status_code == 303
        assert answer.headers["Location"].endswith(f"#row-{row}")
        there = (await small_site.client.get(answer.headers["Location"])).text
        assert shown_rows(there)[0] == begins, row


async def test_every_page_counts_the_same_rows_as_failed(small_site: Site) -> None:
    """The batch, the list and the overview: rows that could not be sent have failed, too. A row
    whose run retention has removed is not one that waits to be started."""
    database = small_site.services.database
    one = BatchRow(
        batch_id="bat_1",
        workspace_id="ws_1",
        technique_id="tech_1",
        name="sheet.csv",
        created_at=utc_now(),
    )
    rows = [BatchEntry(position=n, line=n + 1, digest=f"{n:064}") for n in range(1, 8)]
    await batches.keep(database, one, rows)
    states = dict(zip((row.key for row in rows), ("refused", "started", "started"), strict=False))
    columns = {"workspace_slot": "ws_1", "technique_id": "tech_1", "fingerprint": "", "inputs": []}
    listed = [
        columns
        | {"idempotency_key": key, "state": state, "created_at": utc_now()}
        | {"run_id": f"run_{number}" if state == "started" else None}
        for number, (key, state) in enumerate(states.items())
    ]
    await database.write(lambda connection: connection.execute(insert(starts), listed))
    unsent = dict.fromkeys((4, 5, 6), "no money left")
    await batches.finish(database, one, None, errors=unsent)
    # The overview shows batches beside runs.
    other = Observation(run_id="run_other", at=utc_now(), source=Source.TRACK)
    await small_site.services.writer.submit(Observed(observation=other))
    pages = ("/batches/bat_1", "/batches", "/")
    shown = [(await small_site.client.get(path, headers=HTML)).text for path in pages]
    for page in shown[:2]:
        assert "6 of 7 rows finished, 4 failed, 2 removed by retention, 1 not started" in page
    assert "Why 4 failed" in shown[0]
    assert "1 row was not started" in shown[0]
    assert '<span class="bad-word">4 failed</span>' in shown[2]


async def test_failed_rows_are_retried_at_a_confirmed_price(serve: Serve, sqlite_url: str) -> None:
    """The confirmation names number and price, and the new runs belong to the same rows. A higher
    price, a foreign page and a token that only reads start nothing; a second press neither."""
    reader = TokenSettings(name="producer", token=READER, scopes={Scope.READ})  # type: ignore[arg-type]
    codes = ("model_timeout", "safety_blocked")
    async with _with_token(serve, sqlite_url, reader, failure_codes=codes) as found:
        client, address = found.site.client, f"/batches/{found.batch_id}/retry"
        assert (await sign_in(client, READER)).status_code == 303
        page = await found.page()
        assert "Retry" not in page
        assert (await client.get(address)).status_code == 403
        form = {"which": "failed", "max_cost": "99", "csrf_token": csrf_of(page)}
        assert (await client.post(address, data=form)).status_code == 403
        await client.post("/logout", data={"csrf_token": csrf_of(page)})
        assert (await sign_in(client, TOKEN)).status_code == 303
        groups = await sheet_rows.error_groups(found.site.services.database, found.batch_id)
        count = {group.code: group.count for group in groups}["model_timeout"]
        question = f"Start {count} run{'s' * (count > 1)} again, up to ${0.25 * count:.2f}"
        page = await found.page()
        assert f'href="{address}?only_failed=true"' in page
        confirm = (await client.get(address)).text
        assert f">{question}</button>" in confirm
        price = re.search(r'name="max_cost" value="([^"]+)"', confirm)
        assert price is not None
        form = {"which": "failed", "max_cost": price[1], "csrf_token": csrf_of(confirm)}
        before = len(found.flora.world.runs)
        assert (await client.post(address, data=form | {"csrf_token": "x"})).status_code == 403
        cheap = await client.post(address, data=form | {"max_cost": "0.01"})
        assert cheap.status_code == 402
        assert "nothing was started" in cheap.text
        for wrong in ({"which": "some"}, {"which": ""}, {"max_cost": "much"}):
            assert (await client.post(address, data=form | wrong)).status_code == 400
        assert len(found.flora.world.runs) == before
        answers = await asyncio.gather(*(client.post(address, data=form) for _ in range(2)))
        assert {answer.status_code for answer in answers} == {303}

        async def started() -> bool:
            return len(found.flora.world.runs) == before + count

        await eventually(started, timeout=30)
        assert shown_rows(await found.page()) == list(range(1, 11))


async def test_a_batch_is_stopped_by_a_button(serve: Serve, sqlite_url: str) -> None:
    """No row is started any more, and the page says who stopped it."""
    async with with_flora(serve, sqlite_url) as (site, flora):
        rows = [{"prompt": "garden tools"}, {"prompt": "beach toys"}]
        ordered = {"technique": "icon-pack", "rows": rows}
        made = (await site.client.post("/api/batches", json=ordered)).json()
        address = f"/batches/{made['batch_id']}"
        page = (await site.client.get(address, headers=HTML)).text
        assert f'action="{address}/stop"' in page
        answer = await site.client.post(f"{address}/stop", headers=HTML)
        assert answer.status_code == 303
        page = (await site.client.get(address, headers=HTML)).text
        assert "Stopped: stopped by local" in page
        assert "/stop" not in page
        await site.services.batch_worker.launch_due()
        assert not flora.world.runs


async def test_only_the_failed_rows_of_an_interrupted_batch_are_retried(
    serve: Serve, sqlite_url: str
) -> None:
    """The question names the rows without a run, and leads to a retry that starts them, too; both
    say the number of each."""
    async with finished(serve, sqlite_url, failure_codes=("model_timeout",)) as found:
        database = found.site.services.database
        stored = await batches.get(database, found.batch_id)
        assert stored is not None
        inputs = [{"id": "prompt", "type": "text", "value": "garden tool"}]
        entries = [
            BatchEntry(position=n, line=n + 1, digest=f"{n:064}", inputs=inputs) for n in (11, 12)
        ]
        await batches.keep(database, stored, entries)
        (group,) = await sheet_rows.error_groups(database, found.batch_id)
        client, address = found.site.client, f"/batches/{found.batch_id}/retry"
        page = await found.page()
        assert f'href="{address}?only_failed=true"' in page
        assert f"Retry {group.count} rows…" in page
        assert "Start 2 rows…" in page
        only = (await client.get(f"{address}?only_failed=true")).text
        assert f"Start {group.count} runs again, up to ${0.25 * group.count:.2f}?" in only
        assert "2 rows without a run are left out." in only
        assert f'href="{address}?which=failed">Include them</a>' in only
        confirm = (await client.get(f"{address}?which=failed")).text
        assert f'{address}?which=failed&amp;only_failed=true">Leave them out</a>' in confirm
        assert f"Start {group.count + 2} runs, up to ${0.25 * (group.count + 2):.2f}?" in confirm
        assert f"{group.count} rows that failed for a passing reason are started again." in confirm
        assert "2 rows without a run are started." in confirm
        before = len(found.flora.world.runs)
        form = {"which": "failed", "only_failed": "true", "csrf_token": csrf_of(only)}
        assert (await client.post(address, data=form)).status_code == 303

        async def stopped() -> bool:
            page = await found.page()
            return "Stopped: only failed rows" in page and "2 rows were not started" in page

        await eventually(stopped, timeout=30)
        assert len(found.flora.world.runs) == before + group.count


@asynccontextmanager
async def _with_token(
    serve: Serve, url: str, reader: TokenSettings, **options: Any
) -> AsyncIterator[BatchSite]:
    """As `finished`, with a token for everything and one that reads."""

    def with_reader(database_url: str, **more: Any) -> Any:
        return serve(database_url, **more, tokens=(reader,))

    async with finished(with_reader, url, token=TOKEN, **options) as found:
        yield found


async def test_outputs_come_as_one_zip(serve: Serve, sqlite_url: str) -> None:
    """Files are named by a column or by row, in the order of the sheet, and what is missing is in a
    list. A column that is unknown is a readable 400."""
    async with finished(serve, sqlite_url) as found:
        client, address = found.site.client, f"/batches/{found.batch_id}/outputs.zip"
        gone = next(run for run in found.flora.world.runs.values() if run.outputs)
        expired = update(run_outputs).where(run_outputs.c.run_id == gone.run_id)
        expired = expired.values(url=f"{found.flora.base_url}/no/such/file.png")
        await found.site.services.database.write(lambda connection: connection.execute(expired))
        answer = await client.get(address, params={"name_by": "sku"})
        assert answer.headers["Content-Type"] == "application/zip"
        assert "filename=" in answer.headers["Content-Disposition"]
        with zipfile.ZipFile(io.BytesIO(answer.content)) as files:
            assert files.testzip() is None
            names = files.namelist()
            missing = files.read(downloads.MISSING).decode()
            assert files.read(names[0]).startswith(b"\x89PNG")
        assert names[-1] == downloads.MISSING
        numbers = [int(re.findall(r"SKU-(\d+)_icon_[1-4]\.png", name)[0]) for name in names[:-1]]
        assert numbers == sorted(numbers)
        failed = shown_rows(await found.page("?show=failed"))
        assert all(f"row {number:03}: failed" in missing for number in failed)
        assert missing.count(gone.run_id) == 4
        assert len(names) == 1 + 4 * (10 - len(failed)) - 4
        by_row = (await client.get(address)).content
        with zipfile.ZipFile(io.BytesIO(by_row)) as files:
            assert re.fullmatch(r"0\d\d_icon_1\.png", files.namelist()[0])
        wrong = await client.get(address, params={"name_by": "colour"})
        assert wrong.status_code == 400
        assert "SKU" in wrong.text
        assert (await client.head(address)).status_code == 200


async def move_outputs(found: BatchSite, here: str, there: str) -> None:
    """Let the files of all runs be served by another server."""
    url = func.replace(run_outputs.c.url, here, there)
    await found.site.services.database.execute(run_outputs.update().values(url=url))


async def test_few_zips_are_sent_at_once(
    serve: Serve, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One more than allowed is refused; who leaves early makes room and leaves no file behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with (
        finished(serve, sqlite_url, limits=Limits(archives=1), failures=0) as found,
        Receiver(silent=True) as silent,
    ):
        client, address = found.site.client, f"/batches/{found.batch_id}/outputs.zip"
        here, there = found.flora.root, silent.url.removesuffix("/hook")
        await move_outputs(found, here, there)
        async with client.stream("GET", address) as first:
            assert first.status_code == 200
            second = await client.get(address)
            assert second.status_code == 429
            assert second.headers["Retry-After"]
            assert list(tmp_path.glob("flora-zip-*"))
        await move_outputs(found, there, here)

        async def has_room() -> bool:
            return (await client.get(address)).status_code == 200

        await eventually(has_room)
        await eventually(lambda: not list(tmp_path.glob("flora-zip-*")))
