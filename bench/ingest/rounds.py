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

from bench.ingest.contenders import (
    BARE,
    CEILING,
    PEER,
    TRACKER,
    WITH_ENDPOINTS,
    WITH_WORKER,
    Contender,
    started,
)
from bench.ingest.effects import drained, effects
from bench.ingest.load import Load, prepared, send
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.store import migrate

WARM_SECONDS: Final = 1.0
CONTENDERS: Final = (BARE, CEILING, TRACKER, WITH_WORKER, WITH_ENDPOINTS, PEER)


@dataclass(frozen=True, slots=True)
class Round:
    """What one contender did in one round. `kept` is how many rows it had afterwards.

    Of one that applies after it has answered, `applied_rate` is how many it applied a second while
    callbacks came in, and `without_effect` how many were acknowledged and never applied.
    """

    contender: str
    acknowledged: int
    refused: int
    rate: float
    kept: int | None
    processor: float
    """Seconds of one processor for each second."""
    applied_rate: float | None = None
    without_effect: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        warm: Load,
        load: Load,
        kept: int | None,
        processor_seconds: float,
        **more: Any,
    ) -> Self:
        """What a server did that got warm and was then loaded; the time is that of the load."""
        return cls(
            name,
            warm.acknowledged + load.acknowledged,
            warm.refused + load.refused,
            load.rate,
            kept,
            processor_seconds / load.seconds,
            **more,
        )

    @property
    def lost(self) -> int:
        """How many were acknowledged and are not there, or without effect."""
        missing = 0 if self.kept is None else max(0, self.acknowledged - self.kept)
        return max(missing, self.without_effect)


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
            if contender.applies:
                drained(url)
            used = running.processor_seconds()
            load = send(requests, running.port, connections=connections, seconds=seconds)
            used = running.processor_seconds() - used
            more = _applied(url, warm, load) if contender.applies else {}
        kept = None if contender.table is None else count(url, contender.table)
    return Round.of(contender.name, warm, load, kept, used, **more)


def _applied(url: str, warm: Load, load: Load) -> dict[str, Any]:
    """How many were applied while they came in; and then, whether all are in the end."""
    now = effects(url)
    drained(url)
    acknowledged = warm.acknowledged + load.acknowledged
    return {
        "applied_rate": (now.stored - now.waiting - warm.acknowledged) / load.seconds,
        "without_effect": max(0, acknowledged - effects(url).runs),
    }


def compare(
    report: Report, kind: str, *, connections: int, rounds: int, seconds: float
) -> list[Round]:
    """All contenders, `rounds` times in turn; their table goes into the report."""
    found: list[Round] = []
    for number in range(rounds):
        for contender in CONTENDERS:
            one = one_round(contender, kind, connections=connections, seconds=seconds)
            say(f"{kind}, {connections} connections, round {number + 1}: {one}")
            found.append(one)
    rates = {one.name: median_of(found, one.name) for one in CONTENDERS}
    applied = [one.applied_rate for one in found if one.applied_rate is not None]
    report.add(
        Table(
            f"Durable ingest, {kind}, {connections} connections",
            (
                *("", "acknowledged/s", "range", "of the bare one"),
                *("of the tracker's server", "times the peer", "processors", "lost"),
            ),
            [
                (
                    name,
                    f"{rate:,.0f}",
                    _range(found, name),
                    f"{rate / rates[BARE.name]:.2f}",
                    f"{rate / rates[CEILING.name]:.2f}",
                    f"{rate / rates[PEER.name]:.1f}",
                    f"{median_of(found, name, 'processor'):.2f}",
                    sum(one.lost for one in found if one.contender == name),
                )
                for name, rate in rates.items()
            ],
            "While callbacks come in flat out, the tracker applies "
            f"{statistics.median(applied):,.0f} a second ({min(applied):,.0f} to "
            f"{max(applied):,.0f}); the rest follows.",
        )
    )
    report.figures[f"{kind}-{connections}"] = _figures(found)
    return found


def _range(found: Sequence[Round], name: str) -> str:
    rates = [one.rate for one in found if one.contender == name]
    return f"{min(rates):,.0f} to {max(rates):,.0f}"


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
