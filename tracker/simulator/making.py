"""How a run is made: from what was asked for, its fate, and the options that hold at its start."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from tracker.simulator.bill import bill_of
from tracker.simulator.catalogue import Port, Technique
from tracker.simulator.fate import FAILURES, MEASURED_FAILURES, Fate, digest
from tracker.simulator.media import EXTENSIONS
from tracker.simulator.options import CALLBACK_FAULTS, Options, Workspace
from tracker.simulator.runs import Output, SimulatedRun

_GENERATIONS: Final = {
    "image": ("imageUrl", 0.04),
    "video": ("videoUrl", 0.5),
    "audio": ("audioUrl", 0.06),
    "text": ("text", 0.01),
}
"""Output type and price in USD for each type of generation."""

_UNREACHABLE: Final = next(error for error in FAILURES if error[0] == "input_unreachable")

Failure = tuple[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to run: a technique with its inputs, or a model. `price` is in USD."""

    run_type: Literal["technique", "generation"]
    ports: tuple[Port, ...]
    price: float
    text: Callable[[Port], str]
    technique: Technique | None = None
    model: str | None = None
    inputs: tuple[Mapping[str, Any], ...] = ()
    unreachable: bool = False


def technique_order(
    technique: Technique, inputs: tuple[Mapping[str, Any], ...], *, unreachable: bool = False
) -> Order:
    """The order for one run of a technique."""
    return Order(
        run_type="technique",
        ports=technique.outputs,
        price=technique.run_cost,
        text=lambda port: f"{technique.name}: {port.id}\n“Made by the simulator” ✓",
        technique=technique,
        inputs=inputs,
        unreachable=unreachable,
    )


def generation_order(kind: str, model: str) -> Order:
    """The order for one generation."""
    output_type, price = _GENERATIONS[kind]
    return Order(
        run_type="generation",
        ports=(Port(kind, output_type),),
        price=price,
        text=lambda _: f"{model}\n“Made by the simulator” ✓",
        model=model,
    )


def make_run(
    order: Order,
    options: Options,
    fate: Fate,
    *,
    ordinal: int,
    created_ms: int,
    root: str,
    workspace: Workspace,
    callback_url: str | None = None,
    colleague: bool = False,
) -> SimulatedRun:
    """The run that an order becomes; the same arguments always make the same run."""
    end_name = options.cancelled_name if fate.cancelled < options.cancelled else None
    error_code, error_message = _failure(order, options, fate) if end_name is None else (None, None)
    succeeds = error_code is None and end_name is None
    faults = _callback_faults(options, fate) if callback_url is not None else frozenset[str]()
    started_ms, completed_ms = _times(options, fate, created_ms, early="early" in faults)
    outputs_ms = completed_ms
    if fate.late_outputs < options.late_outputs:
        outputs_ms += int(options.outputs_seconds / options.speed * 1000)
    technique = order.technique
    path = f"techniques/{technique.technique_id}/runs" if technique is not None else "runs"
    return SimulatedRun(
        fate=fate,
        ordinal=ordinal,
        run_type=order.run_type,
        workspace=workspace,
        technique=technique,
        model=order.model,
        inputs=order.inputs,
        callback_url=callback_url,
        faults=faults,
        created_ms=created_ms,
        # What cannot be fetched fails the run before it is started.
        started_ms=None if error_code == _UNREACHABLE[0] else started_ms,
        completed_ms=completed_ms,
        error_code=error_code,
        error_message=error_message,
        bill=bill_of(options, fate, order.price, succeeds=succeeds, completed_ms=completed_ms),
        outputs=tuple(
            _output(root, fate.run_id, position, port, order.text)
            for position, port in enumerate(order.ports)
            if succeeds
        ),
        outputs_ms=outputs_ms if succeeds else completed_ms,
        poll_url=f"{root}/api/v1/{path}/{fate.run_id}",
        unfinished_name=options.queued_name if fate.queued < options.queued else None,
        end_name=end_name,
        full_progress=options.full_progress,
        colleague=colleague,
    )


def _failure(order: Order, options: Options, fate: Fate) -> Failure | tuple[None, None]:
    if order.unreachable:
        return _UNREACHABLE
    if fate.fails >= options.failures:
        return None, None
    if not options.failure_codes:
        return fate.error_code, fate.error_message
    known: dict[str, list[Failure]] = {"measured": list(MEASURED_FAILURES)}
    for failure in (*FAILURES, *MEASURED_FAILURES):
        known.setdefault(failure[0], []).append(failure)
    chosen = [
        failure
        for code in options.failure_codes
        for failure in known.get(code, [(code, "The run failed.")])
    ]
    return chosen[int(fate.failure * len(chosen))]


def _callback_faults(options: Options, fate: Fate) -> frozenset[str]:
    struck = {name for name in CALLBACK_FAULTS if getattr(fate, name) < getattr(options, name)}
    if "drop" in struck:
        # What never comes is neither early, late nor doubled; a forgery comes all the same.
        struck &= {"drop", "bad_signature"}
    elif "early" in struck:
        struck -= {"late", "reorder"}
    return frozenset(struck)


def _times(options: Options, fate: Fate, created_ms: int, *, early: bool) -> tuple[int, int]:
    if early:
        return created_ms, created_ms
    duration = options.run_seconds * fate.spread / options.speed * 1000
    return created_ms + int(duration * fate.pending_share), created_ms + int(duration)


def _output(
    root: str, run_id: str, position: int, port: Port, text: Callable[[Port], str]
) -> Output:
    output_id = digest(run_id, "output", position)
    if port.type == "text":
        return Output(output_id, port.type, text(port))
    return Output(output_id, port.type, f"{root}/media/{output_id}.{EXTENSIONS[port.type]}")
