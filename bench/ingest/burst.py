"""A burst: 50,000 callbacks as fast as they are acknowledged; how many wait then, and how long."""

import asyncio
import secrets
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Final

from bench.ingest.contenders import TRACKER, started
from bench.ingest.effects import drained, effects
from bench.ingest.load import prepared, send_all
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.store import migrate

CALLBACKS: Final = 50_000
CONNECTIONS: Final = 64


@dataclass(frozen=True, slots=True)
class Burst:
    """One burst: callbacks acknowledged a second, how many waited at its end, the seconds in which
    those were applied, and how many acknowledged ones had no effect afterwards."""

    acknowledged_rate: float
    backlog: int
    drained_seconds: float
    lost: int

    @property
    def applied_rate(self) -> float:
        """Callbacks applied a second once no more came."""
        return self.backlog / self.drained_seconds if self.backlog else 0.0


def burst(report: Report, kind: str, *, rounds: int) -> list[Burst]:
    """So many bursts, each on a database of its own; the table goes into the report."""
    found = []
    for number in range(rounds):
        one = _one(kind)
        say(f"{kind}, burst {number + 1}: {one}")
        found.append(one)
    columns = ("", "median", "least", "most")
    rows = [
        (name, *(f"{pick(values):,.{digits}f}" for pick in (statistics.median, min, max)))
        for name, digits, values in (
            ("acknowledged/s", 0, [one.acknowledged_rate for one in found]),
            ("not applied at its end", 0, [one.backlog for one in found]),
            ("applied after that, s", 1, [one.drained_seconds for one in found]),
            ("applied/s meanwhile", 0, [one.applied_rate for one in found]),
        )
    ]
    title = f"A burst of {CALLBACKS:,}, {kind}, {CONNECTIONS} connections"
    report.add(Table(title, columns, rows))
    report.figures[f"burst-{kind}"] = [asdict(one) for one in found]
    return found


def _one(kind: str) -> Burst:
    with (
        throw_away(kind) as url,
        prepared(CALLBACKS, prefix=secrets.token_hex(4)) as requests,
    ):
        asyncio.run(migrate.upgrade(url))
        with started(TRACKER, url) as running:
            load = send_all(requests, running.port, connections=CONNECTIONS)
            began = time.perf_counter()
            backlog = effects(url).waiting
            drained(url)
            seconds = time.perf_counter() - began
        had_effect = effects(url).runs
    return Burst(load.rate, backlog, seconds, max(0, load.acknowledged - had_effect))
