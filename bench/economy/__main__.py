"""`python -m bench.economy`: see the package."""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Final

from bench.economy import tables, trials
from bench.economy.quiet import run_quiet
from bench.economy.recipe import run_recipe
from bench.economy.tracked import run_tracked
from bench.economy.trial import Found, Trial
from bench.report import RESULTS, Report, say
from bench.throw_away import KINDS

PARTS: Final = ("economy", "gathering", "freshness")
AT_THE_SAME_TIME: Final = 16


def main() -> int:
    """The command line; exit status 1 where a promise is broken."""
    arguments = argparse.ArgumentParser(prog="python -m bench.economy")
    arguments.add_argument("--database", choices=KINDS, default="sqlite")
    arguments.add_argument("--runs", type=int, default=1000)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    report = Report("economy")
    broken: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(AT_THE_SAME_TIME, mp_context=context) as pool:
        if "economy" in given.only:
            broken = economy(pool, report, given.runs, given.database)
        if "gathering" in given.only:
            found = tracked(pool, trials.gathering(given.runs), given.database)
            tables.gathering(report, found)
        if "freshness" in given.only:
            tables.freshness(report, tracked(pool, trials.freshness(), given.database))
    report.figures["broken"] = broken
    report.write(given.results)
    for promise in broken:
        say(f"BROKEN: {promise}")
    return int(bool(broken))


def economy(pool: Executor, report: Report, runs: int, kind: str) -> list[str]:
    """What each run costs, and a quiet sweep; the promises that were broken."""
    promised = trials.promises(runs)
    followed = {trial.name: pool.submit(run_recipe, trial) for trial in trials.recipes(runs)}
    quiet = pool.submit(run_quiet, kind)
    found = tracked(pool, promised, kind)
    tables.costs(report, promised, found, {name: one.result() for name, one in followed.items()})
    sweeps = quiet.result()
    tables.quiet(report, sweeps)
    broken = tables.broken(promised, found)
    if sweeps[-1]["reads"] > 1:
        broken.append(f"a sweep that finds nothing new: {sweeps[-1]['reads']} reads")
    return broken


def tracked(pool: Executor, wanted: Sequence[Trial], kind: str) -> dict[str, Found]:
    """All these trials at the same time, by their names, in their order."""
    began = time.monotonic()
    running = [pool.submit(run_tracked, trial, kind) for trial in wanted]
    found = {}
    for trial, one in zip(wanted, running, strict=True):
        found[trial.name] = one.result()
        seconds = time.monotonic() - began
        say(f"{seconds:.0f} s: {trial.name}: {found[trial.name].per_run:.3f} reads/run")
    return found


if __name__ == "__main__":
    sys.exit(main())
