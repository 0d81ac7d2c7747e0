"""Alternating rounds: each contender in turn, on a database of its own, with the same load.

The machine may be shared, so that a number is worth nothing by itself. What is compared was
measured within the same minute, and the median of the rounds counts.
"""

import asyncio
import secrets
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Self

from sqlalchemy import create_engine, text

from bench.ingest.contenders import CEILING, PEER, TRACKER, Contender, started
from bench.ingest.load import Load, prepared, send
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.store import migrate

WARM_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Round:
    """What one contender did in one round. `kept` is how many rows it had afterwards."""

    contender: str
    acknowledged: int
    refused: int
    rate: float
    kept: int | None
    processor: float
    """Seconds of one processor for each second."""

    @classmethod
    def of(
        cls, name: str, warm: Load, load: Load, kept: int | None, processor_seconds: float
    ) -> Self:
        """What a server did that got warm and was then loaded; the time is that of the load."""
        return cls(
            name,
            warm.acknowledged + load.acknowledged,
            warm.refused + load.refused,
            load.rate,
            kept,
            processor_seconds / load.seconds,
        )

    @property
    def lost(self) -> int:
        """How many were acknowledged and are not there."""
        return 0 if self.kept is None else max(0, self.acknowledged - self.kept)


def one_round(contender: Contender, kind: str, *, connections: int, seconds: float) -> Round:
    """Start it, let it get warm, load it, and count what it has kept."""
    name = secrets.token_hex(4)
    with (
        throw_away(kind) as url,
        prepared(int(seconds * contender.fastest), prefix=f"{name}0") as requests,
        prepared(int(WARM_SECONDS * contender.fastest), prefix=f"{name}1") as warm_up,
    ):
        asyncio.run(migrate.upgrade(url))
        with started(contender, url) as running:
            warm = send(warm_up, running.port, connections=connections, seconds=WARM_SECONDS)
            used = running.processor_seconds()
            load = send(requests, running.port, connections=connections, seconds=seconds)
            used = running.processor_seconds() - used
        kept = None if contender.table is None else count(url, contender.table)
    return Round.of(contender.name, warm, load, kept, used)


def compare(
    report: Report, kind: str, *, connections: int, rounds: int, seconds: float
) -> list[Round]:
    """All contenders, `rounds` times in turn; their table goes into the report."""
    found: list[Round] = []
    for number in range(rounds):
        for contender in (CEILING, TRACKER, PEER):
            one = one_round(contender, kind, connections=connections, seconds=seconds)
            say(f"{kind}, {connections} connections, round {number + 1}: {one}")
            found.append(one)
    rates = {name: median_of(found, name) for name in (CEILING.name, TRACKER.name, PEER.name)}
    report.add(
        Table(
            f"Durable ingest, {kind}, {connections} connections",
            ("", "callbacks/s", "of the ceiling", "times the peer", "processors", "lost"),
            [
                (
                    name,
                    f"{rate:,.0f}",
                    f"{rate / rates[CEILING.name]:.2f}",
                    f"{rate / rates[PEER.name]:.1f}",
                    f"{median_of(found, name, 'processor'):.2f}",
                    sum(one.lost for one in found if one.contender == name),
                )
                for name, rate in rates.items()
            ],
        )
    )
    report.figures[f"{kind}-{connections}"] = _figures(found)
    return found


def median_of(
    found: Sequence[Round], name: str, figure: Literal["rate", "processor"] = "rate"
) -> float:
    """The median of one contender's rounds."""
    return statistics.median(getattr(one, figure) for one in found if one.contender == name)


def _figures(found: Sequence[Round]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def count(url: str, table: str) -> int:
    """How many rows a table has."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        engine = create_engine(url)
        with engine.connect() as connection:
            return int(connection.scalar(text(f"SELECT count(*) FROM {table}")))
    return asyncio.run(_count_postgres(f"postgresql://{rest}", table))


async def _count_postgres(url: str, table: str) -> int:
    import asyncpg  # noqa: PLC0415 - not needed for SQLite

    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval(f"SELECT count(*) FROM {table}"))
    finally:
        await connection.close()
