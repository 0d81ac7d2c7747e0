"""Alternating rounds of the tracker and other receivers, on the same kind of database."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

from bench.ingest.contenders import TRACKER
from bench.ingest.load import send, written
from bench.ingest.rounds import WARM_SECONDS, Round, median_of, one_round
from bench.others.receiver import Receiver
from bench.report import Report, Table, say

FASTEST: Final = 15_000
"""Callbacks a second for which enough are prepared: far beyond what a receiver here does."""


def compare(
    report: Report,
    receivers: Sequence[Receiver],
    installed: Path,
    *,
    connections: int,
    rounds: int,
    seconds: float,
) -> list[Round]:
    """The tracker and what stands in one directory, `rounds` times in turn; their table goes into
    the report."""
    kind = receivers[0].kind
    found: list[Round] = []
    for number in range(rounds):
        for run in (
            partial(one_round, TRACKER, kind),
            *(partial(_other_round, receiver, installed) for receiver in receivers),
        ):
            one = run(connections=connections, seconds=seconds)
            say(f"{kind}, {connections} connections, round {number + 1}: {one}")
            found.append(one)
    names = (TRACKER.name, *(receiver.name for receiver in receivers))
    report.add(_table(f"Beside others, {kind}, {connections} connections", names, found))
    report.figures[f"{kind}-{connections}"] = [asdict(one) for one in found]
    return found


def _other_round(receiver: Receiver, installed: Path, *, connections: int, seconds: float) -> Round:
    """As `bench.ingest.rounds.one_round`: get warm, be loaded, and count what was kept."""
    name = secrets.token_hex(4)
    with (
        receiver.storage() as storage,
        written(receiver.signed(int(seconds * FASTEST), f"{name}0")) as requests,
        written(receiver.signed(int(WARM_SECONDS * FASTEST), f"{name}1")) as warm_up,
    ):
        with receiver.started(installed, storage, connections=connections) as running:
            loaded = partial(
                send,
                port=running.port,
                connections=connections,
                path=receiver.path,
                header=receiver.header,
            )
            warm = loaded(warm_up, seconds=WARM_SECONDS)
            used = running.processor_seconds()
            load = loaded(requests, seconds=seconds)
            used = running.processor_seconds() - used
        kept = receiver.kept(storage)
    return Round.of(receiver.name, warm, load, kept, used)


def _table(title: str, names: Sequence[str], found: Sequence[Round]) -> Table:
    rates = {name: median_of(found, name) for name in names}
    return Table(
        title,
        ("", "callbacks/s", "times", "processors", "lost"),
        [
            (
                name,
                f"{rate:,.0f}",
                f"{rates[TRACKER.name] / rate:.1f}" if rate else "-",
                f"{median_of(found, name, 'processor'):.2f}",
                sum(one.lost for one in found if one.contender == name),
            )
            for name, rate in rates.items()
        ],
        "Times: how many callbacks the tracker takes for each one of its. Processors: of the "
        "receiver's process, without PostgreSQL's. They do different work: see bench/others.",
    )
