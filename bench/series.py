"""Programs run one after the other, each with figures of its own, and which of them failed."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.report import RESULTS, say

Program = tuple[str, ...]
"""A module and its options."""


def run(
    programs: Mapping[str, Program],
    *,
    prog: str,
    about: str,
    into: Callable[[str, Path], Program],
) -> int:
    """The command line of a series: some of the programs, or all.

    `into` gives the options that let one leave its figures in a directory. Returns the exit status,
    1 where a program's was another than 0.
    """
    arguments = argparse.ArgumentParser(prog=prog, description=about)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=", ".join(programs))
    arguments.add_argument("--results", type=Path, default=RESULTS)
    given = arguments.parse_args()
    if unknown := set(given.names) - programs.keys():
        arguments.error(f"there is no {', '.join(sorted(unknown))}")
    given.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in given.names or programs:
        module, *options = programs[name]
        say(f"== {name}: python -m {module} {' '.join(options)}")
        began = time.monotonic()
        command = [sys.executable, "-m", module, *options, *into(name, given.results)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        say(
            f"== {name}: {'FAILED' if name in failed else 'done'}, {time.monotonic() - began:.0f} s"
        )
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0
