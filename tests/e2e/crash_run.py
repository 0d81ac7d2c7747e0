"""One tracker, one FLORA with faults, one database: the tracker's lives are cut short one after the
other, its clients and FLORA go on, and in the end everything that was promised is held.
"""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from tests.e2e.clients import OURS, Clients
from tests.e2e.crashing import Point, prepare
from tests.e2e.hooks import endpoint_tables
from tests.e2e.judgement import Verdict, batches_to_launch, judge, undecided_starts, unsent_runs
from tests.e2e.lives import FloraKey, Life
from tests.e2e.starting import DEPLOYED, FORGOTTEN
from tests.e2e.truth import settled_runs
from tests.support.endpoint import Receiver
from tests.support.waiting import eventually, free_port
from tracker.core.clock import utc_now
from tracker.simulator import Options, Simulator, running
from tracker.store.engine import Database
from tracker.store.schema import leases, messages, techniques

FAULTS: dict[str, Any] = {
    "run_seconds": 4.0,
    "speed": 10.0,
    "drop": 0.3,
    "duplicate": 0.2,
    "early": 0.15,
    "reorder": 0.1,
    "bad_signature": 0.05,
    "rate_limit": 0.03,
    "retry_after": 0,
    "errors": 0.03,
    "cut": 0.03,
    **DEPLOYED,
    # Each life waits for what is in doubt, and there are many lives.
    "gateway_starts": 0.05,
    "lost_starts": 0.02,
    "failed_starts": 0.02,
    "slow_starts": 0.02,
    "slow_seconds": 5.0,
    "gateway_reads": 0.2,  # a failed read is tried another way
    "gateway_pages": 0.02,
}
Role = Literal["serve", "receiver", "worker", "batch"]
COMMANDS: dict[Role, tuple[str, ...]] = {
    "serve": ("serve",),
    "receiver": ("serve", "--no-worker"),
    "worker": ("worker",),
    "batch": ("batch", "icon-pack", "--no-wait", "--json"),
}


class CrashRun:
    """Made by `crash_run`. `killed` counts the crash points at which a life has ended."""

    def __init__(
        self,
        flora: Simulator,
        database: Database,
        database_url: str,
        directory: Path,
        receiver: Receiver,
    ) -> None:
        self.killed: Counter[str] = Counter()
        self._flora = flora
        self._database = database
        self._directory = directory
        self._port = free_port()
        root = f"http://127.0.0.1:{self._port}"
        self.clients = Clients(root, flora)
        self._receiver = receiver
        self._key = FloraKey(flora, directory, more=endpoint_tables(shop=receiver))
        self._environment = {
            **self._key.environment,
            "TRACKER_DATABASE_URL": database_url,
            "TRACKER_PUBLIC_URL": root,
            "TRACKER_START_DOUBT": "2",
            "TRACKER_CALLBACK_GRACE": "0.4",
            "TRACKER_POLL_INTERVAL": "0.3",
            "TRACKER_POLL_INTERVAL_MAX": "1",
            "TRACKER_API_CONCURRENCY": "4",
            "TRACKER_LOG_FORMAT": "json",
        }
        self._lives = 0
        self._living: list[Life] = []

    async def live(self, role: Role, at: Point | None = None, *, flora_fails: bool = False) -> Life:
        """One life in which a little of everything happens, to the point or until all is calm.

        `flora_fails` lets FLORA answer nothing but errors for parts of it.
        """
        await self._let_time_pass()
        if self._lives % 2:
            await self._key.exchange()  # whose workspace has to be learnt
        if flora_fails:
            self.clients.flora_fails()
        answers = role in ("serve", "receiver")
        # One of three is a generation.
        for with_callback in (False, True, True):
            self.clients.start_elsewhere(with_callback=with_callback and answers)
        if role == "batch":
            return await self._start_batch(at)
        life, health = self._begin(role, at)
        if await life.ready(health):
            if answers:
                self.clients.start()
                self.clients.start(patient=self._lives % 3 > 0)
                self.clients.send()
                self.clients.order()
                self.clients.start_wrongly()
            await self._calm_or_over(life, answers=answers)
            life.tell()
        await self._over(life)
        return life

    async def settle(self) -> None:
        """A life in which nothing happens but what is left to do."""
        # A message that failed twice in a life with the tracker's own waits has five minutes left.
        pending = messages.update().where(messages.c.state == "pending")
        await self._database.execute(pending.values(next_attempt_at=utc_now()))
        life, health = self._begin("serve")
        await life.ready(health)
        await self._calm_or_over(life)
        await self.stop(life)

    async def kill_at_random(
        self, roles: Sequence[Role], seconds: float, chance: random.Random
    ) -> None:
        """Lives of each role for so long, under a stream of work, each killed at any moment of its
        first second or two, or at the nth crash point that it comes to; prices change, FLORA
        exchanges its key, and what `FORGOTTEN` says comes to what happens always."""
        end = time.monotonic() + seconds

        async def die_again_and_again(role: Role) -> None:
            while time.monotonic() < end:
                at = None
                if chance.random() < 0.5:
                    at = Point(when=chance.choice(("before", "after")), nth=chance.randint(1, 60))
                life, _ = self._begin(role, at)
                await asyncio.sleep(chance.uniform(0.05, 1.5))
                life.kill()
                await self._over(life)

        async def change_again_and_again() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(chance.uniform(2, 6))
                self._flora.world.change({"price_factor": chance.choice((0.5, 1, 20))})
                await self._key.exchange()

        self._flora.world.change(FORGOTTEN)
        async with self.streaming(chance):
            await asyncio.gather(change_again_and_again(), *map(die_again_and_again, roles))
        self._flora.world.change({"key_hours": None, "colleague": 0})

    @asynccontextmanager
    async def streaming(self, chance: random.Random) -> AsyncIterator[None]:
        """While the block lasts, runs are started here and elsewhere, end, and are called back."""
        going_on = asyncio.create_task(self.clients.stream(chance))
        try:
            yield
        finally:
            going_on.cancel()

    async def serve_patiently(self) -> Life:
        """A life with the tracker's own waits, that is ready."""
        life, health = self._begin("serve", hasty=False)
        assert await life.ready(health), life.log
        return life

    async def stop(self, life: Life) -> float:
        """Tell a life to stop; in how many seconds it ended, and well."""
        began = time.monotonic()
        life.tell()
        await self._over(life)
        assert not life.killed
        return time.monotonic() - began

    def _begin(
        self, role: Role, at: Point | None = None, *, more: str = "", hasty: bool = True
    ) -> tuple[Life, str]:
        """A new life, and where it says that it is there; a batch's `more` is its sheet."""
        self._lives += 1
        port = free_port() if role == "worker" else self._port
        arguments = (more,) if role == "batch" else ("--port", str(port))
        life = Life.begin(
            *(*COMMANDS[role], *arguments),
            env=self._environment,
            log=self._directory / f"{self._port}-{self._lives}.log",
            prepare=partial(prepare, at) if hasty else None,
        )
        self._living.append(life)
        return life, f"http://127.0.0.1:{port}/healthz"

    async def _start_batch(self, at: Point | None) -> Life:
        """A life that starts a sheet, and where it was killed one more that starts it again."""
        sheet = self._directory / f"{self._port}-{self._lives}.csv"
        rows = [f"{OURS}{sheet.stem}, row {number}" for number in range(4)]
        sheet.write_text("\n".join(["prompt", *(f'"{row}"' for row in rows)]))
        life, _ = self._begin("batch", at, more=str(sheet))
        await self._over(life, well=(0, 1))
        if life.killed:
            again, _ = self._begin("batch", more=str(sheet))
            await self._over(again, well=(0, 1))
        return life

    async def _over(self, life: Life, *, well: tuple[int, ...] = (0,)) -> None:
        """Wait for the end of a life; it was killed, or has ended well."""
        status = await life.end()
        assert life.killed or status in well, f"exit status {status}:\n{life.log}"
        assert "Traceback" not in life.log, life.log
        if life.killed:
            at = re.search(r"^killed (.+)$", life.log, re.MULTILINE)
            self.killed[at[1] if at else "at random"] += 1

    async def _calm_or_over(self, life: Life, *, answers: bool = True) -> None:
        """Wait until every run is settled, and all clients are answered by a life that does, or the
        life is over."""

        async def calm_or_over() -> bool:
            if life.status is not None:
                return True
            return (not answers or self.clients.all_answered()) and await self._calm()

        try:
            await eventually(calm_or_over, timeout=150, interval=0.03)
        except AssertionError as error:
            raise AssertionError(f"it did not settle: {error}\n{life.log}") from None

    async def _calm(self) -> bool:
        # In this order: what is launched or recovered meanwhile is a run more.
        if await batches_to_launch(self._database):
            return False
        if await undecided_starts(self._database, self._flora):
            return False
        if await settled_runs(self._database) < len(self._flora.world.runs):
            return False
        return not await unsent_runs(self._database, self._receiver)

    async def _let_time_pass(self) -> None:
        """What was read of the techniques is old by now, and what is known of one's inputs is wrong
        without being old: all of it has to be read again. The machine was started again as well:
        its clock is compared with the database's anew."""
        now = utc_now()
        stale = sa.update(techniques).values(defined_at=now - timedelta(hours=2))
        wrong = (
            sa.update(techniques)
            .where(techniques.c.technique_id == "tech_character-lock")
            .values(
                defined_at=now - timedelta(minutes=10),
                slug="character-lock",
                inputs=[{"id": "prompt", "name": "Prompt", "type": "text"}],
            )
        )
        unscheduled = sa.delete(leases).where(leases.c.name == "catalogue:scheduled")
        restarted = sa.delete(leases).where(leases.c.name.startswith("clock:"))

        def work(connection: sa.Connection) -> None:
            for statement in (stale, wrong, unscheduled, restarted):
                connection.execute(statement)

        await self._database.write(work)

    async def close(self) -> None:
        """End what lives still, where an assertion has failed: it would work on the next test's
        database."""
        await self.clients.close()
        for life in self._living:
            life.kill()
            await life.end()

    async def judge(self) -> Verdict:
        """Whether all of it agrees. Raises `AssertionError` where a run is not true."""
        return await judge(self._database, self._flora, self.clients, self._receiver)


@asynccontextmanager
async def crash_run(database_url: str, directory: Path, **options: Any) -> AsyncIterator[CrashRun]:
    """A crash run on that database, which has the tracker's schema; `options` are FLORA's."""
    async with (
        running(Options(**FAULTS | options)) as flora,
        await Database.open(database_url) as database,
        Receiver(errors=0.1) as receiver,
    ):
        flora.start_generation()  # the first sweep sees it, and so all sweeps look for more
        one = CrashRun(flora, database, database_url, directory, receiver)
        try:
            yield one
        finally:
            await one.close()
