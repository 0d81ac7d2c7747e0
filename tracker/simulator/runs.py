"""A run: how it is made of a request, the seed and the options, and what FLORA shows of it when.

The end of a run is decided at its start; its status is computed for each read. All times are Unix
milliseconds.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from tracker.simulator.catalogue import EXTENSIONS, GENERATIONS, SimulatedPort, SimulatedTechnique
from tracker.simulator.options import Options, SimulatedWorkspace

RunType = Literal["technique", "generation"]

CALLBACK_FAULTS: Final = ("drop", "duplicate", "early", "late", "reorder", "bad_signature")
"""The faults of a callback. They are decided when the run starts."""

Failure = tuple[str, str | None]
"""An error code and its message."""

_UNREACHABLE: Final = ("input_unreachable", "One of the inputs could not be fetched.")
FAILURES: Final[tuple[Failure, ...]] = (
    ("model_timeout", "The model took too long to answer."),
    ("safety_blocked", "Blocked by the safety filter: “<b>prompt</b>” — see the guidelines."),
    _UNREACHABLE,
    ("internal_error", None),
    ("provider_error", "The provider failed to complete the generation."),
)
"""Why runs fail. One code comes without a message, one message has markup."""

_REJECTED: Final = (
    "Your request was rejected by the safety system. safety_violations=[sexual]. (req_0)"
)
_MEASURED_CODES: Final = """
    GENERATION_PROVIDER_TIMEOUT GENERATION_FAILED_TO_START GPU_PROVIDER_ERROR
    GENERATION_FAILED_TO_UPLOAD GENERATION_GENERIC_ERROR GENERATION_FAILED_TO_UPDATE SERVER_ERROR
    GENERATION_FAILED_TO_GET GENERATION_PREGENERATION_FAILED GENERATION_POSTGENERATION_FAILED
    GENERATION_MAP_AFTER_REQUEST_FAILED GENERATION_DOWNSTREAM_SERVICE_ERROR
    GENERATION_QUEUE_TOO_LARGE GENERATION_INVALID_PROVIDER_RESPONSE GENERATION_QUEUE_NOT_MOVING
    GENERATION_NO_RESULT GENERATION_CIRCUIT_BREAKER_OPEN GENERATION_MODAL_POLL_ERROR
    AUDIO_GENERATION_ERROR GENERATION_PROVIDER_FAILED_TO_GET_STATUS GENERATION_PROMPT_MODERATED
    LLM_REFUSAL GENERATION_INPUT_VALIDATION GENERATION_INVALID_PARAMS GENERATION_INVALID_URL
    GENERATION_ENDPOINT_NOT_FOUND GENERATION_MAP_BEFORE_REQUEST_FAILED
    GENERATION_PROVIDER_NOT_SUPPORTED BILLING_INSUFFICIENT_CREDITS GENERATION_NOT_PAID
    GENERATION_CANCELLED ACCESS_DENIED MODEL_ENTITLEMENT_REQUIRED
"""
MEASURED_FAILURES: Final[tuple[Failure, ...]] = (
    *((code, _REJECTED) for code in ("GPU_PROVIDER_ERROR", "GENERATION_NO_RESULT")),
    *(
        (code, f"The run failed: {code.lower().replace('_', ' ')}.")
        for code in _MEASURED_CODES.split()
    ),
)
"""The codes that FLORA measured in production; two messages contain a refusal by moderation."""

_DRAWN_LAST: Final = (
    *("failures", "drop", "duplicate", "early", "late", "reorder", "bad_signature", "cancelled"),
    *("queued", "quotes", "quote_size", "late_bills", "bill_wait", "missing_bills", "corrections"),
    *("corrected_down", "late_refunds", "late_outputs", "failure"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What is to run: a technique with its inputs, or a model for a type of generation."""

    technique: SimulatedTechnique | None = None
    inputs: tuple[Mapping[str, Any], ...] = ()
    generation: str = ""
    model: str | None = None

    @property
    def run_type(self) -> RunType:
        return "generation" if self.technique is None else "technique"

    @property
    def product(self) -> SimulatedTechnique:
        """What has its outputs and its price: the technique, or the type of generation."""
        return self.technique or GENERATIONS[self.generation]

    @property
    def unreachable(self) -> bool:
        """Whether an input links to a host under `.invalid`, which never answers."""
        return any(
            item["type"] != "text" and (urlsplit(item["value"]).hostname or "").endswith(".invalid")
            for item in self.inputs
        )


@dataclass(frozen=True, slots=True)
class SimulatedOutput:
    """One output of a run. For type "text", `url` is the text itself."""

    output_id: str
    type: str
    url: str

    def shown(self, read: int | None = None) -> dict[str, str]:
        """The output as FLORA shows it; with the number of the read, its link is signed for it."""
        url = self.url
        if read is not None and self.type != "text":
            url += f"?signature={digest(self.output_id, 'read', read)}"
        return {"output_id": self.output_id, "type": self.type, "url": url}


@dataclass(frozen=True, slots=True)
class RunBill:
    """A run's true cost in USD, and what reads of the run show in its place.

    `steps` are pairs of a moment and the cost shown from then on, oldest first; None stands for no
    cost. The last step shows `amount`, or never shows a cost.
    """

    amount: float
    quote: float | None
    steps: tuple[tuple[int, float | None], ...]

    @property
    def final_ms(self) -> int:
        """The moment from which the shown cost does not change any more."""
        return self.steps[-1][0]

    def shown(self, now_ms: int) -> float | None:
        """The cost that a read shows at a moment."""
        return next((cost for since, cost in reversed(self.steps) if since <= now_ms), None)


class RandomDraws:
    """The random numbers for the n-th run: a pure function of the seed and n.

    All are drawn at once and always in the same order, so that a changed rate does not
    change the others. New ones are drawn last: a seed keeps its runs.
    """

    def __init__(self, seed: int, ordinal: int) -> None:
        random = Random(f"{seed}/run/{ordinal}")
        self.delivery_id = f"whd_{digest(seed, 'delivery', ordinal)}"
        self.forged_delivery_id = f"whd_{digest(seed, 'forged', ordinal)}"
        self.failure = FAILURES[random.randrange(len(FAILURES))]
        self.spread = random.uniform(0.5, 1.5)
        """Duration as a multiple of `run_seconds`."""
        self.pending_share = random.uniform(0.05, 0.25)
        """The part of the duration that passes before the run is started."""
        self.failed_progress = random.randint(10, 95)
        """How far a failing run gets, in per cent."""
        self.shows_zeros = random.random() < 0.25
        """Whether the unfinished run shows zero times and cost, as FLORA's examples do."""
        self.answers_end = random.random() < 0.5
        """Whether an early ended run's start already answers with the end."""
        self.created = random.random() < 0.5
        """Whether the start answers 201 and not 200."""
        self.held = random.random()
        """How long a callback is held back, as a multiple of `run_seconds`."""
        self.numbers = {name: random.random() for name in _DRAWN_LAST}
        """Numbers from 0 to 1, most of them named as the option that they are compared with."""

    def hit(self, options: Options, fault: str) -> bool:
        rate: float = getattr(options, fault)
        return self.numbers[fault] < rate


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """One run, from its start to its end.

    `started_ms` is None for a run that fails before it is started.
    """

    run_id: str
    ordinal: int
    request: RunRequest
    draws: RandomDraws
    workspace: SimulatedWorkspace
    callback_url: str | None
    faults: frozenset[str]
    """The faults of its callback: names from `CALLBACK_FAULTS`."""
    created_ms: int
    started_ms: int | None
    completed_ms: int
    error_code: str | None
    """Why it fails; None for a run that completes."""
    error_message: str | None
    bill: RunBill
    outputs: tuple[SimulatedOutput, ...]
    outputs_ms: int
    """When its outputs appear; at its end or later."""
    poll_url: str
    unfinished_name: str | None
    """The status that it shows in place of `pending` and `running`."""
    end_name: str | None
    """The status that it ends with in place of the documented ones."""
    full_progress: bool
    """Whether it reports progress 100 also where it fails."""
    colleague: bool
    """Whether another program started it."""

    @property
    def technique(self) -> SimulatedTechnique | None:
        """Its technique; None for a generation."""
        return self.request.technique

    @property
    def inputs(self) -> tuple[Mapping[str, Any], ...]:
        return self.request.inputs

    @property
    def cost(self) -> float:
        """The final cost in USD, whether reads show it or not."""
        return self.bill.amount

    @property
    def succeeds(self) -> bool:
        return self.error_code is None and self.end_name is None

    @property
    def end(self) -> str:
        """The status that the run ends with."""
        return self.end_name or ("completed" if self.succeeds else "failed")

    @property
    def error(self) -> dict[str, str]:
        """Why the run fails, as FLORA shows it; empty for a run that completes."""
        error = {"error_code": self.error_code, "error_message": self.error_message}
        return {name: text for name, text in error.items() if text is not None}

    def status(self, now_ms: int) -> str:
        if now_ms >= self.completed_ms:
            return self.end
        waiting = self.started_ms is None or now_ms < self.started_ms
        return self.unfinished_name or ("pending" if waiting else "running")

    def progress(self, now_ms: int) -> int:
        """Per cent done at a moment; a failed run stays where it stopped."""
        last = 100 if self.succeeds else self.draws.failed_progress
        if now_ms >= self.completed_ms:
            if self.full_progress:
                return 100
            return last if self.started_ms is not None else 0
        if self.started_ms is None or now_ms < self.started_ms:
            return 0
        share = (now_ms - self.started_ms) / (self.completed_ms - self.started_ms)
        return max(1, min(last - 1, int(last * share)))

    def as_read(self, now_ms: int, unit: str = "ms", read: int | None = None) -> dict[str, Any]:
        """The run as the API answers it at a moment; `read` signs its links for that read."""

        def time(moment_ms: int) -> float:
            return moment_ms / 1000 if unit == "s" else moment_ms

        shown: dict[str, Any] = {
            "run_id": self.run_id,
            "status": self.status(now_ms),
            "progress": self.progress(now_ms),
            "created_at": time(self.created_ms),
            "poll_url": self.poll_url,
        }
        if self.started_ms is not None and now_ms >= self.started_ms:
            shown["started_at"] = time(self.started_ms)
        if now_ms >= self.completed_ms:
            shown["completed_at"] = time(self.completed_ms)
            shown |= self.error
            # Before its outputs appear, a run shows an empty list of them or none.
            if self.succeeds and (now_ms >= self.outputs_ms or self.draws.shows_zeros):
                outputs = self.outputs if now_ms >= self.outputs_ms else ()
                shown["outputs"] = [output.shown(read) for output in outputs]
        elif self.draws.shows_zeros:
            shown |= {"charged_cost": 0, "completed_at": 0}
        cost = self.bill.shown(now_ms)
        if cost is not None:
            shown["charged_cost"] = cost
        return shown

    def answer_to_start(self, unit: str = "ms") -> dict[str, Any]:
        """The run as the answer to its start shows it.

        Where the run ends early, the answer may already be stale when it leaves.
        """
        stale = "early" in self.faults and not self.draws.answers_end
        return self.as_read(self.created_ms - 1 if stale else self.created_ms, unit)

    def history_item(
        self, now_ms: int, *, unit: str, with_outputs: bool, read: int | None = None
    ) -> dict[str, Any]:
        """The run as the history lists it at a moment."""
        item = self.as_read(now_ms, unit, read) | {
            "workspace_id": self.workspace.workspace_id,
            "project_id": self.workspace.project_id,
        }
        if self.technique is not None:
            item["technique_run_id"] = self.run_id
            item["technique"] = {
                "technique_id": self.technique.technique_id,
                "name": self.technique.name,
            }
        else:
            item["generation_id"] = self.run_id
            item["model"] = {"model_id": self.request.model}
        if not with_outputs and item["status"] == "completed":
            item.pop("outputs", None)
            item.pop("charged_cost", None)
        return item

    def record(self, now_ms: int) -> dict[str, Any]:
        """The simulator's own record: the history item in full, and under `end` what reads show
        once nothing changes any more."""
        final_ms = max(self.completed_ms, self.outputs_ms, self.bill.final_ms)
        return self.history_item(now_ms, unit="ms", with_outputs=True) | {
            "run_type": self.request.run_type,
            "ordinal": self.ordinal,
            "callback_url": self.callback_url,
            "faults": sorted(self.faults),
            "colleague": self.colleague,
            "end": self.as_read(max(now_ms, final_ms)),
        }

    def billed(self, now_ms: int) -> dict[str, Any]:
        """The run's true cost: `bill` is the final cost, `shown` what reads show now, `final`
        whether that changes no more, and `priced` whether a cost is ever shown.
        """
        return {
            "run_id": self.run_id,
            "workspace_id": self.workspace.workspace_id,
            "end": self.end,
            "quote": self.bill.quote,
            "bill": self.bill.amount,
            "shown": self.bill.shown(now_ms),
            "final": now_ms >= self.bill.final_ms,
            "priced": self.bill.shown(self.bill.final_ms) is not None,
        }


def make_run(
    request: RunRequest,
    options: Options,
    *,
    run_id: str,
    ordinal: int,
    created_ms: int,
    root: str,
    workspace: SimulatedWorkspace,
    callback_url: str | None = None,
    colleague: bool = False,
) -> SimulatedRun:
    """The run that a request becomes; the same arguments always make the same run."""
    draws = RandomDraws(options.seed, ordinal)
    end_name = options.cancelled_name if draws.hit(options, "cancelled") else None
    failure = _failure(request, options, draws) if end_name is None else None
    succeeds = failure is None and end_name is None
    faults = frozenset[str]() if callback_url is None else _callback_faults(options, draws)
    started_ms = completed_ms = created_ms
    if "early" not in faults:
        duration = options.run_seconds * draws.spread / options.speed * 1000
        started_ms += int(duration * draws.pending_share)
        completed_ms += int(duration)
    outputs_ms = completed_ms
    if succeeds and draws.hit(options, "late_outputs"):
        outputs_ms += int(options.outputs_seconds / options.speed * 1000)
    technique, product = request.technique, request.product
    path = "runs" if technique is None else f"techniques/{technique.technique_id}/runs"
    return SimulatedRun(
        run_id=run_id,
        ordinal=ordinal,
        request=request,
        draws=draws,
        workspace=workspace,
        callback_url=callback_url,
        faults=faults,
        created_ms=created_ms,
        # A run whose input cannot be fetched fails before it is started.
        started_ms=None if failure and failure[0] == _UNREACHABLE[0] else started_ms,
        completed_ms=completed_ms,
        error_code=failure and failure[0],
        error_message=failure and failure[1],
        bill=_bill(
            options, draws, request.product.run_cost, succeeds=succeeds, completed_ms=completed_ms
        ),
        outputs=tuple(
            _output(request, port, root, digest(run_id, "output", position))
            for position, port in enumerate(product.outputs if succeeds else ())
        ),
        outputs_ms=outputs_ms,
        poll_url=f"{root}/api/v1/{path}/{run_id}",
        unfinished_name=options.queued_name if draws.hit(options, "queued") else None,
        end_name=end_name,
        full_progress=options.full_progress,
        colleague=colleague,
    )


def _failure(request: RunRequest, options: Options, draws: RandomDraws) -> Failure | None:
    if request.unreachable:
        return _UNREACHABLE
    if not draws.hit(options, "failures"):
        return None
    if not options.failure_codes:
        return draws.failure
    known: dict[str, list[Failure]] = {"measured": list(MEASURED_FAILURES)}
    for failure in (*FAILURES, *MEASURED_FAILURES):
        known.setdefault(failure[0], []).append(failure)
    chosen = [
        failure
        for code in options.failure_codes
        for failure in known.get(code, [(code, "The run failed.")])
    ]
    return chosen[int(draws.numbers["failure"] * len(chosen))]


def _callback_faults(options: Options, draws: RandomDraws) -> frozenset[str]:
    faults = {name for name in CALLBACK_FAULTS if draws.hit(options, name)}
    if "drop" in faults:
        # A dropped callback is neither early, late nor repeated; a forged one is sent anyway.
        faults &= {"drop", "bad_signature"}
    elif "early" in faults:
        faults -= {"late", "reorder"}
    return frozenset(faults)


def _bill(
    options: Options, draws: RandomDraws, price: float, *, succeeds: bool, completed_ms: int
) -> RunBill:
    """The run's cost, and what reads show: a quote, nothing, the bill, a correction, a refund."""
    quote = None
    if draws.hit(options, "quotes"):
        factor = options.quote_factor or 0.25 + 1.25 * draws.numbers["quote_size"]
        quote = round(price * factor, 6)
    steps: list[tuple[int, float | None]] = [(0, quote)]
    waits = options.bill_seconds or (0.0,)
    wait = waits[int(draws.numbers["bill_wait"] * len(waits))]
    late_ms = completed_ms + int(wait / options.speed * 1000)
    if not succeeds:
        late = draws.hit(options, "late_refunds")
        if late:
            steps.append((completed_ms, price if quote is None else quote))
        steps.append((late_ms if late else completed_ms, 0 if options.refund == "zero" else None))
        return RunBill(0, quote, tuple(steps))
    amount = round(price * options.bill_factor, 6)
    steps.append((completed_ms, None))
    if not draws.hit(options, "missing_bills"):
        billed_ms = late_ms if draws.hit(options, "late_bills") else completed_ms
        if draws.hit(options, "corrections"):
            too_high = draws.numbers["corrected_down"] < 0.5
            steps.append((billed_ms, round(amount * (1.25 if too_high else 0.8), 6)))
            billed_ms += int(options.correction_seconds / options.speed * 1000)
        steps.append((billed_ms, amount))
    return RunBill(amount, quote, tuple(steps))


def _output(request: RunRequest, port: SimulatedPort, root: str, output_id: str) -> SimulatedOutput:
    if port.type != "text":
        url = f"{root}/media/{output_id}.{EXTENSIONS[port.type]}"
        return SimulatedOutput(output_id, port.type, url)
    made_by = request.model if request.technique is None else f"{request.technique.name}: {port.id}"
    return SimulatedOutput(output_id, "text", f"{made_by}\n“Made by the simulator” ✓")


def digest(*parts: object) -> str:
    """A short identifier that the parts determine: 20 hexadecimal digits."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:20]
