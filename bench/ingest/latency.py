"""How long a callback waits for its answer, and its run for its effect, at shares of the most.

The most is what 64 connections get through flat out, just before. A callback that comes alone is
set beside a bare commit on the same disk: nothing but that should its answer wait for.
"""

import asyncio
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.ingest.contenders import TRACKER, started
from bench.ingest.effects import delays, drained, quantile
from bench.ingest.load import prepared, send
from bench.ingest.sender import Answers, Sender
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.store import migrate

SHARES: Final = (0.1, 1 / 3, 0.5, 0.9)
CONNECTIONS: Final = 64
FLAT_OUT_SECONDS: Final = 4.0
ALONE: Final = 100
"""So many callbacks come alone, `ALONE_EVERY` seconds apart."""
ALONE_EVERY: Final = 0.05
COMMITS: Final = 300


def latency(report: Report, kind: str, *, seconds: float) -> None:
    """Measure one kind of database; the table goes into the report."""
    with throw_away(kind) as url:
        asyncio.run(migrate.upgrade(url))
        with started(TRACKER, url) as running:
            most = _flat_out(running.port)
            drained(url)
            say(f"{kind}: {most:.0f} a second flat out")
            found = [("alone", "-", *_alone(url, running.port))]
            for share in SHARES:
                rate = share * most
                one = _at_rate(url, running.port, seconds, rate)
                found.append((f"{share:.0%} of the most", f"{rate:,.0f}", *one))
        commit = _commit_milliseconds(kind, url)
    report.add(
        Table(
            f"Latency, {kind}, milliseconds",
            (
                *("load", "callbacks/s", "answered: p50", "p99", "longest"),
                *("applied after: p50", "p99", "longest", "refused"),
            ),
            [
                (
                    *(name, rate),
                    *(f"{answers.quantile(share):.2f}" for share in (0.5, 0.99, 1)),
                    *(f"{quantile(applied, share):.1f}" for share in (0.5, 0.99, 1)),
                    answers.refused,
                )
                for name, rate, answers, applied in found
            ],
            f"A bare commit of one row on the same database takes {commit:.2f} ms (median).",
        )
    )
    report.figures[f"latency-{kind}"] = {
        "flat_out": most,
        "commit_ms": commit,
        **{name: _figures(answers, applied) for name, _, answers, applied in found},
    }


def _flat_out(port: int) -> float:
    with prepared(int(FLAT_OUT_SECONDS * 30_000), prefix=secrets.token_hex(4)) as requests:
        load = send(requests, port, connections=CONNECTIONS, seconds=FLAT_OUT_SECONDS)
    return load.rate


def _at_rate(url: str, port: int, seconds: float, rate: float) -> tuple[Answers, list[float]]:
    prefix = secrets.token_hex(4)
    with prepared(int(rate * seconds) + CONNECTIONS, prefix=prefix) as requests:

        async def run(sender: Sender) -> None:
            await sender.at_rate(rate, seconds)

        answers = _sent(requests, port, CONNECTIONS, run)
    drained(url)
    return answers, delays(url, prefix)


def _alone(url: str, port: int) -> tuple[Answers, list[float]]:
    """Callbacks that come one by one, each after the one before has had its effect."""
    prefix = secrets.token_hex(4)
    with prepared(ALONE, prefix=prefix) as requests:

        async def run(sender: Sender) -> None:
            await sender.at_rate(1 / ALONE_EVERY, ALONE * ALONE_EVERY)

        answers = _sent(requests, port, 1, run)
    drained(url)
    return answers, delays(url, prefix)


def _sent(
    requests: Path, port: int, connections: int, send_by: Callable[[Sender], Awaitable[Any]]
) -> Answers:
    async def run() -> Answers:
        async with Sender(requests, port, connections=connections) as sender:
            await send_by(sender)
            return sender.answers

    answers: Answers = uvloop.run(run())
    return answers


def _commit_milliseconds(kind: str, url: str) -> float:
    """The median time of a commit of one row, through the driver alone."""
    return _commit_on_sqlite() if kind == "sqlite" else uvloop.run(_commit_on_postgres(url))


def _commit_on_sqlite() -> float:
    with tempfile.TemporaryDirectory() as directory:
        connection = sqlite3.connect(Path(directory) / "one.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE one (n)")
        took = []
        for number in range(COMMITS):
            began = time.perf_counter()
            connection.execute("INSERT INTO one VALUES (?)", (number,))
            took.append(time.perf_counter() - began)
        connection.close()
    return sorted(took)[COMMITS // 2] * 1000


async def _commit_on_postgres(url: str) -> float:
    import asyncpg  # noqa: PLC0415 - not needed for SQLite

    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE one (n int)")
    took = []
    for number in range(COMMITS):
        began = time.perf_counter()
        await connection.execute("INSERT INTO one VALUES ($1)", number)
        took.append(time.perf_counter() - began)
    await connection.close()
    return sorted(took)[COMMITS // 2] * 1000


def _figures(answers: Answers, applied: list[float]) -> dict[str, float]:
    quantiles = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return {
        "count": len(answers.milliseconds),
        "refused": answers.refused,
        **{f"answered_{name}": answers.quantile(at) for name, at in quantiles},
        **{f"applied_{name}": quantile(applied, at) for name, at in quantiles},
    }
