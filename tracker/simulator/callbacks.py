"""Delivers callbacks: one for each run that asked for it, with FLORA's attempts and their faults.

A callback's body and signature are made once, at its first attempt, and stay the same for all.
"""

import asyncio
from typing import Final

import httpx

from tracker.simulator.background import Background
from tracker.simulator.delivery import Attempt, Kind, Letter, forge_letter, write_letter
from tracker.simulator.destination import target
from tracker.simulator.runs import SimulatedRun
from tracker.simulator.world import World

WAITS: Final = (0.0, 10.0, 60.0, 300.0)
"""Seconds before each attempt, counted from the one before."""

LATE: Final = 3.0
"""How much later than the end a late callback comes, as a multiple of `run_seconds`."""

_CONNECTIONS: Final = 100


class Courier:
    """Sends the callbacks of a world's runs, each in its own task of the `background`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.background = Background()
        self._slots = asyncio.Semaphore(_CONNECTIONS)
        self._client: httpx.AsyncClient | None = None

    def schedule(self, run: SimulatedRun) -> asyncio.Event:
        """Sends the run's callback when it is due. The event is set after the first attempt.

        Where no callback is to be sent, the event is set from the beginning. Of an end that is not
        documented no callback tells.
        """
        attempted = asyncio.Event()
        if run.callback_url is None or run.faults == {"drop"} or run.end_name is not None:
            attempted.set()
            return attempted
        self.background.run(self._carry(run, run.callback_url, attempted))
        return attempted

    async def idle(self) -> None:
        """Waits until every callback that is scheduled has been taken or given up, and all work
        behind the gateway is done."""
        await self.background.idle()

    async def close(self) -> None:
        """Drops what has not been sent."""
        await self.background.close()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _carry(self, run: SimulatedRun, url: str, attempted: asyncio.Event) -> None:
        """All that is sent for one run, in its order."""
        options = self._world.options
        pace = options.run_seconds / options.speed
        try:
            await asyncio.sleep(self._seconds_until_due(run, pace))
            if "bad_signature" in run.faults:
                await self._post(url, forge_letter(run, self._world.now_ms()), "forged", 1)
            if "drop" in run.faults:
                return
            letter = write_letter(run, self._world.now_ms())
            for number, wait in enumerate(WAITS, 1):
                await asyncio.sleep(wait / options.speed)
                attempt = await self._post(url, letter, "callback", number)
                attempted.set()
                if attempt.taken:
                    break
            else:
                return
            if "duplicate" in run.faults:
                await asyncio.sleep(run.fate.held * pace)
                await self._post(url, letter, "duplicate", attempt.number + 1)
        finally:
            # Whoever waits for the first attempt must not wait for one that never comes.
            attempted.set()

    def _seconds_until_due(self, run: SimulatedRun, pace: float) -> float:
        wait = max(0.0, (run.completed_ms - self._world.now_ms()) / 1000)
        if "late" in run.faults:
            wait += LATE * pace
        if "reorder" in run.faults:
            wait += run.fate.held * pace
        return wait

    async def _post(self, url: str, letter: Letter, kind: Kind, number: int) -> Attempt:
        status: int | None = None
        error: str | None = None
        async with self._slots:
            at_ms = self._world.now_ms()
            try:
                async with asyncio.timeout(self._world.options.callback_timeout):
                    status = await self._send(url, letter)
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as exc:
                error = type(exc).__name__
        attempt = Attempt(
            run_id=letter.run_id,
            delivery_id=letter.delivery_id,
            kind=kind,
            number=number,
            at_ms=at_ms,
            status=status,
            error=error,
        )
        self._world.deliveries.append(attempt)
        return attempt

    async def _send(self, url: str, letter: Letter) -> int:
        """The receiver's answer. Raises `httpx.ConnectError` where no callback may go there."""
        found = await target(url)
        if found is None:
            raise httpx.ConnectError("the host is not known, or not public any more")
        headers = dict(letter.headers)
        if found[1]:  # by its address: hosts that share one do not share a connection
            headers |= {"Host": httpx.URL(url).netloc.decode("ascii"), "Connection": "close"}
        response = await self._http().post(
            found[0], content=letter.body, headers=headers, extensions=found[1]
        )
        return response.status_code

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                # Certificates as configured in the environment, but never its proxies: callbacks
                # mostly go to this very machine.
                verify=httpx.create_ssl_context(trust_env=True),
                trust_env=False,
                follow_redirects=False,
                timeout=httpx.Timeout(None),  # the whole attempt is timed, not its steps
                limits=httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=20),
            )
        return self._client
