"""How long commands take to begin, in processor time, and which packages their imports are."""

import os
import re
import resource
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Final

from bench.footprint.process import essential, serving
from bench.report import Report, Table, say
from bench.throw_away import throw_away

COMMANDS: Final = {
    "python -c pass": None,
    "tracker --help": ("--help",),
    "tracker runs list": ("runs", "list"),
}
ROUNDS: Final = 7
SHOWN: Final = 10
_LINE: Final = re.compile(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", re.MULTILINE)


def startup(report: Report) -> None:
    """Measure, on SQLite; two tables go into the report."""
    with throw_away("sqlite") as url:
        environ = essential(url)
        _run(("db", "upgrade"), environ)
        took: dict[str, list[float]] = {name: [] for name in COMMANDS}
        ready: list[tuple[float, float]] = []
        for number in range(ROUNDS):
            say(f"start-up, round {number + 1}")
            for name, command in COMMANDS.items():
                took[name].append(_run(command, environ))
            with serving(url) as tracker:
                ready.append((tracker.ready_processor, tracker.ready_after))
        imports = {
            name: _imports(command, environ) for name, command in COMMANDS.items() if command
        }
    medians = {name: statistics.median(times) * 1000 for name, times in took.items()}
    medians["tracker serve, until it is ready"] = statistics.median(one for one, _ in ready) * 1000
    least = medians["python -c pass"]
    report.add(
        Table(
            "To begin, milliseconds of processor time",
            ("", "ms", "beyond Python's own"),
            [(name, f"{ms:.0f}", f"{ms - least:.0f}") for name, ms in medians.items()],
            f"Medians of {ROUNDS} rounds in turn. `serve` was ready "
            f"{statistics.median(after for _, after in ready):.2f} s after it was called.",
        )
    )
    for name, packages in imports.items():
        total = packages.total()
        report.add(
            Table(
                f"Imports of `{name}`",
                ("package", "share"),
                [
                    (package, f"{spent / total:.0%}")
                    for package, spent in packages.most_common(SHOWN)
                ],
            )
        )
    report.figures["startup"] = {
        "milliseconds": {name: [one * 1000 for one in times] for name, times in took.items()},
        "serve_ready": ready,
        "imports_us": imports,
    }


def _run(command: tuple[str, ...] | None, environ: Mapping[str, str]) -> float:
    """Processor seconds that a command took."""
    arguments = ("-c", "pass") if command is None else ("-m", "tracker", *command)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        env=dict(environ),
        cwd=os.sep,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _imports(command: tuple[str, ...], environ: Mapping[str, str]) -> Counter[str]:
    """Microseconds by top-level package, as Python itself counts them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tracker", *command],
        env=dict(environ),
        capture_output=True,
        text=True,
        check=True,
    )
    found: Counter[str] = Counter()
    for spent, name in _LINE.findall(done.stderr):
        package = name.partition(".")[0]
        found["Python's own" if package in sys.stdlib_module_names else package] += int(spent)
    return found
