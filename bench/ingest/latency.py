"""How long a callback waits for its answer, at a tenth, a half and nine tenths of the most.

The most is what 64 connections get through flat out, just before. A callback that comes alone is
set beside a bare commit on the same disk: nothing but that should it wait for.
"""

import asyncio
import secrets
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Final

import uvloop

from bench.ingest.contenders import TRACKER, started
from bench.ingest.load import prepared, send
from bench.ingest.sender import Answers, Sender
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.store import migrate

SHARES: Final = (0.1, 0.5, 0.9)
CONNECTIONS: Final = 64
FLAT_OUT_SECONDS: Final = 4.0
ALONE_SECONDS: Final = 3.0
COMMITS: Final = 300


def latency(report: Report, kind: str, *, seconds: float) -> None:
    """Measure one kind of database; the table goes into the report."""
    with throw_away(kind) as url:
        asyncio.run(migrate.upgrade(url))
        with started(TRACKER, url) as running:
            most = _flat_out(running.port)
            say(f"{kind}: {most:.0f} a second flat out")
            one = _answers(running.port, ALONE_SECONDS, 8_000, connections=1)
            found = {
                share: _answers(running.port, seconds, int(share * most), share * most)
                for share in SHARES
            }
        commit = _commit_milliseconds(kind, url)
    rows = [("alone", "-", one)]
    rows += [(f"{share:.0%} of the most", f"{share * most:,.0f}", found[share]) for share in SHARES]
    report.add(
        Table(
            f"Latency, {kind}, milliseconds",
            ("load", "callbacks/s", "p50", "p99", "longest", "refused"),
            [(name, rate, *_quantiles(answers), answers.refused) for name, rate, answers in rows],
            f"A bare commit of one row on the same database takes {commit:.2f} ms (median).",
        )
    )
    report.figures[f"latency-{kind}"] = {
        "flat_out": most,
        "commit_ms": commit,
        "alone": _figures(one),
        **{str(share): _figures(answers) for share, answers in found.items()},
    }


def _flat_out(port: int) -> float:
    with prepared(int(FLAT_OUT_SECONDS * 30_000), prefix=secrets.token_hex(4)) as requests:
        load = send(requests, port, connections=CONNECTIONS, seconds=FLAT_OUT_SECONDS)
    return load.rate


def _answers(
    port: int, seconds: float, count: int, rate: float = 0, *, connections: int = CONNECTIONS
) -> Answers:
    most = int(count * seconds) + connections
    with prepared(most, prefix=secrets.token_hex(4)) as requests:

        async def run() -> Answers:
            async with Sender(requests, port, connections=connections) as sender:
                await (sender.at_rate(rate, seconds) if rate else sender.flat_out(seconds))
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


def _quantiles(answers: Answers) -> list[str]:
    return [f"{answers.quantile(share):.2f}" for share in (0.5, 0.99, 1)]


def _figures(answers: Answers) -> dict[str, float]:
    return {
        "count": len(answers.milliseconds),
        "refused": answers.refused,
        **{name: answers.quantile(at) for name, at in (("p50", 0.5), ("p99", 0.99), ("max", 1))},
    }
