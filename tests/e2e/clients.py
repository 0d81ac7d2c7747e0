"""What goes on outside a tracker that dies again and again: its clients, and FLORA's other users.

What a client was told is a promise, and is noted.
"""

import asyncio
import json
import random
from collections.abc import Coroutine
from itertools import count
from typing import Any

import httpx

from tracker.core.clock import utc_now
from tracker.flora.callback import sign
from tracker.simulator import Simulator

OURS = "ours: "
"""How the prompts of the runs begin that the tracker was asked to start."""
AT_MOST = 20
"""So many clients wait for an answer at a time."""


class Clients:
    """Those of the tracker at `root`. Each repeats what it asks until it is answered."""

    def __init__(self, root: str, flora: Simulator) -> None:
        self.started: dict[str, str] = {}
        """The runs that clients were told of, by idempotency key."""
        self.ordered: set[str] = set()
        """The prompts of the rows of batches that were taken."""
        self.taken: set[str] = set()
        """The deliveries of their own that were answered 2xx."""
        self._root = root
        self._flora = flora
        self._errors = flora.world.options.errors
        self._http = httpx.AsyncClient(base_url=root, timeout=40, trust_env=False)
        self._waiting: set[asyncio.Task[None]] = set()
        self._asked = 0
        self._elsewhere = count(1)

    def start(self, *, patient: bool = True) -> None:
        """A client starts a run; one that is not patient goes away where it is not answered."""
        self._begin(self._start(self._next_key(), patient))

    def order(self) -> None:
        """A client orders a batch."""
        self._begin(self._order(self._next_key()))

    def start_wrongly(self) -> None:
        """A client starts a run with inputs that FLORA refuses."""
        self._begin(self._start_wrongly(self._next_key()))

    def send(self) -> None:
        """A signed callback comes that nobody understands."""
        self._begin(self._send(self._next_key()))

    def start_elsewhere(self, *, with_callback: bool) -> None:
        """Someone else starts a run, which the tracker has to find: each third time a generation.

        None is of a technique that the clients start, else the tracker might have to take one for
        the run of a start that nobody knows the answer to.
        """
        url = f"{self._root}/callbacks/flora" if with_callback else None
        if next(self._elsewhere) % 3:
            self._flora.start("cctv-cam", callback_url=url)
        else:
            self._flora.start_generation(callback_url=url)

    def flora_fails(self) -> None:
        """FLORA answers nothing but errors, for a second or two, again and again for a while."""
        self._begin(self._flora_fails())

    async def stream(self, chance: random.Random) -> None:
        """All of it, thirty times a second, for ever."""
        while True:
            await asyncio.sleep(chance.expovariate(30))
            if chance.random() < 0.6:
                self.start_elsewhere(with_callback=chance.random() < 0.8)
            elif len(self._waiting) < AT_MOST:
                chance.choices([self.send, self.start, self.order], [3, 6, 1])[0]()

    def all_answered(self) -> bool:
        """Whether nobody waits. Raises what a client met that is no answer."""
        for client in [client for client in self._waiting if client.done()]:
            self._waiting.remove(client)
            client.result()
        return not self._waiting

    async def close(self) -> None:
        """Everybody goes away."""
        for client in self._waiting:
            client.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        await self._http.aclose()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._waiting.add(asyncio.create_task(work))

    def _next_key(self) -> str:
        self._asked += 1
        return f"{OURS}{self._asked}"

    async def _start(self, key: str, patient: bool) -> None:
        body = {"technique": "icon-pack", "inputs": [_prompt(key)], "idempotency_key": key}
        answer = await self._ask("/api/runs", patient, json=body)
        if answer is not None and answer.is_success:
            self.started[key] = answer.json()["run_id"]
        elif answer is not None:
            code = answer.json()["error"]["code"]
            assert code in ("start_pending", "start_unresolved"), answer.text

    async def _order(self, key: str) -> None:
        prompts = [f"{key}, row {number}" for number in range(3)]
        rows = [{"prompt": prompt} for prompt in prompts]
        answer = await self._ask(
            "/api/batches", True, json={"technique": "icon-pack", "rows": rows}
        )
        assert answer is not None
        assert answer.is_success, answer.text
        self.ordered.update(prompts)

    async def _start_wrongly(self, key: str) -> None:
        inputs = [_prompt("no image")]
        body = {"technique": "character-lock", "inputs": inputs, "idempotency_key": key}
        answer = await self._ask("/api/runs", True, json=body)
        assert answer is not None
        # Where a process died over it, nothing shows what came of its first request.
        assert answer.status_code in (400, 409, 504), answer.text

    async def _send(self, key: str) -> None:
        body = json.dumps({"id": key, "type": "?"}).encode()
        headers = {"flora-signature": sign(body, "whsec_simulator", at=utc_now())}
        answer = await self._ask("/callbacks/flora", True, content=body, headers=headers)
        assert answer is not None
        assert answer.is_success, answer.text
        self.taken.add(key)

    async def _flora_fails(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0.7)  # long enough that runs are started, and are not seen to end
            self._flora.world.change({"errors": 1.0})
            await asyncio.sleep(1.5)
            self._flora.world.change({"errors": self._errors})  # several may let it fail at a time

    async def _ask(self, path: str, patient: bool, **request: Any) -> httpx.Response | None:
        """The first answer that is not "later"; `None` for who is not patient and got none."""
        while True:
            try:
                answer = await self._http.post(path, **request)
                if answer.status_code == 504 and "start_pending" in answer.text:
                    return answer  # its run may call back to nobody
                # 404: a gateway's to the read of the technique, which is there.
                if answer.status_code not in (404, 502, 503, 504):
                    return answer
            except httpx.TransportError:
                pass  # the tracker is dead
            if not patient:
                return None
            await asyncio.sleep(0.02)


def _prompt(text: str) -> dict[str, str]:
    return {"id": "prompt", "type": "text", "value": text}
