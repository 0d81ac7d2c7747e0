"""How long things took, when only the counts of a histogram are kept: buckets and quantiles.

A bucket is named by its upper edge in milliseconds, which belongs to it. The edges lie close enough
that a quantile, taken as if what is in a bucket were spread evenly over it, is right to the eye.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple

BEYOND: Final = 2**31 - 1
"""The upper edge of the last bucket, and the longest time that is counted, in milliseconds."""
EDGES: Final = (
    *(100, 200, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 15_000, 20_000, 30_000, 45_000),
    *(60_000, 90_000, 120_000, 180_000, 300_000, 600_000, 1_200_000, 1_800_000, 3_600_000),
    *(10_800_000, 21_600_000, 43_200_000, 86_400_000),
)
"""The upper edges of all buckets but the last."""


class Lag(NamedTuple):
    """How long it took, in seconds, over so many runs; `None` where there were none."""

    runs: int
    mean: float | None
    p50: float | None
    p95: float | None


def bucket_of(milliseconds: int) -> int:
    """The bucket that so long a time falls into."""
    at = bisect_left(EDGES, milliseconds)
    return EDGES[at] if at < len(EDGES) else BEYOND


def lag_of(rows: Iterable[tuple[int, int, int]]) -> Lag:
    """What rows of (bucket, how many, how many milliseconds in all) amount to."""
    counts: dict[int, int] = {}
    milliseconds = 0
    for bucket, count, amount in rows:
        counts[bucket] = counts.get(bucket, 0) + count
        milliseconds += amount
    total = sum(counts.values())
    if total <= 0:
        return Lag(0, None, None, None)
    mean = milliseconds / total / 1000
    return Lag(total, mean, quantile(counts, 0.5), quantile(counts, 0.95))


def quantile(counts: dict[int, int], share: float) -> float:
    """The time in seconds that this `share` of those counted (one at least) did not exceed.

    Of what lies beyond the last edge nothing more is known, so it counts as the last edge.
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
