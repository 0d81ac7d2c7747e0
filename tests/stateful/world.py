"""A tracker, its FLORA, and all requests and answers: what the rules of the state machine act on.

Everything runs in one event loop, so that an order of events has one outcome.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import Connection, delete

from tests.stateful.callbacks import TOLERANCE, Callback, callback, signed
from tests.stateful.clocks import Clocks
from tests.stateful.flora import WORKSPACE, ModelFlora, ModelRun, inputs_for
from tests.stateful.process import Crashed, Process
from tests.stateful.promises import Memory, check, snapshot
from tracker.store.engine import Database
from tracker.store.schema import metadata
from tracker.workspaces import Workspace

T = TypeVar("T")


class World:
    """The tracker and FLORA, over the database at `url`, which is emptied first.

    `configured_id` is the workspace's id in the settings, `secrets` those of the tracker, `signing`
    those with which FLORA signs. `figures` counts events.
    """

    process: Process

    def __init__(self, url: str, figures: Counter[str]) -> None:
        self.figures = figures
        self.clocks = Clocks()
        self.flora = ModelFlora(self.clocks)
        self.memory = Memory()
        self.configured_id: str | None = WORKSPACE
        self.secrets = ["whsec_1"]
        self.signing = ["whsec_1"]
        self._url = url
        self._count = 0
        self._runner = asyncio.Runner()
        self.run(_empty(url))

    def run(self, work: Awaitable[T]) -> T:
        """Run a coroutine outside the process."""

        async def whole() -> T:
            return await work

        return self._runner.run(whole())

    def do(self, work: Awaitable[T]) -> T | None:
        """Run a coroutine in the process; `None`, and a new process, where it dies meanwhile."""
        try:
            return self.run(self.process.do(work))
        except Crashed:
            self.figures["crashes"] += 1
            self.begin()
            return None

    def begin(self) -> None:
        """Start a new process."""
        self.process = self.run(
            Process.start(
                self._url,
                self.clocks,
                self.flora,
                secrets=self.secrets,
                workspace_id=self.configured_id,
            )
        )
        # A new process applies what the previous one left.
        self.run(self.process.services.applier.drain())

    def restart(self) -> None:
        """Stop the process in order, and start another one."""
        self.run(self.process.stop())
        self.begin()

    def check(self) -> None:
        """Check all promises."""
        self.flora.work()
        now = self.run(snapshot(self.process.services.database))
        check(now, self.flora, self.memory, holder=self.process.holder)

    def close(self) -> None:
        """Stop the process. There is none if Hypothesis breaks the example off before `begin`."""
        if "process" in vars(self):
            self.run(self.process.stop())
        self._runner.close()
        self.figures["runs"] += len(self.flora.runs)
        self.figures["requests"] += self.flora.requests
        self.figures["faults"] += self.flora.struck

    def next(self) -> int:
        """A new number."""
        self._count += 1
        return self._count

    @property
    def workspace(self) -> Workspace:
        """The workspace of the process."""
        (workspace,) = self.process.services.workspaces
        return workspace

    @property
    def flora_waits(self) -> bool:
        """Whether the process sends no requests: FLORA asked for a pause, or refused the key."""
        client = self.workspace.require_client()
        return client.request_limit.state().paused > 0 or client.breaker.open

    def callback(self, run: ModelRun, *, contrary: bool = False) -> Callback:
        """FLORA's callback for a run: the right one, or the `contrary` one.

        Before the end of the run it reports that the run completed.
        """
        status = run.status if run.ended else "completed"
        if contrary:
            status = "failed" if status == "completed" else "completed"
        delivery_id = f"whd_{run.run_id}_{status}"
        existing = self.memory.callbacks.get(delivery_id)
        return existing or self.record_callback(
            callback(self.clocks, delivery_id, run.run_id, status, run_type=run.run_type)
        )

    def record_callback(self, sent: Callback) -> Callback:
        """Record what FLORA sends."""
        self.memory.callbacks[sent.delivery_id] = sent
        return sent

    # Work of the process

    async def deliver(self, sent: Callback, *, apply: bool = True) -> None:
        """Make one attempt at a callback; apply it now, or later."""
        offset = abs(int(self.clocks.ours().timestamp()) - sent.signed_at)
        valid = offset <= TOLERANCE and any(secret in self.secrets for secret in self.signing)
        sent.tries += valid
        status = await self.post(sent.body, signed(sent, self.signing))
        assert status == (200 if valid else 401)
        sent.acknowledged += valid
        self.figures["acknowledged"] += valid
        if apply:
            await self.process.services.applier.drain()

    async def post(self, body: bytes, signature: str | None) -> int:
        """Post to the receiver."""
        headers = {} if signature is None else {"Flora-Signature": signature}
        answer = await self.process.http.post("/callbacks/flora", content=body, headers=headers)
        return answer.status_code

    async def start(self, key: str, prompt: str) -> int:
        """Start a run."""
        self.memory.keys.add(key)
        body = {"technique": "icon-pack", "inputs": inputs_for(prompt), "idempotency_key": key}
        answer = await self.process.http.post("/api/runs", json=body)
        assert answer.status_code in (200, 201, 409, 422, 502, 503, 504), answer.text
        if answer.is_success:
            self.figures["starts"] += 1
            run_id = answer.json()["run_id"]
            assert self.memory.started.setdefault(key, run_id) == run_id
        return answer.status_code

    async def track(self, run_id: str, poll_url: str | None) -> None:
        """Track a run."""
        self.memory.tracked.add(run_id)
        body = {"run_id": run_id} | ({} if poll_url is None else {"poll_url": poll_url})
        answer = await self.process.http.post("/api/runs/track", json=body)
        assert answer.status_code in (200, 201), answer.text

    async def sweep(self, *, minutes: int | None = None) -> None:
        """Sweep the history, as far as required, or only some minutes back."""
        since = None if minutes is None else timedelta(minutes=minutes)
        await self.process.services.sweeper.sweep(self.workspace, since=since)

    async def replay(self) -> None:
        """Replay all quarantined callbacks."""
        for sent in self.memory.callbacks.values():
            if sent.acknowledged and "quarantined" in sent.outcomes:
                replay = await self.process.services.replayer.replay(sent.delivery_id)
                assert replay.outcome.value == sent.outcomes[-1]


async def _empty(url: str) -> None:
    """Delete the rows of the previous example."""

    def work(connection: Connection) -> None:
        for table in reversed(metadata.sorted_tables):
            connection.execute(delete(table))

    async with await Database.open(url) as db:
        await db.write(work)
