"""What was found, told in tables, and which promises it broke."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench.economy.alone import alone
from bench.economy.recipe import EVERY
from bench.economy.trial import Found, Trial
from bench.economy.trials import DEFAULT_GATHER, DEFAULT_INTERVAL, FOLLOWED, INTERVALS
from bench.report import Report, Table

MIDDLES: Final = (10, 30, 120, 600)
"""Middle durations in seconds, for which the schedule alone is asked."""
_SINGLE: Final = ("runs.get", "runs.get_any")


def costs(
    report: Report, trials: Sequence[Trial], found: Mapping[str, Found], recipe: Mapping[str, Found]
) -> None:
    """Reads for each run, beside the recipe on the same runs."""
    rows = []
    for trial in trials:
        one = found[trial.name]
        other = recipe["one" if trial.every is None else "many"]
        single = sum(one.reads.get(route, 0) for route in _SINGLE)
        rows.append(
            (
                trial.name,
                one.ended,
                f"{sum(one.reads.values()) - single} + {single}",
                f"{one.per_run:.3f}",
                f"≤ {trial.most}",
                f"{one.per_bill:.3f} (≤ {trial.most_for_bills})",
                f"{other.per_run:.2f}",
                f"{other.per_run / one.per_run:.0f}",
                _fresh(one),
                _fresh(other),
            )
        )
    report.add(
        Table(
            "Reads of FLORA for each settled run",
            (
                *(
                    "runs",
                    "number",
                    "pages + single reads",
                    "reads/run",
                    "promised",
                    "for the bill",
                ),
                *("the recipe", "times fewer", "fresh, s", "the recipe's, s"),
            ),
            rows,
            "Starts and the catalogue are not counted, sweeps are. The recipe reads each run every "
            f"{EVERY:g} s until it has ended; of many it follows the first {FOLLOWED}. Fresh: from "
            "the end at FLORA to the settled row, half of the runs / 95 % of them. For the bill: "
            "reads/run after all are settled, until every cost is final.",
        )
    )
    report.figures["costs"] = {name: one.figures() for name, one in found.items()}
    report.figures["recipe"] = {name: one.figures() for name, one in recipe.items()}


def quiet(report: Report, sweeps: Sequence[Mapping[str, Any]]) -> None:
    """What sweeps cost that find nothing new."""
    report.add(
        Table(
            "Sweeps of 1,000 runs, one after the other",
            ("sweep", "runs found", "runs repaired", "reads"),
            [
                (number, sweep["discovered"], sweep["repaired"], sweep["reads"])
                for number, sweep in enumerate(sweeps, start=1)
            ],
            "The first also looks once a day whether there are generation runs.",
        )
    )
    report.figures["quiet_sweeps"] = list(sweeps)


def freshness(report: Report, found: Mapping[str, Found]) -> None:
    """How fresh, and at which cost, by where the news comes from and by the interval."""
    report.add(
        Table(
            "Freshness, a run each second, 10 to 30 s long",
            ("runs", "p50, s", "p95, s", "longest, s", "reads/run"),
            [
                (
                    _marked(name, f"interval {DEFAULT_INTERVAL} s"),
                    *(f"{one.quantile(share):.2f}" for share in (0.5, 0.95, 1)),
                    f"{one.per_run:.2f}",
                )
                for name, one in found.items()
            ],
            "From the end at FLORA to the settled row. Bold: the default.",
        )
    )
    report.figures["freshness"] = {name: one.figures() for name, one in found.items()}
    rows = []
    for middle in MIDDLES:
        for known in (True, False):
            each = {one: alone(middle, interval=one, known=known) for one in INTERVALS}
            rows.append(
                (
                    f"{middle} s, {'known' if known else 'unknown'}",
                    *(f"{one.reads:.1f}: {one.p50:.1f} / {one.p95:.1f}" for one in each.values()),
                )
            )
    report.add(
        Table(
            "A run alone, without callback: reads, and freshness p50 / p95 in seconds",
            (
                "middle duration",
                *(_marked(f"interval {one} s", f"{DEFAULT_INTERVAL} s") for one in INTERVALS),
            ),
            rows,
            "Computed from the tracker's own schedule; durations spread from half of the middle to "
            "one and a half.",
        )
    )


def gathering(report: Report, found: Mapping[str, Found]) -> None:
    """What it costs not to wait for company, and what it gains to wait longer."""
    report.add(
        Table(
            "Many runs with callbacks, by how long due runs may gather",
            ("at most", "reads/run", "p50, s", "p95, s"),
            [
                (
                    _marked(name, f"{DEFAULT_GATHER:g} s"),
                    f"{one.per_run:.3f}",
                    *(f"{one.quantile(share):.1f}" for share in (0.5, 0.95)),
                )
                for name, one in found.items()
            ],
            "Bold: what the tracker does.",
        )
    )
    report.figures["gathering"] = {name: one.figures() for name, one in found.items()}


def broken(trials: Sequence[Trial], found: Mapping[str, Found]) -> list[str]:
    """The promises that were not kept."""
    said = []
    for trial in trials:
        one = found[trial.name]
        if one.settled != one.ended:
            said.append(f"{trial.name}: {one.ended - one.settled} runs are not as FLORA has them")
        if trial.most is not None and one.per_run > trial.most:
            said.append(f"{trial.name}: {one.per_run:.3f} reads/run, promised ≤ {trial.most}")
        if trial.most_for_bills is not None and one.per_bill > trial.most_for_bills:
            said.append(
                f"{trial.name}: {one.per_bill:.3f} reads/run for bills, promised ≤ "
                f"{trial.most_for_bills}"
            )
    return said


def _fresh(one: Found) -> str:
    return f"{one.quantile(0.5):.1f} / {one.quantile(0.95):.1f}"


def _marked(name: str, default: str) -> str:
    return f"**{name}**" if name.endswith(default) else name
