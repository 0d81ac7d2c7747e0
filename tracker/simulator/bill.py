"""What a run's `charged_cost` shows over time: a quote, nothing, the bill, its correction."""

from dataclasses import dataclass
from typing import Final

from tracker.simulator.fate import Fate
from tracker.simulator.options import Options

_TOO_HIGH: Final = 1.25
_TOO_LOW: Final = 0.8


@dataclass(frozen=True, slots=True)
class Bill:
    """A run's true cost in USD, and what reads of the run show in its place.

    `steps` are pairs of a moment (Unix milliseconds) and the cost shown from then on, oldest
    first; None stands for no cost. The last step shows `amount`, or never shows a cost.
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


def bill_of(
    options: Options, fate: Fate, price: float, *, succeeds: bool, completed_ms: int
) -> Bill:
    """The bill of a run of a technique that costs `price`. A run that does not complete is free."""

    def later(since_ms: int, seconds: float) -> int:
        return since_ms + int(seconds / options.speed * 1000)

    quote: float | None = None
    if fate.quotes < options.quotes:
        quote = _usd(price * (options.quote_factor or 0.25 + 1.25 * fate.quote_size))
    steps: list[tuple[int, float | None]] = [(0, quote)]
    waits = options.bill_seconds or (0.0,)
    billed_ms = later(completed_ms, waits[int(fate.bill_wait * len(waits))])
    if not succeeds:
        if fate.late_refunds < options.late_refunds:
            steps.append((completed_ms, price if quote is None else quote))
        else:
            billed_ms = completed_ms
        steps.append((billed_ms, 0 if options.refund == "zero" else None))
        return Bill(0, quote, tuple(steps))
    amount = _usd(price * options.bill_factor)
    steps.append((completed_ms, None))
    if fate.missing_bills < options.missing_bills:
        return Bill(amount, quote, tuple(steps))
    if fate.late_bills >= options.late_bills:
        billed_ms = completed_ms
    if fate.corrections < options.corrections:
        wrong = amount * (_TOO_HIGH if fate.corrected_down else _TOO_LOW)
        steps.append((billed_ms, _usd(wrong)))
        billed_ms = later(billed_ms, options.correction_seconds)
    return Bill(amount, quote, (*steps, (billed_ms, amount)))


def _usd(amount: float) -> float:
    return round(amount, 6)
