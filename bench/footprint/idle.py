"""What a tracker uses to which nothing happens: with its worker, and a FLORA that has no runs.

What it does is what it does for ever: look what is due, sweep, keep the
counts and the clock.
"""

import asyncio
import time
from collections import Counter
from typing import Final

from bench.footprint.process import Usage, serving
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.simulator import Options, running
from tracker.store import migrate

QUIET_SECONDS: Final = 10.0
"""After the start, for what is done once."""
SHOWN: Final = 8


def idle(report: Report, kind: str, *, seconds: float) -> None:
    """Measure on one kind of database; the table goes into the report."""
    with throw_away(kind) as url:
        asyncio.run(migrate.upgrade(url))
        used, sent = asyncio.run(_watch(kind, url, seconds))
    minutes = seconds / 60
    rows = [
        ("processor", f"{used.processor / seconds:.2%}"),
        ("wakings a minute, all threads", f"{used.wakings / minutes:.0f}"),
        ("statements a minute", f"{sent.total() / minutes:.1f}"),
        *(
            (f"&nbsp;&nbsp;`{statement[:90]}`", f"{count / minutes:.1f}")
            for statement, count in sent.most_common(SHOWN)
        ),
    ]
    report.add(Table(f"Nothing happens, {kind}, {seconds:.0f} s", ("", ""), rows))
    report.figures[f"idle-{kind}"] = {
        "seconds": seconds,
        "processor": used.processor,
        "wakings": used.wakings,
        "statements": dict(sent),
    }


async def _watch(kind: str, url: str, seconds: float) -> tuple[Usage, Counter[str]]:
    async with running(Options()) as flora:
        return await asyncio.to_thread(_wait, kind, url, flora.environment, seconds)


def _wait(
    kind: str, url: str, environ: dict[str, str], seconds: float
) -> tuple[Usage, Counter[str]]:
    with serving(url, module="bench.footprint.counted", environ=environ) as tracker:
        time.sleep(QUIET_SECONDS)
        sent, used = Counter(tracker.statements()), tracker.seen()
        say(f"{kind}: nothing happens for {seconds:.0f} s")
        time.sleep(seconds)
        used, later = tracker.seen() - used, Counter(tracker.statements())
    return used, later - sent
