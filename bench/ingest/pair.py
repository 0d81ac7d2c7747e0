"""Two receivers on one PostgreSQL beside one: what a second process is worth.

The load is the same and comes from as many senders: half of it to each receiver, or both halves to
the one. With two processors for all (receivers, PostgreSQL, senders) this shows what they share
rather than what a second machine would give.
"""

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

from bench.ingest.contenders import TRACKER, started
from bench.ingest.effects import drained
from bench.ingest.load import prepared, send
from bench.ingest.rounds import WARM_SECONDS, Round, count, median_of
from bench.report import Report, Table, say
from bench.throw_away import throw_away
from tracker.store import migrate

SENDERS: Final = 2


def pair(report: Report, *, connections: int, rounds: int, seconds: float) -> list[Round]:
    """One and two receivers, `rounds` times in turn; the table goes into the report."""
    found: list[Round] = []
    for number in range(rounds):
        for receivers in (1, 2):
            one = _round(receivers, connections=connections, seconds=seconds)
            say(f"receivers, {connections} connections, round {number + 1}: {one}")
            found.append(one)
    names = list(dict.fromkeys(one.contender for one in found))
    first = median_of(found, names[0])
    rows = []
    for name in names:
        rate, processors = median_of(found, name), median_of(found, name, "processor")
        lost = sum(one.lost for one in found if one.contender == name)
        rows.append((name, f"{rate:,.0f}", f"{rate / first:.2f}", f"{processors:.2f}", lost))
    columns = ("", "callbacks/s", "times one", "processors of the receivers", "lost")
    report.add(Table(f"Receivers on one PostgreSQL, {connections} connections", columns, rows))
    report.figures[f"receivers-{connections}"] = [
        {"receivers": one.contender, "rate": one.rate, "processor": one.processor} for one in found
    ]
    return found


def _round(receivers: int, *, connections: int, seconds: float) -> Round:
    prefix = secrets.token_hex(4)
    with throw_away("postgresql") as url, ExitStack() as stack:
        asyncio.run(migrate.upgrade(url))
        running = [stack.enter_context(started(TRACKER, url)) for _ in range(receivers)]
        ports = [running[sender % receivers].port for sender in range(SENDERS)]
        files = {
            (phase, sender): stack.enter_context(
                prepared(int(length * TRACKER.fastest / SENDERS), prefix=f"{prefix}{phase}{sender}")
            )
            for phase, length in enumerate((WARM_SECONDS, seconds))
            for sender in range(SENDERS)
        }

        def load(phase: int, length: float) -> tuple[int, int, float]:
            with ThreadPoolExecutor(SENDERS) as pool:
                sent = [
                    pool.submit(
                        send,
                        files[phase, sender],
                        port,
                        connections=connections // SENDERS,
                        seconds=length,
                    )
                    for sender, port in enumerate(ports)
                ]
                loads = [each.result() for each in sent]
            return (
                sum(each.acknowledged for each in loads),
                sum(each.refused for each in loads),
                sum(each.rate for each in loads),
            )

        warm, warm_refused, _ = load(0, WARM_SECONDS)
        used = sum(each.processor_seconds() for each in running)
        acknowledged, refused, rate = load(1, seconds)
        used = sum(each.processor_seconds() for each in running) - used
        drained(url)
        stack.close()
        kept = count(url, "deliveries")
    name = "one receiver" if receivers == 1 else f"{receivers} receivers"
    return Round(name, warm + acknowledged, warm_refused + refused, rate, kept, used / seconds)
