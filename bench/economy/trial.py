"""What a trial is, and what came out of one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

SEED: Final = 6
"""Of every simulated FLORA, so that the n-th run of one trial is the n-th run of all."""

EVENLY: Final = (0.5, 1.5)
"""Between which multiples of the middle the simulator spreads its runs' durations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Some runs, how they begin and end, and what the tracker is told of them.

    `seconds` is the middle of the runs' durations, which spread evenly from half of it to one and a
    half. `every` is how many seconds lie between two starts: 0 for all at once,
    `None` for each as soon as the one before has ended. `known` says whether FLORA's history holds
    enough earlier runs of the technique. `most` is the number of reads for each run that must not
    be exceeded, `most_for_bills` that of the reads after all runs are settled, until every bill is
    final; `longest_gather` goes to the tracker in place of its own.
    """

    name: str
    runs: int
    seconds: float
    every: float | None = 0.0
    callbacks: bool = True
    lost: bool = False
    history_outputs: bool = True
    known: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    longest_gather: float | None = None
    most: float | None = None
    most_for_bills: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a trial came to.

    `settled` is how many runs ended up in the database as they ended at FLORA, of `ended` there;
    `reads` is how often each of FLORA's endpoints was read until then, `reads_for_bills` how often
    after that, until every bill was final (sweeps included); `window` is how many seconds lie
    between the first end and the last. `fresh` is, for each run, the seconds from its end at FLORA
    until it was settled here, ascending.
    """

    name: str
    ended: int
    settled: int
    reads: Mapping[str, int]
    window: float
    fresh: list[float]
    reads_for_bills: int = 0

    @property
    def per_run(self) -> float:
        """Reads of FLORA for each run that ended."""
        return sum(self.reads.values()) / self.ended

    @property
    def per_bill(self) -> float:
        """Reads of FLORA for each run's bill."""
        return self.reads_for_bills / self.ended

    def quantile(self, share: float) -> float:
        """How stale at most this share of the runs was when it settled, in seconds."""
        return self.fresh[min(len(self.fresh) - 1, int(share * len(self.fresh)))]

    def figures(self) -> dict[str, Any]:
        """It as plain values."""
        return {
            "runs": self.ended,
            "settled_true": self.settled,
            "reads": dict(self.reads),
            "reads_per_run": round(self.per_run, 4),
            "reads_per_bill": round(self.per_bill, 4),
            "seconds_from_first_to_last_end": round(self.window, 1),
            "fresh_seconds": {
                name: round(self.quantile(share), 2)
                for name, share in (("p50", 0.5), ("p95", 0.95), ("longest", 1.0))
            },
        }
