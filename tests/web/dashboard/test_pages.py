"""The pages: what they show, also while there is nothing to show, and how they are sent."""

import json
import re
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.support.deliveries import Delivered, keep
from tests.support.started import of_start
from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, TOKEN
from tracker.core.clock import utc_now
from tracker.core.errors import KeyRefused
from tracker.core.observation import Observation, Source
from tracker.core.record import Delivery, FailedRead, Observed
from tracker.core.run import Output, RunError, RunStatus
from tracker.store import coordination
from tracker.store.queries import batches, sweeps
from tracker.store.queries import sweeps as coverage
from tracker.store.queries.batches import BatchEntry, BatchRow

pytestmark = pytest.mark.served_twice

PATHS = ["/", "/runs", "/deliveries", "/techniques", "/health", "/runbook.html"]


async def _text(site: Site, path: str, status: int = 200) -> str:
    answer = await site.client.get(path, headers=HTML)
    assert answer.status_code == status, answer.text
    return answer.text


def _seen(run_id: str, status: RunStatus = RunStatus.RUNNING, **facts: object) -> Observed:
    values = {"source": Source.POLL, "at": utc_now(), "created_at": utc_now(), **facts}
    return Observed(observation=Observation(run_id=run_id, status=status, **values))  # type: ignore[arg-type]


async def test_an_empty_page_names_the_next_step(small_site: Site) -> None:
    """Each page names the setting or the command that is missing."""
    for path, advice in (
        ("/", "tracker simulate"),
        ("/runs", "tracker simulate"),
        ("/deliveries", "TRACKER_PUBLIC_URL"),
        ("/techniques", "FLORA_API_KEY"),
        ("/health", "FLORA_API_KEY"),
    ):
        assert advice in await _text(small_site, path), path


async def test_with_a_key_it_names_the_commands(serve: Serve, sqlite_url: str) -> None:
    """Each empty page names the command for the next step."""
    set_up = {"flora_api_key": "sk_test", "tracker_public_url": "http://127.0.0.1:9"}
    async with serve(sqlite_url, **set_up) as site:
        for path, command in (
            ("/", "tracker runs start"),
            ("/techniques", "tracker techniques sync"),
            ("/health", "tracker reconcile"),
            ("/deliveries", "http://127.0.0.1:9/callbacks/flora"),
        ):
            assert command in await _text(site, path), path


async def test_an_unknown_value_is_not_zero(small_site: Site) -> None:
    """Without a finished run there is no rate, no delay and no cost, and the page says so."""
    await small_site.services.writer.submit(_seen("run_1"))
    text = await _text(small_site, "/")
    for title in ("Callback miss rate", "Detection delay", "</svg>Cost<"):
        shown = text.split(title)[1][:400]
        assert "no data yet" in shown, title
        assert "$0" not in shown
        assert "0 %" not in shown
    run = await _text(small_site, "/runs/run_1")
    assert "$0" not in run
    assert re.search(r"Cost</dt><dd><span class=\"muted\">not yet", run)
    summary = run.split('aria-label="Summary"')[1].split("</section>")[0]
    assert "not yet" not in summary, "of what, only a label says"


async def test_a_dead_worker_polls_no_run(small_site: Site) -> None:
    """A worker is named until its lease has expired."""
    services = small_site.services
    await services.writer.submit(_seen("run_1"))
    for left, is_shown in ((timedelta(minutes=1), True), (timedelta(0), False)):
        due_at, until = services.clock() + timedelta(hours=1), services.clock() + left
        await coordination.claim_due(
            services.database,
            holder="worker-7",
            now=due_at,
            lease=until - due_at,
            limit=1,
            workspaces=None,
        )
        assert ("Polled by worker" in await _text(small_site, "/runs/run_1")) is is_shown


async def test_a_refused_key_is_the_first_alert(serve: Serve, sqlite_url: str) -> None:
    """With its duration and what to do."""
    async with serve(sqlite_url, flora_api_key="sk_test", flora_workspace_id="ws_1") as site:
        refusal = KeyRefused(status=401, code="invalid_api_key", message="The key is not valid.")
        workspace = next(iter(site.services.workspaces))
        workspace.require_client().contact.asked()
        workspace.require_client().breaker.refused(refusal)
        text = await _text(site, "/")
        alerts = text.split("what needs attention<")[1]
        assert alerts.index("FLORA has refused the API key since") < 600
        assert 'href="/runbook.html#trackerkeyrefused"' in alerts
        assert "The key is not valid. No run is lost by this" in text
        assert "All clear" not in text


async def test_the_overview_shows_the_day(site: Site) -> None:
    """States, ends by hour, missed callbacks, delay, cost and alerts, on each engine."""
    now = utc_now()
    ended = now - timedelta(seconds=3)
    for number, via in enumerate((Source.CALLBACK, Source.CALLBACK, Source.POLL)):
        run_id = f"run_{number}"
        begin = Observation(
            run_id=run_id, source=Source.START, at=now - timedelta(minutes=1), technique_id="tech_a"
        )
        await site.services.writer.submit(Observed(observation=begin, callback_expected=True))
        if via is Source.CALLBACK:
            reported = Observation(
                run_id=run_id, source=Source.CALLBACK, at=now, status=RunStatus.COMPLETED
            )
            came = Delivery(delivery_id=f"whd_{number}", received_at=now, body=b"{}", run_id=run_id)
            await keep(site.services.database, Delivered(delivery=came))
            await site.services.writer.submit(Observed(observation=reported))
        await site.services.writer.submit(
            _seen(run_id, RunStatus.COMPLETED, completed_at=ended, charged_cost=Decimal("0.25"))
        )
    await site.services.writer.submit(_seen("run_late", at=now - timedelta(hours=2)))
    await site.services.writer.submit(
        FailedRead(run_id="run_late", at=now - timedelta(hours=1), error="FLORA answered 503")
    )
    text = await _text(site, "/")
    tiles = dict(re.findall(r"state=(\w+)\"><span.*?class=\"count\">(\d+)<", text, re.DOTALL))
    assert tiles["running"] == "1"
    assert tiles["completed"] == "3"
    assert "33.3 %" in text
    assert "$0.75" in text
    assert "Runs are overdue" in text
    assert "FLORA answered 503" in text
    assert "All clear" not in text
    chart = json.loads(re.search(r'data-chart="([^"]+)"', text)[1].replace("&#34;", '"'))  # type: ignore[index]
    assert chart["series"] == ["completed", "failed"]
    assert [sum(column) for column in chart["columns"][1:]] == [3, 0]
    assert len(chart["columns"][0]) == 24
    assert "7 days" in await _text(site, "/?span=7d")


async def test_the_overview_says_once_what_it_does_not_know(serve: Serve, sqlite_url: str) -> None:
    """A delay below the shortest that is told apart; bills still to come; bills that never came."""
    async with serve(
        sqlite_url, tracker_cost_recheck=1, tracker_cost_give_up=timedelta(seconds=2)
    ) as site:
        for run_id in ("run_1", "run_2", "run_3"):
            await site.services.writer.submit(_seen(run_id))
        now = utc_now()
        for run_id, facts in (
            ("run_1", {"charged_cost": Decimal("0.25")}),
            ("run_2", {}),
            ("run_3", {}),
        ):
            end = _seen(run_id, RunStatus.COMPLETED, at=now, completed_at=now, **facts)
            await site.services.writer.submit(end)
        assert "The bills of 3 runs are not final." in await _text(site, "/")
        late = now + timedelta(seconds=3)
        for run_id in ("run_2", "run_3"):
            read = _seen(run_id, RunStatus.COMPLETED, at=late, completed_at=now)
            await site.services.writer.submit(replace(read, reads=1))
        text = await _text(site, "/")
    assert "under 0.1 s" in text
    assert "The bill of 1 run is not final." in text
    assert "FLORA never billed 2 runs: their cost is unknown." in text


async def test_the_overview_shows_batches_and_results_and_no_empty_part(site: Site) -> None:
    """Batches in progress and the newest outputs, with a picture only where it is one; a part that
    has nothing to show is left out. On each engine."""
    now = utc_now()
    await site.services.writer.submit(_seen("run_1"))
    text = await _text(site, "/")
    for title in ("Batches in progress", "Newest results", "Overdue", "Cost today by"):
        assert title not in text, title
    for batch_id, age in (("bat_new", 0), ("bat_old", 8)):
        batch = BatchRow(
            batch_id=batch_id,
            workspace_id="default",
            technique_id="tech_a",
            name=f"{batch_id}.csv",
            created_at=now - timedelta(days=age),
        )
        rows = [BatchEntry(position=n, line=n + 1, digest=f"{n:064}") for n in range(1, 4)]
        await batches.keep(site.services.database, batch, rows)
    outputs = (
        Output("o1", "imageUrl", "https://cdn.example/1.png"),
        Output("o2", "text", "A poem"),
        Output("o3", "imageUrl", "https://cdn.example/3.png"),
    )
    await site.services.writer.submit(_seen("run_2", RunStatus.COMPLETED, outputs=outputs))
    text = await _text(site, "/")
    assert "bat_new.csv" in text
    assert "0 of 3 completed" in text
    assert "bat_old.csv" not in text
    newest = text.split("Newest results")[1].split("</section>")[0]
    assert re.findall(r'<img src="([^"]+)"', newest) == ["https://cdn.example/1.png"]
    assert 'loading="lazy"' in newest
    assert newest.count('href="/runs/run_2"') == 2
    # By the time that stands below them: a run that took long ended after one that began later.
    late = _seen(
        "run_3",
        RunStatus.COMPLETED,
        outputs=outputs[:1],
        created_at=now - timedelta(hours=1),
        completed_at=utc_now() + timedelta(seconds=1),
    )
    await site.services.writer.submit(late)
    newest = (await _text(site, "/")).split("Newest results")[1].split("</section>")[0]
    assert re.findall(r'href="/runs/(run_\d)"', newest) == ["run_3", "run_2", "run_2"]


async def test_the_runbook_is_served_and_linked(serve: Serve, sqlite_url: str) -> None:
    """Every section that an alert may link to; links to other documentation lead to where it is
    published, or are plain text."""
    async with serve(sqlite_url) as site:
        text = await _text(site, "/runbook.html")
        assert 'id="trackerfloraunreachable"' in text
        assert 'href="#trackercallbacksmissed"' in text
        assert ".md" not in " ".join(re.findall(r'href="([^"]*)"', text))
        await site.services.writer.submit(_seen("run_late", at=utc_now() - timedelta(hours=2)))
        assert 'href="/runbook.html#trackerrunsoverdue"' in await _text(site, "/")
    root = "https://docs.example.com/tracker"
    async with serve(sqlite_url, tracker_docs_url=root) as site:
        assert f'href="{root}/runbook.html#trackerrunsoverdue"' in await _text(site, "/")
        assert f'href="{root}/metrics.html"' in await _text(site, "/runbook.html")


async def test_a_failed_sweep_is_an_alert(serve: Serve, sqlite_url: str) -> None:
    """Its error is shown on the overview and in the list of sweeps."""
    key = {"flora_api_key": "sk_test", "flora_workspace_id": "ws_1"}
    async with serve(sqlite_url, **key) as site:
        now = utc_now()
        number = await sweeps.begin(site.services.database, "ws_1", now)
        await sweeps.finish(
            site.services.database,
            number,
            at=now,
            pages=1,
            items=2,
            discovered=0,
            repaired=0,
            error="FLORA was away",
        )
        assert "The last history sweep failed" in await _text(site, "/")
        assert "FLORA was away" in await _text(site, "/health")


@pytest.mark.parametrize(("cron", "minutes"), [("*/5 * * * *", 25), ("0 * * * *", 190)])
async def test_a_sweep_is_late_by_the_schedule(
    serve: Serve, sqlite_url: str, cron: str, minutes: int
) -> None:
    """After three intervals and ten minutes, like the alert `TrackerSweepLate` and the doctor."""
    key = {"flora_api_key": "sk_test", "flora_workspace_id": "ws_1"}
    async with serve(sqlite_url, **key, tracker_reconcile_cron=cron) as site:
        database = site.services.database
        for late, ago in ((True, minutes + 1), (False, minutes - 1)):
            at = utc_now() - timedelta(minutes=ago)
            number = await sweeps.begin(database, "ws_1", at)
            found = {"pages": 1, "items": 2, "discovered": 0, "repaired": 0}
            await sweeps.finish(database, number, at=at, **found)
            shown = "No history sweep has been complete" in await _text(site, "/")
            assert shown is late, f"{ago} min"


async def test_a_run_shows_everything(site: Site) -> None:
    """State, error, outputs by type, timeline, callbacks, and the reason of the next poll."""
    await site.services.writer.submit(
        of_start(
            Observed(
                observation=Observation(
                    run_id="run_1", source=Source.START, at=utc_now(), technique_id="tech_a"
                ),
                callback_expected=True,
            ),
            inputs=[{"id": "face", "type": "imageUrl", "value": "https://example.com/face.png"}],
        )
    )
    outputs = (
        Output("o1", "imageUrl", "https://cdn.example/1.png"),
        Output("o2", "videoUrl", "https://cdn.example/2.mp4"),
        Output("o3", "audioUrl", "https://cdn.example/3.wav"),
        Output("o4", "documentUrl", "https://cdn.example/4.pdf"),
        Output("o5", "text", "A poem.\nTwo lines."),
        Output("o6", "imageUrl", "ftp://cdn.example/6.png"),
    )
    await site.services.writer.submit(
        _seen(
            "run_1",
            RunStatus.FAILED,
            error=RunError("model_timeout", "It took too long"),
            outputs=outputs,
        )
    )
    text = await _text(site, "/runs/run_1")
    assert '<img src="https://cdn.example/1.png"' in text
    assert '<video src="https://cdn.example/2.mp4" controls' in text
    assert '<audio src="https://cdn.example/3.wav" controls' in text
    assert "Open the document" in text
    assert "A poem.\nTwo lines." in text
    assert "not a web address, shown as text" in text
    assert "<strong>model_timeout</strong> It took too long" in text
    assert 'alt="Image 1"' in text
    assert "FLORA answered the start with this run: pending." in text
    assert text.count("The observation as JSON") == 2
    assert "never came" in text
    assert 'href="https://example.com/face.png"' in text
    assert "No further poll: the run is settled" in text


async def test_an_id_may_hold_any_character(small_site: Site) -> None:
    """The list's link leads to the run, whatever its id is."""
    for run_id in ("run/with/slashes", "run ? # & %", "rün…"):
        await small_site.services.writer.submit(_seen(run_id))
    page = await _text(small_site, "/runs")
    for href in re.findall(r'class="id" href="(/runs/[^"]+)"', page):
        assert "<h1" in await _text(small_site, href.replace("&amp;", "&"))


async def test_runs_are_filtered_and_paged(small_site: Site) -> None:
    """Filters stay in the links between pages; a wrong one is a readable 400."""
    now = utc_now()
    await small_site.services.writer.submit_all(
        [_seen(f"run_{n:03}", created_at=now - timedelta(minutes=n)) for n in range(60)]
    )
    first = await _text(small_site, "/runs?state=running&text=run_")
    assert len(re.findall(r'<tr role="row" id="row-', first)) == 50
    older = re.search(r'href="([^"]+)" rel="next"', first)
    assert older is not None
    link = older[1].replace("&amp;", "&")
    assert "state=running" in link
    second = await _text(small_site, link)
    assert len(re.findall(r'<tr role="row" id="row-', second)) == 10
    assert "Newest" in second
    assert "No matching runs" in await _text(small_site, "/runs?state=failed")
    for wrong in ("state=asleep", "within=ever", "from=tomorrow", "cursor=nonsense"):
        assert "Invalid request" in await _text(small_site, f"/runs?{wrong}", 400)
    recent = await _text(
        small_site, f"/runs?from={(now - timedelta(minutes=5)):%Y-%m-%dT%H:%M:%SZ}"
    )
    assert len(re.findall(r'<tr role="row" id="row-', recent)) == 6


async def test_batches_are_paged(small_site: Site) -> None:
    """Fifty on a page, and a way to the rest and back; a wrong cursor is a readable 400."""
    now = utc_now()
    for number in range(52):
        at = now - timedelta(minutes=number)
        one = BatchRow(
            batch_id=f"bat_{number}",
            workspace_id="default",
            technique_id="tech_1",
            name=f"sheet-{number}.csv",
            created_at=at,
        )
        await batches.keep(small_site.services.database, one, [])
    first = await _text(small_site, "/batches")
    assert len(re.findall(r'<tr role="row" id="row-', first)) == 50
    older = re.search(r'href="([^"]+)" rel="next"', first)
    assert older is not None
    second = await _text(small_site, older[1].replace("&amp;", "&"))
    assert re.findall(r"sheet-\d+\.csv", second) == ["sheet-50.csv", "sheet-51.csv"]
    assert 'href="/batches">Newest' in second
    assert "Invalid request" in await _text(small_site, "/batches?cursor=nonsense", 400)


async def test_coverage_is_shown_as_bars(small_site: Site) -> None:
    """A bar for each kind of runs shows what was read and each gap, with its error as text; the
    overview leads there."""
    database, now = small_site.services.database, utc_now()
    page = await _text(small_site, "/health")
    assert "<svg viewBox" not in page
    await coverage.add(database, "ws_1", "generation", _read(now, 9, 0))
    error = "FLORA answered 400: <b>too deep</b>"
    more = {"error": error, "failures": 2, "retry_at": now + timedelta(minutes=7)}
    await coverage.add(database, "ws_1", "technique", _read(now, 10, 5), _read(now, 4, 0, **more))
    page = await _text(small_site, "/health")
    assert len(re.findall('<rect class="read"', page)) == 3
    assert len(re.findall('<rect class="unread" x="500.0" width="100.0"', page)) == 1
    assert "Checked against FLORA up to" in page
    assert "FLORA answered 400: &lt;b&gt;too deep" in page
    assert "2 attempts" in page
    assert "1 gap in FLORA" in await _text(small_site, "/")


def _read(now: datetime, begin: float, end: float, **more: Any) -> coverage.Interval:
    """An interval that was read, in days before now."""
    first, last = (now - timedelta(days=days) for days in (begin, end))
    return coverage.Interval(from_at=first, to_at=last, read_at=now, **more)


async def test_sweeps_are_paged(small_site: Site) -> None:
    """By their number; anything else is refused."""
    for _ in range(52):
        await sweeps.begin(small_site.services.database, "ws_1", utc_now())
    first = await _text(small_site, "/health")
    older = re.search(r'href="(/health\?before=\d+)"', first)
    assert older is not None
    assert len(re.findall(r'<tr role="row" id="row-', await _text(small_site, older[1]))) == 2
    await _text(small_site, "/health?before=x", 400)


async def test_a_missing_page_is_an_error_page(small_site: Site) -> None:
    """A page for a browser, JSON for a program."""
    for path in ("/runs/none", "/deliveries/none", "/techniques/none", "/nothing"):
        assert "Not found" in await _text(small_site, path, 404), path
        program = await small_site.client.get(path)
        assert program.status_code == 404, path
        assert program.json()["error"]["code"] == "not_found", path


async def test_pages_keep_to_themselves(small_site: Site) -> None:
    """A strict content policy without exceptions, nothing stored, nothing framed."""
    answer = await small_site.client.get("/", headers=HTML)
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy == {
        "default-src": "'self'",
        "img-src": "'self' https: data:",
        "media-src": "https:",
        "object-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "same-origin"


async def test_assets_are_kept_for_good_under_their_hash(serve: Serve, sqlite_url: str) -> None:
    """All that a page names is there, without signing in; under an old address it is not kept."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        page = (await site.client.get("/login", headers=HTML)).text
        names = set(re.findall(r'(?:href|src)="(/static/[^"#]+)', page))
        names |= {f"{next(iter(names)).rsplit('/static/')[0]}"} - {""}
        assert len(names) >= 4
        for name in names:
            answer = await site.client.get(name)
            assert answer.status_code == 200, name
            assert "immutable" in answer.headers["Cache-Control"]
        old = re.sub(r"/static/[0-9a-f]+/", "/static/0000/", next(iter(names)))
        assert (await site.client.get(old)).headers["Cache-Control"] == "no-cache"
        for wrong in ("/static/x/none.css", "/static/x/../site.py", "/static/x/vendor/README.md"):
            assert (await site.client.get(wrong)).status_code == 404


async def test_the_modules_import_only_what_is_there(small_site: Site) -> None:
    """Each import of a script leads to another one, under the same hash."""
    page = await _text(small_site, "/")
    main = re.search(r'type="module" src="([^"]+)"', page)
    assert main is not None
    folder = main[1].rsplit("/", 1)[0]
    code = (await small_site.client.get(main[1])).text
    imported = re.findall(r'import "\./([\w.]+)"', code)
    assert len(imported) >= 5
    for name in imported:
        answer = await small_site.client.get(f"{folder}/{name}")
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/javascript")
