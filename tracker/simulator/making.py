"""How a run is made: from its request, its random draws, and the options at its start."""

from random import Random
from typing import Final

from tracker.simulator.catalogue import EXTENSIONS, SimulatedPort
from tracker.simulator.options import Options, SimulatedWorkspace
from tracker.simulator.runs import RunBill, RunRequest, SimulatedOutput, SimulatedRun, digest

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
