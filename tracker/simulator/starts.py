"""How a start is checked and answered: bad input, idempotency keys, slow and lost answers."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from tracker.simulator.callbacks import CallbackSender, refusal
from tracker.simulator.catalogue import GENERATIONS, SimulatedPort, SimulatedTechnique
from tracker.simulator.faults import ErrorAnswer
from tracker.simulator.options import Options, SimulatedWorkspace
from tracker.simulator.runs import RunRequest, SimulatedRun
from tracker.simulator.world import World

_INPUT_TYPES: Final = ("text", "imageUrl", "videoUrl")
_MODES: Final = ("async", "stream")
_REPLAY_MS: Final = 24 * 3600 * 1000
_CONFLICT_MS: Final = 2 * 3600 * 1000
_SECOND_ANSWERS: Final = {
    "400": ("input_validation_error", "The input is not valid."),
    "402": ("insufficient_credits", "The workspace has no credits left."),
    "404": ("not_found", "There is no such technique."),
}

WrongFields = list[tuple[str, str]]
UsedKey = tuple[str, str]
"""A workspace's identifier and the idempotency key."""


@dataclass(frozen=True, slots=True)
class ValidStart:
    """A start that has passed every check. It starts a run for each of `requests`, at least one."""

    requests: list[RunRequest]
    body: dict[str, Any]

    @property
    def technique(self) -> SimulatedTechnique | None:
        """The technique; None for a generation."""
        return self.requests[0].technique

    @property
    def fingerprint(self) -> str:
        """The same for two starts with the same path and body, however the body was written."""
        technique = self.technique
        path = "generate" if technique is None else f"techniques/{technique.technique_id}/runs"
        canonical = json.dumps([path, self.body], sort_keys=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def key(self, header: str | None, options: Options) -> str | None:
        """The idempotency key: of the body, or of the header."""
        body: str | None = self.body.get("idempotency_key")
        if options.key_source == "by_type":
            return header if self.technique is None else body
        # FLORA's two descriptions of idempotency have different forms of the key.
        return body or header if options.idempotency == "replay" else header or body


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. Raises `ErrorAnswer` where there is none."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ErrorAnswer(400, "invalid_json", "The body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise ErrorAnswer.invalid(("body", "must be an object"))
    return body


async def check_technique_start(
    body: dict[str, Any], technique: SimulatedTechnique, *, run_per_value: bool
) -> ValidStart:
    """The start of a technique. Raises `ErrorAnswer` with every field that is wrong."""
    wrong = _wrong_inputs(body.get("inputs"), technique)
    if body.get("mode") not in _MODES:
        wrong.append(("mode", f"must be one of {', '.join(_MODES)}"))
    wrong += await _wrong_callback_or_key(body)
    if wrong:
        raise ErrorAnswer.invalid(*wrong)
    inputs: dict[object, list[dict[str, Any]]] = {}
    several = {port.id for port in technique.inputs if port.several and run_per_value}
    for position, item in enumerate(body["inputs"]):
        inputs.setdefault(item["id"] if item["id"] in several else position, []).append(item)
    runs = [RunRequest(technique=technique, inputs=chosen) for chosen in product(*inputs.values())]
    return ValidStart(runs, body)


async def check_generation_start(body: dict[str, Any], workspace_id: str) -> ValidStart:
    """The start of a generation. Raises `ErrorAnswer` with every field that is wrong."""
    wrong: WrongFields = []
    prompt = body.get("prompt")
    if not (isinstance(prompt, str) and prompt.strip()):
        wrong.append(("prompt", "is required"))
    kind = body.get("type", "image")
    if kind not in list(GENERATIONS):
        wrong.append(("type", f"must be one of {', '.join(GENERATIONS)}"))
    model = body.get("model", f"{kind}-standard")
    if not isinstance(model, str):
        wrong.append(("model", "must be a string"))
    if body.get("workspace_id", workspace_id) != workspace_id:
        wrong.append(("workspace_id", "is not the workspace of this key"))
    wrong += await _wrong_callback_or_key(body)
    if wrong:
        raise ErrorAnswer.invalid(*wrong)
    return ValidStart([RunRequest(generation=kind, model=model)], body)


async def _wrong_callback_or_key(body: dict[str, Any]) -> WrongFields:
    wrong: WrongFields = []
    callback_url, key = body.get("callback_url"), body.get("idempotency_key")
    if callback_url is not None:
        is_text = isinstance(callback_url, str)
        reason = await refusal(callback_url) if is_text else "must be a string"
        if reason is not None:
            wrong.append(("callback_url", reason))
    if key is not None and not (isinstance(key, str) and key):
        wrong.append(("idempotency_key", "must be a string that is not empty"))
    return wrong


def _wrong_inputs(inputs: object, technique: SimulatedTechnique) -> WrongFields:
    if not isinstance(inputs, list) or not inputs:
        return [("inputs", "must be a list of at least one input")]
    ports = {port.id: port for port in technique.inputs}
    wrong: WrongFields = []
    present: set[str] = set()
    for position, item in enumerate(inputs):
        at = f"inputs[{position}]"
        if not isinstance(item, dict) or not isinstance(item.get("id"), str):
            wrong.append((at, "must be an object with id, type and value"))
            continue
        port = ports.get(item["id"])
        if port is None:
            wrong.append((f"{at}.id", f"the technique has no input {item['id']!r}"))
            continue
        if port.id in present and not port.several:
            wrong.append((f"{at}.id", f"the input {port.id!r} takes one value only"))
        present.add(port.id)
        wrong += _wrong_value(at, item, port)
    missing = [port.id for port in technique.inputs if not port.optional and port.id not in present]
    return wrong + [(f"inputs.{name}", "is required") for name in missing]


def _wrong_value(at: str, item: dict[str, Any], port: SimulatedPort) -> WrongFields:
    kind, value = item.get("type"), item.get("value")
    if kind not in _INPUT_TYPES:
        return [(f"{at}.type", f"must be one of {', '.join(_INPUT_TYPES)}")]
    if kind != port.accepts:
        return [(f"{at}.type", f"the input {port.id!r} takes {port.accepts}")]
    if not isinstance(value, str) or not value:
        return [(f"{at}.value", "must be a string that is not empty")]
    if port.type != "text" and not _is_link(value):
        return [(f"{at}.value", "must be an http or https link")]
    return []


def _is_link(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class SimulatedStartAnswer:
    """The answer to a start: its status and the bytes of its body."""

    status: int
    body: bytes

    def response(self, *, replayed: bool = False) -> Response:
        headers = {"idempotent-replayed": "true"} if replayed else None
        return Response(self.body, self.status, headers, media_type="application/json")


class StartHandler:
    """Answers the starts of one world."""

    def __init__(self, world: World, sender: CallbackSender) -> None:
        self._world = world
        self._sender = sender
        self._used: dict[UsedKey, tuple[int, str, SimulatedStartAnswer]] = {}
        """When each key was used, for which fingerprint, and the answer."""
        self._busy: set[UsedKey | None] = set()
        """The keys of requests in progress."""
        self._failed: set[UsedKey] = set()
        """The keys whose last start was answered 500."""

    async def answer(
        self, start: ValidStart, request: Request, workspace: SimulatedWorkspace
    ) -> Response:
        """The answer to a start. Raises `ErrorAnswer` where it is an error."""
        world, options = self._world, self._world.options
        random = Random(f"{options.seed}/start/{request.state.number}")
        rates = (options.slow_starts, options.failed_starts, options.lost_starts, options.colleague)
        slow, fails, lost, colleague = (random.random() < rate for rate in rates)
        sent_key = start.key(request.headers.get("idempotency-key"), options)
        key = None if sent_key is None else (workspace.workspace_id, sent_key)
        if key is not None:
            self._refuse_second(key)
            known = self._recall(key, start.fingerprint, options, world.now_ms())
            if known is not None:
                return known.response(replayed=True)
        if fails:
            raise self._server_error(key)
        at_once = options.keys_known == "at_once"
        wait = options.slow_seconds / options.speed if slow else 0.0
        if at_once and key is not None:
            self._busy.add(key)
        try:
            if wait and options.slow_run == "last":
                await world.sleep(wait)
            runs = [
                world.start(one, callback_url=start.body.get("callback_url"), workspace=workspace)
                for one in start.requests
            ]
        finally:
            self._busy.discard(key)
        answer = _first_answer(runs[0], world.options)
        if key is not None:
            world.started_with |= {run.run_id: key[1] for run in runs}
            if at_once:
                self._used[key] = (world.now_ms(), start.fingerprint, answer)
        attempted = [self._sender.schedule(run) for run in runs]
        if colleague and start.technique is not None:
            await self._start_colleague(start.technique, workspace)
        if wait and options.slow_run == "first":
            await world.sleep(wait)
        for run, was_attempted in zip(runs, attempted, strict=True):
            if "early" in run.faults:
                await was_attempted.wait()
        if lost:
            if key is not None and options.keys_released:
                self._used.pop(key, None)
            raise self._server_error(key)
        if key is not None and not at_once:
            self._used[key] = (world.now_ms(), start.fingerprint, answer)
        return answer.response()

    def _recall(
        self, key: UsedKey, fingerprint: str, options: Options, now_ms: int
    ) -> SimulatedStartAnswer | None:
        """The answer to repeat, or None where the key is new or forgotten.

        In the mode "replay" a key repeats its answer for 24 hours, and is refused with 422 for
        another request; in "conflict" a second use is refused with 409 for two hours. While the
        first request with the key has not finished, it is refused with 409 in both.
        """
        if key in self._busy:
            raise ErrorAnswer(
                409, "conflict", "A request with this idempotency key is in progress."
            )
        used = self._used.get(key)
        if used is None:
            return None
        used_ms, original, answer = used
        lifetime_ms = _REPLAY_MS if options.idempotency == "replay" else _CONFLICT_MS
        if options.key_hours is not None:
            lifetime_ms = int(options.key_hours * 3600 * 1000)
        if now_ms - used_ms >= lifetime_ms:
            return None
        if options.idempotency == "conflict":
            raise ErrorAnswer(
                409, "idempotency_duplicate", "This idempotency key has been used already."
            )
        if fingerprint != original:
            raise ErrorAnswer(
                422, "idempotency_conflict", "This idempotency key was used with another body."
            )
        return answer

    def _refuse_second(self, key: UsedKey) -> None:
        """Refuses the next start after one that was answered 500, where that is wanted."""
        wanted = self._world.options.second_answer
        if key in self._failed and wanted != "none":
            self._failed.discard(key)
            raise ErrorAnswer(int(wanted), *_SECOND_ANSWERS[wanted])

    def _server_error(self, key: UsedKey | None) -> ErrorAnswer:
        if key is not None:
            self._failed.add(key)
        return ErrorAnswer(500, "internal_error", "Something went wrong on our side.")

    async def _start_colleague(
        self, technique: SimulatedTechnique, workspace: SimulatedWorkspace
    ) -> None:
        wait = self._world.options.colleague_seconds / self._world.options.speed

        async def start() -> None:
            await self._world.sleep(wait)
            with suppress(ErrorAnswer):  # there is no caller to report used-up credits to
                request = self._world.sample_request(technique.technique_id)
                self._world.start(request, workspace=workspace, colleague=True)

        if wait:
            self._sender.run_in_background(start())
        else:
            await start()


def _first_answer(run: SimulatedRun, options: Options) -> SimulatedStartAnswer:
    """FLORA's answer to the request that started a run."""
    shown = run.answer_to_start(options.time_unit)
    if run.technique is None:  # the answer to `POST /generate` is not in the shape of a run
        shown = {
            "run_id": run.run_id,
            "type": "generation",
            "charged_cost": run.cost if run.bill.quote is None else run.bill.quote,
            "estimated_seconds": options.run_seconds / options.speed,
            "model": {"model_id": run.request.model},
            "poll_url": run.poll_url,
            "project_id": run.workspace.project_id,
        }
    body = json.dumps(shown, separators=(",", ":"), ensure_ascii=False).encode()
    return SimulatedStartAnswer(201 if run.draws.created else 200, body)
