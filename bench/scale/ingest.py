"""Callbacks through `tracker serve`, in turn on the small database and on the big one.

Ids are scattered, so that each new row touches pages of its own in every index by id. The server's
log gets such a page whole the first time after a checkpoint. Each round begins with one: it meets
the dearest moment, or, where many callbacks are taken before the clock runs, the usual one. A round
takes so many callbacks, not so long: how many came before decides what the next one costs.
"""

import asyncio
import secrets
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from bench.ingest.contenders import TRACKER, started
from bench.ingest.load import prepared, send_all
from bench.report import Report, Table, say
from bench.scale.databases import Plot, bytes_written

CONNECTIONS: Final = 64
WARM: Final = 3_000
WANTED: Final = 0.7
"""Of the rate on the small database."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did. For each callback: bytes written to PostgreSQL's log, or by the process
    on SQLite, and microseconds of processor time of the tracker and of PostgreSQL."""

    runs: int
    acknowledged: int
    refused: int
    rate: float
    written: float
    tracker_us: float
    server_us: float


def ingest(
    report: Report, plots: Sequence[Plot], *, rounds: int, callbacks: int, before: int
) -> float:
    """Measure; the table goes into the report. Returns the ratio of the rates.

    `before` is how many callbacks are taken between the checkpoint and the clock.
    """
    found: list[Round] = []
    for number in range(rounds):
        for plot in plots if number % 2 == 0 else reversed(plots):
            one = one_round(plot, callbacks, before)
            say(f"{plot.kind}, round {number + 1}: {one}")
            found.append(one)
    small, big = (_median(found, plot.runs) for plot in plots)
    ratio = big.rate / small.rate
    kind = plots[0].kind
    what = "log" if kind == "postgresql" else "disk"
    report.add(
        Table(
            f"Durable ingest beside what is kept, {kind}",
            (
                *("runs kept", "callbacks/s", "of the small one", f"bytes to the {what} each"),
                *("tracker, µs each", "PostgreSQL, µs each"),
            ),
            [
                (
                    f"{one.runs:,.0f}",
                    f"{one.rate:,.0f}",
                    f"{one.rate / small.rate:.2f}",
                    f"{one.written:,.0f}",
                    f"{one.tracker_us:.0f}",
                    f"{one.server_us:.0f}" if kind == "postgresql" else "-",
                )
                for one in (small, big)
            ],
            f"{CONNECTIONS} connections, scattered ids; {callbacks:,} callbacks a round, which "
            f"begins {before:,} after a checkpoint; medians of {rounds}. Wanted: {WANTED}.",
        )
    )
    report.figures[f"ingest-{kind}"] = {"ratio": ratio, "rounds": [asdict(one) for one in found]}
    return ratio


def one_round(plot: Plot, callbacks: int, before: int = 0) -> Round:
    """Start a receiver on the database, let it get warm, and load it."""
    name = secrets.token_hex(3)
    postgres = plot.kind == "postgresql"
    with (
        prepared(callbacks, prefix=f"{name}00", scattered=True) as requests,
        prepared(WARM, prefix=f"{name}01", scattered=True) as warm_up,
        prepared(before, prefix=f"{name}02", scattered=True) as first,
        started(TRACKER, plot.url) as running,
    ):
        send_all(warm_up, running.port, connections=CONNECTIONS)
        asyncio.run(plot.rest())
        if before:
            send_all(first, running.port, connections=CONNECTIONS)
        early = _moment(plot, running.pid, running.processor_seconds())
        load = send_all(requests, running.port, connections=CONNECTIONS)
        late = _moment(plot, running.pid, running.processor_seconds())
    used = [(then - now) / load.acknowledged for now, then in zip(early, late, strict=True)]
    return Round(
        plot.runs,
        load.acknowledged,
        load.refused,
        load.rate,
        used[0],
        used[1] * 1e6,
        used[2] * 1e6 if postgres else 0.0,
    )


def _moment(plot: Plot, pid: int, processor: float) -> tuple[float, float, float]:
    """Bytes written, and processor seconds of the tracker and of the server, so far."""
    if plot.kind == "sqlite":
        return bytes_written(pid), processor, 0.0
    return asyncio.run(plot.written()), processor, plot.server_seconds()


def _median(found: Sequence[Round], runs: int) -> Round:
    mine = [asdict(one) for one in found if one.runs == runs]
    return Round(**{name: statistics.median(one[name] for one in mine) for name in mine[0]})
