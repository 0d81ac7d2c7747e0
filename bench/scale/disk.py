"""Bytes on disk for each run, by table and index, as the rows came to lie."""

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Final

from bench.report import Report, Table
from bench.scale.databases import Plot
from bench.sizes import SIZES
from tracker.store.engine import Database
from tracker.store.writing import rollups

LEAST: Final = 0.5
"""Bytes for each run below which a table or an index is not shown."""

Part = tuple[str, str, int]


def disk(report: Report, plot: Plot) -> None:
    """Measure; the table goes into the report."""
    parts = asyncio.run(_parts(plot))
    counted_in = asyncio.run(_recount(plot))
    shown = [part for part in parts if part[2] / plot.runs >= LEAST]
    shown.sort(key=lambda part: (_total(parts, part[1]), part[0] == part[1], part[2]), reverse=True)
    total = sum(size for *_, size in parts)
    report.add(
        Table(
            f"Bytes on disk for each run, {plot.kind}, {plot.runs:,} runs",
            ("table or index", "bytes a run"),
            [
                *(
                    (name if name == of else f"&nbsp;&nbsp;{name}", f"{size / plot.runs:,.0f}")
                    for name, of, size in shown
                ),
                ("**in all**", f"**{total / plot.runs:,.0f}**"),
            ],
            f"Rows of the least content (`python -m bench.disk` has rows as FLORA's), made in "
            f"{plot.filled_in:.0f} s; `tracker db recount` takes {counted_in:.0f} s.",
        )
    )
    report.figures[f"disk-{plot.kind}"] = {
        "runs": plot.runs,
        "filled_in": plot.filled_in,
        "counted_in": counted_in,
        "bytes": {name: size for name, _, size in parts},
        "bytes_per_run": total / plot.runs,
    }


async def _parts(plot: Plot) -> list[Part]:
    if plot.kind == "sqlite":
        with closing(sqlite3.connect(plot.url.removeprefix("sqlite:///"))) as file:
            return [tuple(row) for row in file.execute(SIZES["sqlite"])]
    async with plot.connected() as connection:
        rows: Sequence[Any] = await connection.fetch(SIZES["postgresql"])
    return [(row["name"], row["of"], row["size"]) for row in rows]


async def _recount(plot: Plot) -> float:
    """Seconds that it takes to count all runs anew."""
    async with await Database.open(plot.url) as db:
        began = time.perf_counter()
        await rollups.recount(db)
        return time.perf_counter() - began


def _total(parts: Sequence[Part], table: str) -> int:
    return sum(size for _, of, size in parts if of == table)
