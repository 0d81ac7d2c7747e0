"""What became of acknowledged callbacks: whether, when and how many were applied to their runs."""

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

LOOK_EVERY: Final = 0.02
"""Seconds between two looks at what waits."""
DRAINED_WITHIN: Final = 120.0
"""Seconds after which what still waits counts as never applied."""
_COUNTS: Final = """
    SELECT count(*), sum(CASE WHEN outcome = 'waiting' THEN 1 ELSE 0 END),
        (SELECT count(*) FROM runs WHERE callback_at IS NOT NULL) FROM deliveries"""
_DELAYS: Final = """
    SELECT received_at, applied_at FROM deliveries
    WHERE delivery_id >= 'whd_{prefix}' AND delivery_id < 'whd_{prefix}g'"""


@dataclass(frozen=True, slots=True)
class Effects:
    """How many deliveries are stored, how many of them wait, how many runs had a callback."""

    stored: int
    waiting: int
    runs: int


def query(url: str, statement: str) -> Sequence[Sequence[Any]]:
    """The rows of a statement, over a connection of its own."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        connection = sqlite3.connect(f"file:{rest.removeprefix('/')}?mode=ro", uri=True, timeout=30)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()
    return asyncio.run(_query_postgres(f"postgresql://{rest}", statement))


async def _query_postgres(url: str, statement: str) -> Sequence[Sequence[Any]]:
    import asyncpg  # noqa: PLC0415 - not needed for SQLite

    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


def effects(url: str) -> Effects:
    """As they are now."""
    ((stored, waiting, runs),) = query(url, _COUNTS)
    return Effects(stored, waiting or 0, runs)


def drained(url: str) -> float:
    """Wait until nothing waits; in how many seconds that came about."""
    began = time.perf_counter()
    while effects(url).waiting:
        if time.perf_counter() - began > DRAINED_WITHIN:
            raise RuntimeError(f"not applied within {DRAINED_WITHIN:g} s")
        time.sleep(LOOK_EVERY)
    return time.perf_counter() - began


def delays(url: str, prefix: str) -> list[float]:
    """Milliseconds from the receipt of each delivery of that prefix until it was applied, sorted.

    `applied_at` is told right before the commit, which a group of hundreds takes a few more for.
    """
    rows = query(url, _DELAYS.format(prefix=prefix))
    return sorted((_moment(at) - _moment(came)).total_seconds() * 1000 for came, at in rows)


def _moment(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed; 1 is the greatest."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
