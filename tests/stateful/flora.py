"""A model of FLORA: the test decides when its runs end, and which of its requests fail.

It replaces the HTTP transport, so that the whole client of the tracker is the real one. Pages are
small, cursors are offsets, and the attributes of `ModelFlora` select between the descriptions that
FLORA's sources give.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import format_datetime
from typing import Any, Final

import httpx

from tests.stateful.clocks import Clocks

BASE: Final = "https://flora.test/api/v1"
WORKSPACE: Final = "ws_model"
TECHNIQUES: Final = {"tech_icons": "icon-pack", "tech_cards": "tarot-pull"}
"""Ids and slugs."""
PAGE: Final = 3
KEYS_KEPT: Final = {"replay": 24 * 3600, "conflict": 2 * 3600}
"""Seconds for which an idempotency key is remembered, by each of the two descriptions."""
WORKS_ON: Final = 100
"""Seconds for which FLORA may still work on a start after a gateway has answered."""

BILLED_AFTER: Final = 50
"""Seconds after a run's end, where bills are late."""
QUOTE: Final = 0.5

BEFORE: Final = ("429", "429 for long", "401", "500", "503", "no connection", "cut before")
"""Faults of a request that has no effect."""
PAGES: Final = ("502 page", "503 page", "504 page", "404 page")
AFTER: Final = ("cut after", "time-out", "garbage", "500 after", "empty", *PAGES)
"""Faults of the answer to a request that was executed."""
LATER: Final = ("time-out, works on", "502 page, works on", "504 page, works on")
"""The answer precedes the end of a start: only then its run exists, and its key is known."""
FAULTS: Final = (*BEFORE, *AFTER, *LATER)

Meanwhile = Callable[[], Awaitable[None]]


@dataclass(slots=True, kw_only=True, eq=False)
class ModelRun:
    """One run and its true state. `key` is the idempotency key that started it, with these inputs;
    both are `None` for a run of another program. Times are milliseconds."""

    run_id: str
    technique_id: str | None
    created_at: int
    key: str | None = None
    inputs: list[dict[str, str]] | None = None
    status: str = "pending"
    started_at: int | None = None
    completed_at: int | None = None
    price: float = 0.25
    queued: bool = False

    @property
    def shown(self) -> str:
        """The status that reads show: before its end perhaps an undocumented one."""
        return "queued" if self.queued and not self.ended else self.status

    @property
    def run_type(self) -> str:
        return "generation" if self.technique_id is None else "technique"

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")

    @property
    def cost(self) -> float:
        return self.price if self.status == "completed" else 0.0

    @property
    def error(self) -> dict[str, str]:
        if self.status != "failed":
            return {}
        return {"error_code": "provider_error", "error_message": f"<b>{self.run_id}</b> broke"}

    @property
    def outputs(self) -> list[dict[str, str]]:
        if self.status != "completed":
            return []
        picture = {"type": "imageUrl", "url": f"https://media.test/{self.run_id}.png"}
        words = {"type": "text", "url": f"the words of {self.run_id}"}
        return [{"output_id": f"out_{n}", **one} for n, one in enumerate((picture, words))]


@dataclass(slots=True, eq=False)
class _ArmedFault:
    what: str | Meanwhile
    after: int
    times: int


class ModelFlora:
    """All of FLORA. `armed` holds the faults of the next requests.

    `forgets` keys after two hours in both modes of idempotency, `releases` the key of a start that
    was answered 500; `queues` shows our runs with an undocumented status.
    """

    def __init__(self, clocks: Clocks) -> None:
        self.key = "sk_test_1"
        self.price = 0.25
        self.forgets = False
        self.releases = False
        self.queues = False
        self.runs: dict[str, ModelRun] = {}
        self.requests = 0
        self.struck = 0
        self.armed: list[_ArmedFault] = []
        self.idempotency = "replay"
        self.lean = False
        self.seconds = False
        self.late_bills = False
        self._clocks = clocks
        self._keys: dict[str, tuple[float, str, bytes]] = {}
        self._at_work: list[tuple[float, str, dict[str, Any]]] = []
        self._exchanges = 1

    def begin(self, technique_id: str | None, **started: Any) -> ModelRun:
        """A run begins; one without a technique is a generation."""
        self.work()
        return self._begin(technique_id, self._now(), **started)

    def _begin(self, technique_id: str | None, created_at: int, **started: Any) -> ModelRun:
        run_id = f"run_{len(self.runs)}"
        run = ModelRun(
            run_id=run_id,
            technique_id=technique_id,
            created_at=created_at,
            price=self.price,
            queued=self.queues and "key" in started,
            **started,
        )
        self.runs[run_id] = run
        return run

    def work(self) -> None:
        """Finishes the starts that FLORA still works on, where they are due."""
        while self._at_work and self._at_work[0][0] <= self._clocks.elapsed:
            at, technique_id, body = self._at_work.pop(0)
            behind = round((self._clocks.elapsed - at) * 1000)
            self._do_start(technique_id, body, at, self._now() - behind)

    def exchange_key(self) -> None:
        """Replaces the workspace's key: the old one is refused from now on."""
        self._exchanges += 1
        self.key = f"sk_test_{self._exchanges}"

    def go_on(self, run: ModelRun, status: str) -> None:
        """Sets a run to "running", "completed" or "failed"; an end is final."""
        if run.ended:
            return
        if run.started_at is None:
            run.started_at = self._now()
        run.status = status
        if run.ended:
            run.completed_at = self._now()

    async def handle(self, request: httpx.Request) -> httpx.Response:
        """Answers a request, or fails it."""
        assert str(request.url).startswith(BASE), "the key goes to FLORA alone"
        issued = [f"Bearer sk_test_{number + 1}" for number in range(self._exchanges)]
        assert request.headers["authorization"] in issued
        self.requests += 1
        self._clocks.elapsed += 0.1
        self.work()
        fault = self._next_fault()
        if fault in BEFORE:
            return self._fail(request, fault)
        if fault not in PAGES and request.headers["authorization"] != f"Bearer {self.key}":
            return self._refuse(401, "invalid_api_key")
        if fault in LATER:
            self._start_later(request)
            return self._fail(request, str(fault).partition(",")[0])
        answer = self._answer(request)
        if callable(fault):
            await fault()
        elif fault is not None:
            return self._fail(request, fault)
        return answer

    def arm(self, what: str | Meanwhile, *, after: int, times: int = 1) -> None:
        """Makes later requests fail, or calls a function during one; the next `after` pass."""
        self.armed.append(_ArmedFault(what, after, times))

    def _next_fault(self) -> str | Meanwhile | None:
        """The fault of this request."""
        found = next((fault for fault in self.armed if fault.after <= 0), None)
        for fault in self.armed:
            fault.after -= 1
        if found is None:
            return None
        found.times -= 1
        if found.times == 0:
            self.armed.remove(found)
        self.struck += 1
        return found.what

    def _fail(self, request: httpx.Request, fault: object) -> httpx.Response:
        match fault:
            case "no connection":
                raise httpx.ConnectError("refused", request=request)
            case "cut before" | "cut after":
                raise httpx.ReadError("cut", request=request)
            case "time-out":
                self._clocks.elapsed += 20
                raise httpx.ReadTimeout("", request=request)
            case "429 for long":
                return self._refuse(429, "rate_limited", {"retry-after": "50"})
            case "garbage":
                return self._respond(200, b'{"run_id": "ru')
            case "502 page" | "503 page" | "504 page" | "404 page":
                return self._respond(int(str(fault)[:3]), b"<html>A gateway answers</html>")
            case "empty":
                return self._respond(200, b"")
            case "500 after":
                if self.releases and request.method == "POST":
                    self._keys.pop(json.loads(request.content)["idempotency_key"], None)
                return self._refuse(500, "internal_error")
            case _:
                return self._refuse(int(str(fault)), "some_code")

    def _answer(self, request: httpx.Request) -> httpx.Response:
        query = request.url.params
        match [request.method, *request.url.path.removeprefix("/api/v1/").split("/")]:
            case ["GET", "techniques", named] if (technique_id := _technique(named)) is not None:
                return self._show(_definition(technique_id, self.price))
            case ["POST", "techniques", named, "runs"] if (found := _technique(named)) is not None:
                return self._start(found, request)
            case ["GET", "techniques", named, "runs", run_id]:
                run = self.runs.get(run_id)
                if run is not None and run.technique_id == _technique(named):
                    return self._show(self._shown_run(run))
            case ["GET", "runs", run_id] if run_id in self.runs:
                return self._show(self._shown_run(self.runs[run_id]))
            case ["GET", "workspaces"]:
                found_here = [{"workspace_id": WORKSPACE, "name": "The model"}]
                return self._show({"workspaces": found_here, "meta": {"next_cursor": None}})
            case ["GET", "technique-runs"]:
                return self._list("technique", "technique_runs", query)
            case ["GET", "generations"]:
                return self._list("generation", "generations", query)
        return self._refuse(404, "not_found")

    def _start(self, technique_id: str, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        key = body["idempotency_key"]
        assert request.headers["idempotency-key"] == key
        request_body = json.dumps([technique_id, body], sort_keys=True)
        used_at, original, answer = self._keys.get(key, (float("-inf"), "", b""))
        kept = KEYS_KEPT["conflict" if self.forgets else self.idempotency]
        if self._clocks.elapsed - used_at < kept:
            if self.idempotency == "conflict":
                return self._refuse(409, "idempotency_duplicate")
            if request_body != original:
                return self._refuse(422, "idempotency_conflict")
            return self._respond(200, answer, {"idempotent-replayed": "true"})
        return self._respond(
            201, self._do_start(technique_id, body, self._clocks.elapsed, self._now())
        )

    def _do_start(self, technique_id: str, body: dict[str, Any], at: float, now: int) -> bytes:
        """Starts a run, also where its key was used meanwhile; returns the answer."""
        key = body["idempotency_key"]
        run = self._begin(technique_id, now, key=key, inputs=body["inputs"])
        answer = json.dumps(self._shown_run(run)).encode()
        self._keys[key] = (at, json.dumps([technique_id, body], sort_keys=True), answer)
        return answer

    def _start_later(self, request: httpx.Request) -> None:
        """Executes a start later, after a gateway has answered."""
        match [request.method, *request.url.path.removeprefix("/api/v1/").split("/")]:
            case ["POST", "techniques", named, "runs"] if (found := _technique(named)) is not None:
                ends_at = self._clocks.elapsed + WORKS_ON
                self._at_work.append((ends_at, found, json.loads(request.content)))

    def _list(self, run_type: str, name: str, query: httpx.QueryParams) -> httpx.Response:
        technique_id = query.get("technique_id")
        found = [
            run
            for run in reversed(self.runs.values())
            if run.run_type == run_type and technique_id in (None, run.technique_id)
        ]
        if not (cursor := query.get("cursor", "0")).isdecimal():
            return self._refuse(400, "input_validation_error")  # an offset as FLORA encodes it
        begin = int(cursor)
        end = begin + min(int(query["limit"]), PAGE)
        items = [self._item(run) for run in found[begin:end]]
        meta = {"next_cursor": str(end) if end < len(found) else None}
        return self._show({name: items, "meta": meta})

    def _shown_run(self, run: ModelRun) -> dict[str, Any]:
        """The run as a read shows it now; unknown values are zero, as in FLORA's reference."""
        path = f"techniques/{run.technique_id}/runs" if run.technique_id else "runs"
        times = {
            name: (at / 1000 if self.seconds else at) if at else 0
            for name, at in (
                ("created_at", run.created_at),
                ("started_at", run.started_at),
                ("completed_at", run.completed_at),
            )
        }
        return {
            "run_id": run.run_id,
            "status": run.shown,
            "progress": {"pending": 0, "running": 40}.get(run.status, 100),
            "poll_url": f"{BASE}/{path}/{run.run_id}",
            "outputs": run.outputs,
            **self._cost(run),
            **times,
            **run.error,
        }

    def _cost(self, run: ModelRun) -> dict[str, float]:
        """The cost that reads show now: the bill or, where bills are late, a quote or nothing."""
        billed = run.ended and self._now() - (run.completed_at or 0) >= BILLED_AFTER * 1000
        if billed or not self.late_bills:
            return {"charged_cost": run.cost}
        return {} if run.status == "completed" else {"charged_cost": QUOTE}

    def _item(self, run: ModelRun) -> dict[str, Any]:
        """The run as the history lists it."""
        item = self._shown_run(run) | {"workspace_id": WORKSPACE, "project_id": "prj_model"}
        if run.technique_id is None:
            item["generation_id"] = item.pop("run_id")
        else:
            item["technique_run_id"] = run.run_id
            item["technique"] = {"technique_id": run.technique_id, "name": "A technique"}
        if self.lean and run.status == "completed":
            del item["outputs"]
            item.pop("charged_cost", None)
        return item

    def _show(self, value: Any) -> httpx.Response:
        return self._respond(200, json.dumps(value).encode())

    def _refuse(
        self, status: int, code: str, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        body = {"error": {"code": code, "message": "An error of the model."}}
        return self._respond(status, json.dumps(body).encode(), headers)

    def _respond(
        self, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        date = format_datetime(self._clocks.flora(), usegmt=True)
        always = {"date": date, "request-id": f"req_{self.requests}"}
        return httpx.Response(status, content=body, headers=always | (headers or {}))

    def _now(self) -> int:
        return round(self._clocks.flora().timestamp() * 1000)


def _technique(named: str) -> str | None:
    """The id of a technique, by its id or slug."""
    return next((one for one, slug in TECHNIQUES.items() if named in (one, slug)), None)


def inputs_for(prompt: str) -> list[dict[str, str]]:
    """The inputs of a start."""
    return [{"id": "prompt", "type": "text", "value": prompt}]


def _definition(technique_id: str, price: float) -> dict[str, Any]:
    prompt = {"id": "prompt", "name": "Prompt", "type": "text"}
    return {
        "technique_id": technique_id,
        "name": "A technique",
        "run_cost": price,
        "inputs": [prompt],
        "outputs": [],
    }
