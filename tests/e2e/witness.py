"""What the world sees of a tracker, and whether it is what was promised.

A witness posts signed deliveries until each is taken, starts runs until each is started, reads
every page and route again and again, and follows the stream, all at the same time. It notes how
long each answer took and every answer that breaks a promise. Afterwards the database has to agree
with it, and with FLORA's own records.
"""

import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from itertools import count, cycle
from typing import Any

import httpx
import sqlalchemy as sa

from tests.e2e.truth import assert_all_true, true_records
from tests.support.deliveries import applied
from tests.support.waiting import SteadyClock, eventually
from tests.web.serving import post, wire
from tracker.core.clock import utc_now
from tracker.flora.callback import sign
from tracker.store.engine import Database
from tracker.store.schema import deliveries, run_events, run_tally_changes, runs

LATEST = 9.0
"""Seconds within which every answer has to come."""
PAUSE = 0.1
"""Seconds between what one sender, reader or starter does and what it does next."""
PROGRAMS = (
    *("/readyz", "/metrics", "/api/runs", "/api/runs/run_x", "/api/runs/run_x/events"),
    *("/api/techniques", "/api/techniques/icon-pack"),
)
PAGES = ("/", "/runs", "/deliveries", "/techniques", "/batches", "/health", "/runs/run_x")
HTML = {"accept": "text/html"}
CALLBACKS = "/callbacks/flora"
SECRET = "whsec_simulator"


class Witness:
    """Watches the tracker at `tracker` while a `Traffic` is on. `secrets` may be shown nowhere."""

    def __init__(self, tracker: str, *, secrets: tuple[str, ...]) -> None:
        self.tracker = tracker
        self._secrets = secrets
        self._number = count()
        self._tasks: list[asyncio.Task[None]] = []
        self._going = True
        self._clock = SteadyClock()
        self.acknowledged: set[str] = set()
        """Of our own deliveries, those that got a 2xx."""
        self.started: set[str] = set()
        self.streamed: set[int] = set()
        """The numbers of the events that the stream has brought."""
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.slowest = ("", 0.0)
        self.broken: list[str] = []
        """Promises that were broken, in words."""

    def begin(self, *, senders: int, readers: int, starters: int, size: int = 2000) -> None:
        """Begin all of it; `size` is how many bytes a delivery has."""
        work = [self._clock.tick(), self._follow(), self._ask("/healthz", "/healthz")]
        work += [self._send(size) for _ in range(senders)]
        work += [self._ask(*PROGRAMS, *PAGES[number:]) for number in range(readers)]
        work += [self._start() for _ in range(starters)]
        self._tasks = [asyncio.create_task(one) for one in work]

    async def flood(self, deliveries: int, size: int) -> None:
        """Post so many at once, and do not come back with those that are refused.

        They are made beforehand and go out as they are: the time is the tracker's, not ours.
        """
        bodies = [self._body(size) for _ in range(deliveries)]
        requests = [_request(body) for _, body in bodies]
        taken = await asyncio.gather(*(self._throw(request) for request in requests))
        self.acknowledged |= {name for (name, _), one in zip(bodies, taken, strict=True) if one}

    async def _throw(self, request: bytes) -> bool:
        """Send a delivery over a connection of its own; whether it was taken."""
        what = f"POST {CALLBACKS}"
        try:
            async with wire(self.tracker) as connection:
                began = self._clock()
                await connection.send(request)
                answer = await connection.answer()
        except (OSError, EOFError) as error:
            self.broken.append(f"{what}: {type(error).__name__}")
            return False
        took = self._clock() - began
        response = httpx.Response(answer.status, headers=answer.headers, content=answer.body)
        self._judge(what, CALLBACKS, response, took)
        return response.is_success

    async def back(self, within: float) -> float:
        """Wait until the tracker says that it is ready, and takes a delivery; in how many seconds
        it did."""

        async def works() -> bool:
            ready = await self._timed(client, "GET", "/readyz")
            return ready is not None and ready.is_success and await self._post(client, body)

        began = time.monotonic()
        name, body = self._body(100)
        async with self._client() as client:
            await eventually(works, timeout=within)
        self.acknowledged.add(name)
        return time.monotonic() - began

    async def end(self) -> None:
        """Let each finish what it is at: what was not taken yet is posted until it is. The stream
        is followed on, and the clock goes on."""
        self._going = False
        await asyncio.gather(*self._tasks[2:])

    async def close(self) -> None:
        """Leave, whatever is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, size: int) -> None:
        """Post deliveries that are FLORA's and not understood: they belong to no run."""
        async with self._client() as client:
            while self._going:
                name, body = self._body(size)
                while not await self._post(client, body):  # noqa: ASYNC110 - it is posted again
                    await asyncio.sleep(5 * PAUSE)
                self.acknowledged.add(name)
                await asyncio.sleep(PAUSE)

    def _body(self, size: int) -> tuple[str, bytes]:
        """A new delivery: its id, and its body of about `size` bytes."""
        name = f"whd_witness_{next(self._number)}"
        return name, json.dumps({"id": name, "type": "?", "more": "x" * size}).encode()

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> bool:
        headers = {"flora-signature": sign(body, SECRET, at=utc_now())}
        answer = await self._timed(client, "POST", CALLBACKS, content=body, headers=headers)
        return answer is not None and answer.is_success

    async def _start(self) -> None:
        async with self._client() as client:
            while self._going:
                number = next(self._number)
                body = {
                    "technique": "icon-pack",
                    "inputs": [{"id": "prompt", "type": "text", "value": f"icon {number}"}],
                    "idempotency_key": f"witness-{number}",
                }
                while True:
                    answer = await self._timed(client, "POST", "/api/runs", json=body)
                    if answer is not None and answer.is_success:
                        self.started.add(answer.json()["run_id"])
                        break
                    await asyncio.sleep(5 * PAUSE)
                await asyncio.sleep(3 * PAUSE)

    async def _ask(self, *paths: str) -> None:
        async with self._client() as client:
            for path in cycle(paths):
                if not self._going:
                    return
                headers = HTML if path in PAGES else None
                await self._timed(client, "GET", path, headers=headers)
                await asyncio.sleep(PAUSE)

    async def _follow(self) -> None:
        """Follow the stream, and come back with the last number wherever it breaks off."""
        last = 0
        async with self._client() as client:
            while True:
                with suppress(httpx.TransportError):
                    url = f"/api/stream?last_event_id={last}"
                    async with client.stream("GET", url, timeout=30) as answer:
                        async for line in answer.aiter_lines():
                            name, _, value = line.partition(": ")
                            if name == "id":
                                last = int(value)
                            elif name == "data" and (event := json.loads(value).get("event")):
                                self.streamed.add(event["id"])
                await asyncio.sleep(PAUSE)

    async def _timed(
        self, client: httpx.AsyncClient, method: str, path: str, **request: Any
    ) -> httpx.Response | None:
        """Ask, and judge the answer; `None` where there was none."""
        began = self._clock()
        try:
            answer = await client.request(method, path, **request)
        except httpx.TransportError as error:
            self.broken.append(f"{method} {path}: {type(error).__name__}")
            return None
        self._judge(f"{method} {path}", path, answer, self._clock() - began)
        return answer

    def _judge(self, what: str, path: str, answer: httpx.Response, took: float) -> None:
        """Count an answer, and note what is wrong with it; it came after `took` seconds."""
        if took > self.slowest[1]:
            self.slowest = (what, took)
        if took > LATEST:
            self.broken.append(f"{what}: answered {answer.status_code} after {took:.1f} s")
        self.statuses[path, answer.status_code] += 1
        self.broken += self._faults(what, path, answer)

    def _faults(self, what: str, path: str, answer: httpx.Response) -> list[str]:
        """What an answer should not be."""
        text = answer.text
        found = [f"{what}: shows a secret" for secret in self._secrets if secret in text]
        if "Traceback" in text or "sqlalchemy" in text:
            found.append(f"{what}: shows what is behind it: {text[:200]}")
        if answer.is_success or (answer.status_code == 404 and "run_x" in path):
            return found
        if answer.status_code != 503 or path in ("/healthz", "/metrics"):
            return [*found, f"{what}: {answer.status_code} {text[:200]}"]
        if "retry-after" not in answer.headers:
            found.append(f"{what}: 503 without Retry-After")
        if path not in PAGES:
            error = answer.json()["error"]
            started = {"run_id"} if error["code"] == "not_stored" else set()
            if error.keys() != {"code", "message"} | started:
                found.append(f"{what}: 503 in another shape: {text[:200]}")
        return found

    def _client(self) -> httpx.AsyncClient:
        unlimited = httpx.Limits(max_connections=None)  # to wait for one is no wait for an answer
        return httpx.AsyncClient(
            base_url=self.tracker, timeout=30, trust_env=False, limits=unlimited
        )


def _request(body: bytes) -> bytes:
    """A signed delivery as it goes over the wire."""
    signature = sign(body, SECRET, at=utc_now())
    return post(CALLBACKS, body, f"Flora-Signature: {signature}", "Connection: close")


async def assert_nothing_lost(
    witness: Witness, database: Database, simulator: str, *, within: float
) -> int:
    """When all is quiet: what was acknowledged is stored, with its effect; every run is settled and
    true; the stream has told all. How many deliveries were acknowledged."""
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        answer = await client.get(f"{simulator}/simulator/deliveries")
    taken = [sent for sent in answer.json()["deliveries"] if sent["status"] == 200]

    async def all_settled() -> bool:
        truth = await true_records(simulator)
        query = sa.select(sa.func.count()).where(runs.c.tracking == "settled")
        async with database.read() as connection:
            return (await connection.execute(query)).scalar_one() == len(truth)

    await eventually(all_settled, timeout=within, interval=0.2)
    await applied(database)
    await assert_all_true(database, simulator)
    async with database.read() as connection:
        kept = set((await connection.execute(sa.select(deliveries.c.delivery_id))).scalars())
        told = sa.select(runs.c.run_id).where(runs.c.callback_at.is_not(None))
        told_runs = set((await connection.execute(told)).scalars())
        known = set((await connection.execute(sa.select(runs.c.run_id))).scalars())
    assert witness.acknowledged <= kept
    assert {sent["delivery_id"] for sent in taken} <= kept
    assert {sent["run_id"] for sent in taken} <= told_runs
    assert witness.started <= known

    async def all_told() -> bool:
        async with database.read() as connection:
            numbers = set((await connection.execute(sa.select(run_events.c.id))).scalars())
        return numbers <= witness.streamed

    await eventually(all_told, timeout=within, interval=0.2)
    return len(witness.acknowledged) + len(taken)


async def assert_folded(database: Database, *, within: float) -> None:
    """The counts for dashboards have taken in every change, which a tracker that stops sees to."""

    async def all_folded() -> bool:
        query = sa.select(sa.func.count()).select_from(run_tally_changes)
        async with database.read() as connection:
            return (await connection.execute(query)).scalar_one() == 0

    await eventually(all_folded, timeout=within, interval=0.2)
