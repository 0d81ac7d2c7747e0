"""What is asked of the database: by workers, by the API and the pages, by views and dashboards.

Each question is asked of the small database and of the big one in turn. The medians are shown; the
quickest answers are compared, as other work on the machine touches them least. The tracker's own
questions are its own functions, so that nothing is measured which nobody asks.
"""

import asyncio
import json
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text

from bench.report import Report, Table, say
from bench.scale.databases import Plot
from tests.store.making import open_writer, started
from tracker.core.clock import utc_now
from tracker.core.errors import StoreUnavailable
from tracker.core.starts import Budget, Period
from tracker.store import coordination
from tracker.store.engine import Database
from tracker.store.queries import overview, search, spending, sweeps
from tracker.store.queries import runs as feed
from tracker.store.queries import runs as read
from tracker.store.queries.deliveries import list_deliveries
from tracker.store.queries.search import SearchFilters
from tracker.store.queries.sheet_rows import search_sheets

ROUNDS: Final = 15
WANTED: Final = 2.0
"""No question may take longer than so many times."""
LEAST_MS: Final = 0.5
"""What differs by less is noise."""
CLAIMED: Final = 100
HOLDER: Final = "bench"
SOON: Final = timedelta(hours=1)
"""By then all that is active is due."""

VIEWS: Final = (
    *("v_run_states", "v_ends_hourly", "v_lags_hourly", "v_callback_health", "v_cost_daily"),
    *("v_spending_daily", "v_overdue_runs", "v_sweeps", "v_open_starts", "v_quarantine"),
)
BUDGETS: Final = {
    "a budget of a month": Budget(usd=Decimal(9), period=Period.MONTH, workspace_id="ws_1"),
    "a budget in total": Budget(usd=Decimal(9), period=Period.TOTAL),
}
LAST_DAY: Final = {"v_ends_hourly": "hour", "v_lags_hourly": "hour", "v_cost_daily": "day"}
GRAFANA: Final = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "runs.json"
GRAFANA_SPAN: Final = timedelta(days=7)

Question = Callable[[Database], Awaitable[Any]]
Questions = Mapping[str, Question]


async def claim(db: Database) -> None:
    """What a worker does when a hundred runs are due."""
    found = await coordination.claim_due(
        db, holder=HOLDER, now=utc_now() + SOON, lease=timedelta(seconds=60), limit=CLAIMED
    )
    assert len(found) == CLAIMED


async def give_back(db: Database) -> None:
    """So that the next round finds them."""
    await coordination.release(db, HOLDER)


def of_workers() -> Questions:
    """What happens all the time."""
    return {
        f"claiming {CLAIMED} due runs": claim,
        "the next moment that something is due": partial(coordination.next_due_at, now=utc_now()),
        "a scrape of the metrics": partial(overview.read_gauges, now=utc_now()),
        "what waits, which the pages count": partial(overview.counts, now=utc_now()),
        "durations of a technique": lambda db: read.durations_of(db, ["tech_1"]),
    }


def of_pages(run_id: str, cursor: str | None) -> Questions:
    """The API's pages and the dashboard's. `cursor` leads deep into the list."""
    runs = {
        "runs": {},
        "runs, a page in the middle": {"cursor": cursor},
        "runs that completed": {"status": "completed"},
        "runs that failed": {"status": "failed"},
        "runs that are running": {"status": "running"},
        "runs that are settled": {"tracking": "settled"},
        "runs that are active": {"tracking": "active"},
        "runs that are lost": {"tracking": "lost"},
        "runs of a technique": {"technique_id": "tech_1"},
        "runs of a workspace": {"workspace_id": "ws_1"},
        "failed runs of a technique": {"status": "failed", "technique_id": "tech_1"},
    }
    searches = {
        "search: completed": SearchFilters(state="completed"),
        "search: details": SearchFilters(state="details"),
        "search: a word": SearchFilters(text="overload"),
        "search: a word in a workspace": SearchFilters(text="overload", workspace_id="ws_1"),
        "search: by cost": SearchFilters(sort=search.Sort.COST),
        "search: by duration": SearchFilters(sort=search.Sort.DURATION),
        "search: by cost, of a technique": SearchFilters(
            sort=search.Sort.COST, technique_id="tech_1"
        ),
    }
    return {
        **{name: partial(read.list_runs, **given) for name, given in runs.items()},
        **{name: partial(search.search_runs, wanted=given) for name, given in searches.items()},
        "search: number of results": partial(
            search.count_runs, wanted=SearchFilters(text="overload")
        ),
        "search: sheets and cells": partial(search_sheets, text="overload"),
        "a run": partial(read.get_run, run_id=run_id),
        "its timeline": partial(read.events, run_id=run_id),
        "its callbacks": partial(list_deliveries, run_id=run_id),
        "callbacks": list_deliveries,
        "callbacks in quarantine": partial(list_deliveries, outcome="quarantined"),
        "the stream's newest line": feed.newest_event,
        "overview: states": overview.states,
        "overview: ends, 48 h": partial(overview.ends_by_hour, now=utc_now(), hours=48),
        "overview: callbacks": partial(overview.callback_health, now=utc_now()),
        "overview: lags": partial(overview.lags, now=utc_now()),
        "overview: costs": partial(overview.costs, now=utc_now()),
        "overview: overdue": partial(overview.overdue, now=utc_now()),
        "overview: sweeps": sweeps.sweep_health,
        "overview: conflicts": overview.conflicts,
        **{
            name: partial(spending.usages, budgets=[one], now=utc_now())
            for name, one in BUDGETS.items()
        },
        "spending by day": partial(spending.spending, by="day"),
        "spending by technique": partial(spending.spending, by="technique"),
    }


def of_views(now: datetime) -> Questions:
    """The whole of each view, and the last day where a dashboard would ask for that."""
    day = now - timedelta(days=1)
    return {
        **{name: _sql(f"SELECT * FROM {name}") for name in VIEWS},
        **{
            f"{name}, the last day": _sql(f"SELECT * FROM {name} WHERE {at} >= '{day:%Y-%m-%d}'")
            for name, at in LAST_DAY.items()
        },
    }


def of_grafana(now: datetime) -> Questions:
    """What the dashboard of the runs asks PostgreSQL, over a week."""
    since, until = (f"'{at.isoformat()}'" for at in (now - GRAFANA_SPAN, now))
    found: dict[str, Question] = {}
    for panel in json.loads(GRAFANA.read_text(encoding="utf-8"))["panels"]:
        for number, target in enumerate(panel.get("targets", ()), start=1):
            sql = re.sub(
                r"\$__timeFilter\((\w+)\)", rf"\1 BETWEEN {since} AND {until}", target["rawSql"]
            )
            sql = sql.replace("$__timeFrom()", since).replace("$__timeTo()", until)
            sql = sql.replace("${workspace:sqlstring}", "'ws_0', 'ws_1', 'ws_2', 'unknown'")
            name = panel["title"] if number == 1 else f"{panel['title']} ({number})"
            found[name] = _sql(sql)
    return found


def _sql(query: str) -> Question:
    statement = text(query.replace(":", "\\:"))

    async def ask(db: Database) -> int:
        async with db.read() as connection:
            return len((await connection.execute(statement)).all())

    return ask


def questions(report: Report, plots: Sequence[Plot]) -> int:
    """Ask everything; a table for each kind goes into the report. Returns how many were slower on
    the big database than they may be."""
    return asyncio.run(_ask_all(report, plots))


async def _ask_all(report: Report, plots: Sequence[Plot]) -> int:
    kind = plots[0].kind
    small, big = [await Database.open(plot.url) for plot in plots]
    now = datetime.now(UTC)
    slow = 0
    try:
        for db in (small, big):
            async with open_writer(db) as writer:
                await writer.submit_all(
                    [started(f"run_due_{n}", at=now) for n in range(2 * CLAIMED)]
                )
        middle = {db: await _middle(db) for db in (small, big)}
        groups: dict[str, Callable[[Database], Questions]] = {
            "Workers": lambda _: of_workers(),
            "Pages": lambda db: of_pages(*middle[db]),
            "Views": lambda _: of_views(now),
        }
        if kind == "postgresql":
            groups["The dashboard of runs in Grafana"] = lambda _: of_grafana(now)
        for title, made in groups.items():
            found = await _compare(small, big, made(small), made(big))
            slow += _told(report, f"{title}, {kind}", plots, found)
    finally:
        await small.close()
        await big.close()
    return slow


async def _middle(db: Database) -> tuple[str, str | None]:
    """A settled run, and the cursor of a page in the middle of the list."""
    async with db.read() as connection:
        half = "SELECT created_at FROM runs ORDER BY created_at DESC LIMIT 1 OFFSET {}"
        count = (await connection.execute(text("SELECT count(*) FROM runs"))).scalar_one()
        await connection.execute(text(half.format(count // 2)))
    wanted = SearchFilters(until=datetime.now(UTC) - timedelta(days=45))
    found = await search.search_runs(db, wanted)
    return found.records[0].run.run_id, found.next_cursor


Times = dict[str, tuple[list[float], list[float]]]


async def _compare(small: Database, big: Database, *asked: Questions) -> Times:
    found: Times = {}
    for name in asked[0]:
        say(f"{small.dialect}: {name}")
        took: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS + 1):
            for db, given, mine in zip((small, big), asked, took, strict=True):
                began = time.perf_counter()
                with suppress(StoreUnavailable):  # it took longer than a statement may
                    await given[name](db)
                mine.append((time.perf_counter() - began) * 1000)
                if given[name] is claim:
                    await give_back(db)
        found[name] = took[0][1:], took[1][1:]  # the first plans, and reads from the disk
    return found


def _told(report: Report, title: str, plots: Sequence[Plot], found: Times) -> int:
    rows, slow = [], 0
    for name, (small, big) in found.items():
        early, late = statistics.median(small), statistics.median(big)
        times = min(big) / min(small)
        much = times > WANTED and min(big) - min(small) > LEAST_MS
        slow += much
        shown = f"**{times:.1f}**" if much else f"{times:.1f}"
        rows.append((name, f"{early:.2f}", f"{late:.2f}", shown))
    columns = ("", *(f"{plot.runs:,} runs, ms" for plot in plots), "times")
    report.add(Table(title, columns, rows))
    report.figures[title] = {
        name: {"small": small, "big": big} for name, (small, big) in found.items()
    }
    return slow
