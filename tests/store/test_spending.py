"""What budgets have used is computed from starts and runs, and no two starts take the same room."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.store.making import NOW, TestWriter, seen, started
from tests.support.patience import A_MINUTE
from tests.support.started import of_start
from tracker.core.errors import BudgetExceeded
from tracker.core.observation import Source
from tracker.core.rollup import DEAREST
from tracker.core.run import RunError, RunStatus
from tracker.core.starts import Budget, Period, digest_of
from tracker.store.engine import Database
from tracker.store.queries import spending, starts
from tracker.store.queries.starts import StartRow, StartState

LEASE = timedelta(seconds=30)
DAY = timedelta(days=1)
PRICE = Decimal("0.25")
TODAY = Budget(usd=Decimal(5), period=Period.DAY)


async def reserve(
    db: Database,
    key: str,
    *,
    budget: Budget = TODAY,
    budgets: Sequence[Budget] | None = None,
    at: datetime = NOW,
    runs: int = 1,
    **more: Any,
) -> StartRow:
    """Keep a key and reserve its price; `key` holds it."""
    given: dict[str, Any] = {"workspace_id": "ws_1", "technique_id": "tech_1"}
    given |= {"reserved_cost": PRICE, "reserved_runs": runs, "lease_holder": key}
    new = StartRow(
        idempotency_key=key,
        fingerprint=digest_of(["tech_1", []]),
        inputs=[],
        created_at=at,
        reserved_at=at,
        lease_until=at + LEASE,
        **(given | more),
    )
    return await starts.reserve(db, new, [budget] if budgets is None else budgets)


async def left(db: Database, budget: Budget = TODAY, *, now: datetime = NOW) -> Decimal:
    return (await usage(db, budget, now=now)).left


async def usage(db: Database, budget: Budget = TODAY, *, now: datetime = NOW) -> spending.Usage:
    (found,) = await spending.usages(db, [budget], now=now)
    return found


async def sent(db: Database, key: str, state: StartState | None = None) -> None:
    """A reserved start leaves, and comes to that state; then nobody holds it."""
    await starts.mark_sent(
        db, "ws_1", key, holder=key, at=NOW, callback_url=None, request_body="{}"
    )
    if state is not None:
        await starts.mark(db, "ws_1", key, holder=key, state=state, error={})
    await starts.give_back(db, "ws_1", key, key)


def became(run_id: str, row: StartRow, quote: str | None = None) -> Any:
    """FLORA's answer to a start: its run, with a quote."""
    facts = {"workspace_id": "ws_1", "technique_id": "tech_1"}
    facts |= {} if quote is None else {"charged_cost": Decimal(quote)}  # type: ignore[dict-item]
    return of_start(
        started(run_id, facts=facts),
        workspace_id="ws_1",
        idempotency_key=row.idempotency_key,
        tags=row.tags,
        reserved_at=row.reserved_at,
        reserved_cost=row.reserved_cost,
    )


@pytest.mark.one_database("postgres")
async def test_of_100_starts_at_once_exactly_as_many_as_fit_are_kept(
    db: Database, database_url: str
) -> None:
    """Over two processes, and whatever order they come in: 20 reserve, 80 are refused, and of
    those nothing is kept."""
    async with (
        await Database.open(database_url, times=A_MINUTE) as one,
        await Database.open(database_url, times=A_MINUTE) as other,
    ):
        answers = await asyncio.gather(
            *(reserve((one, other)[n % 2], f"key-{n}") for n in range(100)), return_exceptions=True
        )
    refused = [one for one in answers if isinstance(one, BudgetExceeded)]
    assert len(refused) == 80, answers
    assert {(one.budget, one.left, one.ever_fits) for one in refused} == {("day", 0, True)}
    assert {one.renews_at for one in refused} == {datetime(2026, 6, 2, tzinfo=NOW.tzinfo)}
    assert await left(db) == 0
    kept = await starts.of_keys(db, "ws_1", [f"key-{n}" for n in range(100)])
    assert len(kept) == 20


async def test_what_may_have_been_sent_keeps_its_reservation(db: Database) -> None:
    """A start that is held, sent, in doubt or unresolved takes room; one that was given back,
    refused or resolved as none, or whose process died before it was sent, does not."""
    for key in ("held", "given back", "sent", "in doubt", "unresolved", "refused", "none"):
        await reserve(db, key)
    assert await left(db) == Decimal("3.25")
    await starts.give_back(db, "ws_1", "given back", "given back")
    await sent(db, "sent")
    await sent(db, "in doubt", StartState.IN_DOUBT)
    await sent(db, "unresolved", StartState.UNRESOLVED)
    await sent(db, "refused", StartState.REFUSED)
    await sent(db, "none", StartState.UNRESOLVED)
    assert await starts.take(db, "ws_1", "none", "person", NOW, LEASE)
    await starts.mark(db, "ws_1", "none", holder="person", state=StartState.REFUSED, error={})
    assert await left(db) == Decimal("4.00")
    # The lease of the process that held the first one has run out.
    assert await left(db, now=NOW + LEASE) == Decimal("4.25")
    again = await reserve(db, "refused", at=NOW + LEASE, lease_holder="again")
    assert (again.state, again.lease_holder) == (StartState.STORED, "again")
    assert await left(db, now=NOW + LEASE) == Decimal("4.00")


@pytest.mark.both_databases
async def test_an_absurd_price_in_doubt_stops_no_other_start(db: Database) -> None:
    """It counts as a run's cost does, up to a million, and overflows no sum."""
    await reserve(db, "dear", budgets=[], reserved_cost=Decimal("1E+15"))
    await sent(db, "dear", StartState.IN_DOUBT)
    assert (await usage(db)).reserved == DEAREST
    with pytest.raises(BudgetExceeded):
        await reserve(db, "other")


async def test_a_reservation_becomes_the_quote_and_then_the_bill(
    db: Database, writer: TestWriter
) -> None:
    """Bills above quotes count, and may pass the budget; a quote below the price makes no room."""
    small = replace(TODAY, usd=Decimal("0.50"))
    rows = [await reserve(db, key, budget=small) for key in "ab"]
    assert (await usage(db, small)).reserved == Decimal("0.50")
    await writer.submit(became("run_a", rows[0], quote="0.4"))
    await writer.submit(became("run_b", rows[1], quote="0"))
    found = await usage(db, small)
    assert (found.reserved, found.quoted, found.charged) == (0, Decimal("0.65"), 0)
    bill = {"charged_cost": Decimal("0.873"), "completed_at": NOW}
    await writer.submit(seen("run_a", RunStatus.COMPLETED, at=NOW + DAY, facts=bill))
    found = await usage(db, small)
    assert (found.quoted, found.charged) == (PRICE, Decimal("0.873"))
    assert (found.left, found.share > 2) == (0, True)
    with pytest.raises(BudgetExceeded, match=r"\$0.00 of \$0.50 left"):
        await reserve(db, "c", budget=small)


async def test_a_failed_run_gives_its_share_back_when_its_bill_is_final(
    db: Database, writer: TestWriter
) -> None:
    """Not before: FLORA may show a charge that it refunds later."""
    await writer.submit(became("run_1", await reserve(db, "key"), quote="0.25"))
    error = {"error": RunError("model_timeout"), "completed_at": NOW}
    await writer.submit(seen("run_1", RunStatus.FAILED, at=NOW, facts=error))
    assert await left(db) == Decimal("4.75")
    charged = error | {"charged_cost": Decimal("0.3")}
    await writer.submit(
        seen("run_1", RunStatus.FAILED, at=NOW + timedelta(seconds=9), facts=charged)
    )
    assert await left(db) == Decimal("4.70")
    late = NOW + timedelta(minutes=5)
    await writer.submit(seen("run_1", RunStatus.FAILED, at=late, facts=error, reads=1))
    assert await left(db) == Decimal("5.00")


async def test_each_budget_covers_its_own(db: Database, writer: TestWriter) -> None:
    """By workspace, technique and tag, in the UTC day of the start, or of `created_at` for runs of
    others; a budget in total never begins anew."""
    red = {"team": "red", "order": "7"}
    await writer.submit(became("run_1", await reserve(db, "a", tags=red), quote="0.25"))
    await reserve(db, "b", tags=red, technique_id="tech_2")
    await reserve(db, "c", tags={"team": "blue"}, workspace_id="ws_2")
    theirs = {"workspace_id": "ws_1", "technique_id": "tech_1", "charged_cost": Decimal(1)}
    theirs |= {"created_at": NOW - DAY}  # type: ignore[dict-item]
    found = seen("theirs", RunStatus.COMPLETED, source=Source.HISTORY, facts=theirs)
    await writer.submit(found)

    async def used(period: Period, **scope: Any) -> Decimal:
        return (await usage(db, Budget(usd=Decimal(9), period=period, **scope))).used

    assert await used(Period.DAY) == Decimal("0.75")
    assert await used(Period.TOTAL) == Decimal("1.75")
    assert await used(Period.TOTAL, workspace_id="ws_1") == Decimal("1.50")
    assert await used(Period.TOTAL, technique_id="tech_1") == Decimal("1.50")
    assert await used(Period.DAY, tag=("team", "red")) == Decimal("0.50")
    assert await used(Period.DAY, tag=("team", "red"), technique_id="tech_1") == PRICE
    assert await used(Period.DAY, tag=("team", "bl")) == 0
    month = Budget(usd=Decimal(9), period=Period.MONTH)
    assert (await usage(db, month)).used == Decimal("0.75")  # yesterday was May
    assert (await usage(db, month, now=NOW - DAY)).used == 1
    assert (await usage(db, month, now=NOW + 30 * DAY)).used == 0


async def test_a_start_of_several_runs_reserves_all_of_them(
    db: Database, writer: TestWriter
) -> None:
    """The answer names the first. Each other takes its share over when its callback shows it, once
    however often it comes. What does not show keeps its reservation until the history had time to
    show it; for good in the budget of a tag, which the history does not tell."""
    row = await reserve(db, "key", runs=3, tags={"team": "red"})
    red = replace(TODAY, tag=("team", "red"))
    assert await left(db) == Decimal("4.25")
    await writer.submit(became("run_1", row, quote="0.25"))
    assert (await usage(db)).reserved == Decimal("0.50")
    for _ in range(2):
        await writer.submit(became("run_2", row))
        found = await usage(db)
        assert (found.reserved, found.quoted) == (PRICE, 2 * PRICE)
    assert await left(db) == Decimal("4.25")
    later = NOW + timedelta(minutes=20)
    assert await left(db, now=later) == Decimal("4.50")
    assert await left(db, red, now=later) == Decimal("4.25")
    await writer.submit(became("run_3", row))
    assert (await usage(db)).reserved == (await usage(db, red)).reserved == 0


async def test_runs_of_one_start_that_show_at_once_take_their_shares(
    db: Database, writer: TestWriter
) -> None:
    """Also where their callbacks come before the answer, and are applied together."""
    row = await reserve(db, "key", runs=3)
    await asyncio.gather(*(writer.submit(became(f"run_{n}", row)) for n in range(3)))
    found = await usage(db)
    assert (found.reserved, found.quoted) == (0, 3 * PRICE)


async def test_one_key_asked_for_at_once_takes_room_once(
    db: Database, other_db: Database, writer: TestWriter
) -> None:
    """Anyone who asks with the key at the same moment is shown the start that holds the last room,
    and not refused for it; also where the key was refused before."""
    tight = replace(TODAY, usd=PRICE)

    async def ask_at_once() -> None:
        askers = [f"asker-{n}" for n in range(8)]
        rows = await asyncio.gather(
            *(
                reserve((db, other_db)[n % 2], "key", budget=tight, lease_holder=who)
                for n, who in enumerate(askers)
            )
        )
        (holder,) = {row.lease_holder for row in rows}
        assert holder in askers
        await starts.mark(
            db, "ws_1", "key", holder=holder or "", state=StartState.REFUSED, error={}
        )
        await starts.give_back(db, "ws_1", "key", holder or "")

    await ask_at_once()
    await ask_at_once()


async def test_a_replay_is_no_matter_of_budgets(db: Database) -> None:
    """A key that may have been sent is answered from the log, also where nothing is left."""
    tight = replace(TODAY, usd=PRICE)
    await reserve(db, "key", budget=tight)
    await sent(db, "key")
    again = await reserve(db, "key", budget=tight, lease_holder="other")
    assert (again.state, again.lease_holder) == (StartState.SENT, None)


async def test_without_a_price_no_budget_can_be_kept(db: Database) -> None:
    """Such a start is refused where a budget covers it, and reserves nothing elsewhere."""
    with pytest.raises(BudgetExceeded, match="no price") as refused:
        await reserve(db, "key", reserved_cost=None)
    assert not refused.value.ever_fits
    assert (await reserve(db, "key", reserved_cost=None, budgets=[])).lease_holder == "key"


async def test_spending_adds_up_by_day_technique_and_tag(db: Database, writer: TestWriter) -> None:
    """Each way of adding up comes to the same total, with all other runs as one row."""
    red = await reserve(db, "a", tags={"team": "red"})
    await writer.submit(became("run_1", red, quote="0.25"))
    for number in range(3):
        facts = {"technique_id": f"tech_{number % 2}", "charged_cost": Decimal("0.1")}
        facts["created_at"] = NOW - number * DAY  # type: ignore[assignment]
        await writer.submit(seen(f"run_of_{number}", RunStatus.COMPLETED, facts=facts))
    given_up = {"created_at": NOW - 2 * DAY, "completed_at": NOW - 2 * DAY}
    await writer.submit(seen("unpriced", RunStatus.COMPLETED, facts=given_up))

    async def added(by: str) -> dict[Any, tuple[int, Decimal, Decimal]]:
        rows, total = await spending.spending(db, by, since=NOW - 30 * DAY)
        assert (total.runs, total.charged, total.quoted) == (5, Decimal("0.3"), PRICE)
        assert total.unpriced == 1
        assert sum(row.total for row in rows) == total.total
        return {row.of: (row.runs, row.charged, row.quoted) for row in rows}

    today = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
    tenth = Decimal("0.1")
    assert await added("day") == {
        today - 2 * DAY: (2, tenth, 0),
        today - DAY: (1, tenth, 0),
        today: (2, tenth, PRICE),
    }
    by_technique = await added("technique")
    assert by_technique["tech_1"] == (2, tenth, PRICE)
    assert await added("tag:team") == {
        "red": (1, 0, PRICE),
        None: (4, Decimal("0.3"), 0),
    }
    (rows, _) = await spending.spending(db, "technique", since=NOW - 30 * DAY)
    assert next(row.name for row in rows if row.of is None) == "no technique"
    assert await spending.tag_keys(db, since=NOW) == ["team"]
    for order in ("1", "2"):
        tags = {"order": order, "team": "red"}
        await writer.submit(became(f"run_{order}_", await reserve(db, order, tags=tags)))
    assert await spending.tag_keys(db, since=NOW) == ["team", "order"]
    since_yesterday, _ = await spending.spending(db, "day", since=NOW - DAY)
    assert len(since_yesterday) == 2
