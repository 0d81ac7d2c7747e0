"""Runs end while an endpoint is down and the tracker is killed: who gets what, and how late."""

import asyncio
import math
import random
import signal
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from tests.e2e.processes import Sandbox
from tests.support.endpoint import SECRET, Got, Receiver
from tests.support.waiting import eventually
from tracker.simulator import Options, Simulator, running
from tracker.store.engine import Database
from tracker.store.queries.endpoints import list_endpoints
from tracker.store.queries.runs import get_run, get_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliveries:
    """What an endpoint got of `runs` ended runs: the `missing` ones, those under `several_ids`,
    those that came `early`, before the row was settled, and how many requests were `unverified`;
    `repeated` ones were taken more than once. Delays are seconds from the end's commit."""

    runs: int
    missing: list[str]
    several_ids: list[str]
    early: list[str]
    unverified: int
    repeated: int
    p50: float
    p95: float

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        kept = {
            "missing": self.missing,
            "under several ids": self.several_ids,
            "before its run was settled": self.early,
            "not verified": self.unverified,
        }
        return [f"{name}: {value}" for name, value in kept.items() if value]


def endpoint_tables(**receivers: Receiver) -> str:
    """Settings with an endpoint for each of these receivers."""
    return "\n".join(
        f'[[endpoints]]\nid = "{name}"\nurl = "{receiver.url}"\nsecrets = "{SECRET}"\n'
        "allow_private = true\n"
        for name, receiver in receivers.items()
    )


async def outage(
    sandbox: Sandbox, database: Database, *, runs: int, seconds: float, kills: int, within: float
) -> tuple[Deliveries, Deliveries]:
    """While one endpoint is down for so many seconds, so many runs are started and end, and the
    tracker is killed and started again; what that endpoint got in the end, and another one.

    Everything has to arrive `within` seconds after the last start.
    """
    early: list[str] = []

    async def check(got: Got) -> None:
        record = await get_run(database, got.run_id)
        if record is None or not record.run.settled:
            early.append(got.run_id)

    options = Options(run_seconds=20, speed=20, drop=0.2, duplicate=0.1, failures=0.1)
    async with (
        running(options) as flora,
        Receiver(down=True, on_request=check) as down,
        Receiver(on_request=check) as up,
    ):
        config = sandbox.directory / "tracker.toml"
        config.write_text(endpoint_tables(down=down, up=up))
        env = {"TRACKER_CONFIG": str(config), "TRACKER_RECONCILE_CRON": "* * * * *"}
        env |= flora.environment
        server = await sandbox.serve(**env)
        await eventually(lambda: _configured(database))
        starting = asyncio.create_task(_start(flora, sandbox, runs, seconds))
        chance = random.Random(runs)
        for _ in range(kills):
            await asyncio.sleep(seconds / (kills + 1) * chance.uniform(0.8, 1.2))
            assert await server.kill() == -signal.SIGKILL
            server = await sandbox.serve(**env)
        run_ids = await starting
        down.down = False

        def arrived() -> bool:
            return all(receiver.runs.keys() >= run_ids for receiver in (down, up))

        with suppress(AssertionError):  # the figures have what is missing
            await eventually(arrived, timeout=within, interval=0.2)
        records = await get_runs(database, sorted(run_ids))
        settled = {run_id: record.settled_at for run_id, record in records.items()}
        assert await server.stop() == 0, server.log[-5000:]
        assert "Traceback" not in server.log, server.log[-5000:]
        return _figures(down, settled, early), _figures(up, settled, early)


async def _configured(database: Database) -> bool:
    return len(await list_endpoints(database)) == 2


async def _start(flora: Simulator, sandbox: Sandbox, runs: int, seconds: float) -> set[str]:
    """Start so many runs, spread over so many seconds; their ids."""
    run_ids = set()
    for _ in range(runs):
        run = flora.start("icon-pack", callback_url=f"{sandbox.tracker}/callbacks/flora")
        run_ids.add(run.run_id)
        await asyncio.sleep(seconds / runs)
    return run_ids


def _figures(
    receiver: Receiver, settled: dict[str, datetime | None], early: list[str]
) -> Deliveries:
    ids: dict[str, set[str]] = defaultdict(set)
    first: dict[str, datetime] = {}
    for got in receiver.got:
        ids[got.run_id].add(got.message_id)
    for got in receiver.taken:
        first.setdefault(got.run_id, got.at)
    took = sorted(
        (first[run_id] - at).total_seconds()
        for run_id, at in settled.items()
        if at is not None and run_id in first
    )

    def quantile(share: float) -> float:
        return took[max(math.ceil(share * len(took)) - 1, 0)] if took else math.inf

    return Deliveries(
        runs=len(settled),
        missing=sorted(settled.keys() - first.keys()),
        several_ids=[run_id for run_id, some in ids.items() if len(some) > 1],
        early=early,
        unverified=sum(not got.verified for got in receiver.got),
        repeated=sum(count - 1 for count in receiver.runs.values()),
        p50=quantile(0.5),
        p95=quantile(0.95),
    )
