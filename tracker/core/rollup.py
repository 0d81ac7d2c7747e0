"""Rollups: the counts and sums that dashboards read instead of all runs.

`facts` says what one run counts for, as a pure function of its record. When a run changes, its old
facts are subtracted and its new ones added, so that corrections (an end that the API contradicts, a
late callback, a lost run that comes back) leave the sums exact.

====================  ======  ==========================================  =====================
measure               since   beside it                                   amount
====================  ======  ==========================================  =====================
`STATE`               -       technique, status, word: its tracking       -
`END`                 hour    status, word: how the end became known,     -
                              bucket: `ADOPTED` or 0
`SEEN`                hour    word: the same, bucket: upper edge, ms      end → known here, ms
`SETTLED`             hour    word: the same, bucket: upper edge, ms      end → settled, ms
`CALLBACK`            hour    word: `came`, `late`, `missed`,             -
                              `unexpected`
`COST`                day     technique, status, word: `final`, `open`    its cost, billionths
                              (to be read again) or `unpriced` (given     of a dollar
                              up without a cost)
`QUOTE`               day     the same, where it has a quote and no       its quote, the same
                              cost, and is not final
`FAILURE`             day     technique, status, word: the retry advice   -
`SPENT`               day *   technique, status: `charged`, `quoted` or   its cost, else quote or
                              `unpriced` (given up without a cost)        price, the greater
`TAGGED`              day *   the same, word: one of its tags, once each  the same
====================  ======  ==========================================  =====================

Days marked * are days of the run's start, all other times those of its end.

Amounts are integers, because sums of floats would drift from a recount. Durations are kept as
histograms: a bucket is named by its upper edge in milliseconds, inclusive, and the edges are close
enough that interpolated quantiles are right to the eye.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from math import floor
from typing import Final, NamedTuple

from tracker.core.observation import Source
from tracker.core.record import Record
from tracker.core.run import RunStatus, Tracking

BEYOND: Final = 2**31 - 1
"""The upper edge of the last bucket, and the longest time that is counted, in milliseconds."""
EDGES: Final = (
    *(100, 200, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 15_000, 20_000, 30_000, 45_000),
    *(60_000, 90_000, 120_000, 180_000, 300_000, 600_000, 1_200_000, 1_800_000, 3_600_000),
    *(10_800_000, 21_600_000, 43_200_000, 86_400_000),
)
"""The upper edges of all buckets but the last."""


class Lag(NamedTuple):
    """Durations of `runs` runs in seconds; `None` where there are no runs."""

    runs: int
    p50: float | None
    p95: float | None


def bucket_of(milliseconds: int) -> int:
    """The bucket of a duration in milliseconds."""
    at = bisect_left(EDGES, milliseconds)
    return EDGES[at] if at < len(EDGES) else BEYOND


def lag_of(rows: Iterable[tuple[int, int, int]]) -> Lag:
    """Summarise rows of (bucket, number of runs, sum of milliseconds)."""
    counts = Counter[int]()
    for bucket, count, _ in rows:
        counts[bucket] += count
    total = counts.total()
    if total <= 0:
        return Lag(0, None, None)
    return Lag(total, quantile(counts, 0.5), quantile(counts, 0.95))


def quantile(counts: dict[int, int], share: float) -> float:
    """The `share` quantile in seconds; `counts` holds at least one run.

    Values beyond the last edge count as the last edge.
    """
    wanted = share * sum(counts.values())
    lower = 0
    for upper in EDGES:
        count = counts.get(upper, 0)
        if count > 0 and wanted <= count:
            return (lower + (upper - lower) * wanted / count) / 1000
        wanted -= count
        lower = upper
    return EDGES[-1] / 1000


STATE: Final = "state"
END: Final = "end"
SEEN: Final = "seen"
SETTLED: Final = "settled"
CALLBACK: Final = "callback"
COST: Final = "cost"
QUOTE: Final = "quote"
FAILURE: Final = "failure"
SPENT: Final = "spent"
TAGGED: Final = "tagged"
MEASURES: Final = (STATE, END, SEEN, SETTLED, CALLBACK, COST, QUOTE, FAILURE, SPENT, TAGGED)

FINAL: Final = "final"
OPEN: Final = "open"
UNPRICED: Final = "unpriced"
CHARGED: Final = "charged"
QUOTED: Final = "quoted"

ALWAYS: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""The `since` of counts that describe the present and belong to no hour."""
ADOPTED: Final = 1
"""Bucket of runs that had ended before the tracker learned of them: their delay says nothing."""
DEAREST: Final = Decimal(1_000_000)
"""A single run's cost counts up to this many USD, so that no sum overflows."""


class RollupKey(NamedTuple):
    """One row of the rollups; unused text fields are empty."""

    measure: str
    since: datetime
    workspace_id: str
    technique_id: str
    status: str
    word: str
    bucket: int


Fact = tuple[RollupKey, int]
"""One run, counted under the key with this amount."""


def facts(record: Record) -> list[Fact]:
    """Everything that the run counts for."""
    run = record.run
    workspace = run.workspace_id or ""
    technique = run.technique_id or ""
    status = str(run.status)
    tracking = record.tracking
    found = [
        (RollupKey(STATE, ALWAYS, workspace, technique, status, tracking.value, 0), 0),
        *_spent(record, workspace, technique),
    ]
    known_at, via = record.end_seen_at, record.ended_via
    if known_at is None or via is None:
        return found
    hour = known_at.replace(minute=0, second=0, microsecond=0)
    word = str(via)
    ended_at = run.completed_at
    adopted = is_adopted(record)
    found.append((RollupKey(END, hour, workspace, "", status, word, ADOPTED if adopted else 0), 0))
    if (came := _callback(record)) is not None:
        found.append((RollupKey(CALLBACK, hour, workspace, "", "", came, 0), 0))
    settled_at = record.settled_at
    if ended_at is not None and not adopted:
        lag = lag_ms(ended_at, known_at)
        found.append((RollupKey(SEEN, hour, workspace, "", "", word, bucket_of(lag)), lag))
        if settled_at is not None:
            lag = lag_ms(ended_at, settled_at)
            found.append((RollupKey(SETTLED, hour, workspace, "", "", word, bucket_of(lag)), lag))
    day = (ended_at or known_at).replace(hour=0, minute=0, second=0, microsecond=0)
    if tracking is Tracking.SETTLED:
        cost, quote, billed = run.charged_cost, run.quoted_cost, _billed(record)
        key = RollupKey(COST, day, workspace, technique, status, billed, 0)
        found.append((key, 0 if cost is None else billionths(cost)))
        if billed != FINAL and cost is None and quote is not None:
            found.append((key._replace(measure=QUOTE), billionths(quote)))
    if (advice := run.retry_advice) is not None:
        found.append((RollupKey(FAILURE, day, workspace, technique, status, advice.value, 0), 0))
    return found


def _spent(record: Record, workspace: str, technique: str) -> list[Fact]:
    """What the run takes from budgets now: one fact, and one for each of its tags.

    A quote below the reserved price frees nothing: FLORA quotes 0 for some starts and bills later.
    A failed run counts until its bill is final, because FLORA's refund may come late.
    """
    run = record.run
    quotes = [one for one in (run.quoted_cost, record.reserved_cost) if one is not None]
    quote = max(quotes, default=None)
    if run.charged_cost is not None:
        part, cost = CHARGED, run.charged_cost
    elif record.cost_final:
        part, cost = CHARGED, Decimal(0)
    elif quote is not None or run.settled:
        given_up = run.settled and _billed(record) == UNPRICED
        part, cost = UNPRICED if given_up else QUOTED, quote or Decimal(0)
    else:
        return []
    day = record.spent_at.replace(hour=0, minute=0, second=0, microsecond=0)
    key, amount = RollupKey(SPENT, day, workspace, technique, part, "", 0), billionths(cost)
    tags = (f"{name}={value}" for name, value in (record.tags or {}).items())
    return [(key, amount), *((key._replace(measure=TAGGED, word=tag), amount) for tag in tags)]


def _billed(record: Record) -> str:
    if record.cost_final:
        return FINAL
    run = record.run
    given_up = record.recheck_at is None and run.charged_cost is None
    return UNPRICED if given_up and run.status is not RunStatus.FAILED else OPEN


def is_adopted(record: Record) -> bool:
    """Whether the run had ended, by FLORA's times, before the tracker learned of it."""
    ended_at = record.run.completed_at
    return (
        ended_at is not None
        and record.source not in _LEARNED_AT_ONCE
        and ended_at < record.first_seen_at
    )


def same(before: Record, after: Record) -> bool:
    """Whether the facts of both are certainly equal: a fast check that may err only with "no"."""
    return (
        before.run is after.run
        and before.cost_final == after.cost_final
        and (before.recheck_at is None) == (after.recheck_at is None)
        and before.lost == after.lost
        and before.callback_at == after.callback_at
        and before.callback_expected == after.callback_expected
        and before.source is after.source
        and before.reserved_at == after.reserved_at
        and before.tags == after.tags
    )


def lag_ms(earlier: datetime, later: datetime) -> int:
    """Whole milliseconds between two times: at least 0 (clocks disagree), at most `BEYOND`."""
    return min(max((later - earlier) // _MILLISECOND, 0), BEYOND)


def billionths(cost: Decimal) -> int:
    """USD as whole billionths, rounded in a way that both databases can reproduce."""
    return floor(float(min(max(cost, Decimal(0)), DEAREST)) * 1e9 + 0.5)


def dollars(amount: int) -> Decimal:
    """The inverse of `billionths`, without trailing zeros."""
    usd = Decimal(amount).scaleb(-9).normalize()
    return usd.quantize(Decimal(1)) if usd == usd.to_integral_value() else usd


_MILLISECOND: Final = timedelta(milliseconds=1)
_LEARNED_AT_ONCE: Final = (Source.START, Source.CALLBACK)


def _callback(record: Record) -> str | None:
    """The fate of the callback of an ended run; `None` where none was expected or came."""
    if record.callback_at is None:
        return "missed" if record.callback_expected else None
    if not record.callback_expected:
        return "unexpected"
    return "came" if record.ended_via is Source.CALLBACK else "late"
