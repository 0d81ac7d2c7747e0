"""How the demo is shown: one table that lives on a terminal, a line for each change elsewhere."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tracker.demo.verdict import Verdict

_STYLES: Final = {"completed": "green", "failed": "red", "running": "yellow", "pending": "dim"}
_WIDTH: Final = 1000
"""Of a page, which has no right margin; tables take what they need."""


class Screen:
    """Shows the demo on a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._terminal = stream.isatty()
        self._console = Console(
            file=stream, highlight=False, width=None if self._terminal else _WIDTH
        )
        self._live: Live | None = None
        self._began = time.monotonic()
        self._told: dict[str, tuple[str, str]] = {}

    @contextmanager
    def live(self) -> Iterator[None]:
        """While runs are under way."""
        self._console.print(
            "A local FLORA loses two callbacks of five; one run is started behind the tracker's "
            "back.\n"
        )
        if not self._terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield

    def update(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Show the runs as they are now."""
        if self._live is not None:
            self._live.update(_progress_table(runs), refresh=True)
            return
        for run in runs:
            now = (run["status"], run["tracking"])
            before = self._told.get(run["run_id"])
            if now != before:
                self._told[run["run_id"]] = now
                self._console.print(
                    f"{time.monotonic() - self._began:5.1f} s  {_short(run):<12}  "
                    f"{_technique(run):<14}  {_change(run, before)}"
                )

    def show_verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """The end: every run, how its end became known, and whether all of it is true."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column in ("run", "technique", "callback", "end by", "status"):
            table.add_column(column)
        for column in ("cost", "outputs"):
            table.add_column(column, justify="right")
        table.add_column("agrees")
        for verdict in verdicts:
            run = verdict.run
            status = str(run.get("status", "unknown"))
            table.add_row(
                _short(run),
                _technique(run),
                verdict.callback,
                str(run.get("ended_via")),
                Text(status, style=_STYLES.get(status, "")),
                f"{run.get('charged_cost') or 0:.2f}",
                str(len(run.get("outputs", ()))),
                "yes" if not verdict.differences else f"no: {', '.join(verdict.differences)}",
            )
        self._console.print()
        self._console.print(table)
        self._console.print()
        ways = Counter(str(verdict.run.get("ended_via")) for verdict in verdicts)
        by = ", ".join(f"{count} by {way}" for way, count in ways.most_common())
        lost = sum(verdict.callback == "lost" for verdict in verdicts)
        wrong = sum(bool(verdict.differences) for verdict in verdicts)
        self._console.print(f"{len(verdicts)} runs, {lost} callbacks lost; ends known: {by}.")
        if wrong:
            self._console.print(f"{wrong} of them differ from the simulator's records.")
        else:
            self._console.print(
                "Status, outputs, cost and times of every run are those of the simulator's records."
            )

    def show_json(self, verdicts: Sequence[Verdict]) -> None:
        """The end, for a program: on stdout."""
        runs = [
            {**one.run, "callback": one.callback, "differences": list(one.differences)}
            for one in verdicts
        ]
        agree = not any(one.differences for one in verdicts)
        print(json.dumps({"agree": agree, "runs": runs}, indent=2), file=sys.stdout)


def _progress_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("run", "technique", "status"):
        table.add_column(column)
    table.add_column("progress", justify="right")
    for column in ("tracking", "end known by"):
        table.add_column(column)
    for run in runs:
        table.add_row(
            _short(run),
            _technique(run),
            Text(run["status"], style=_STYLES[run["status"]]),
            f"{run['progress']:.0f} %",
            run["tracking"],
            run["ended_via"] or "",
        )
    return table


def _technique(run: Mapping[str, Any]) -> str:
    return str(run.get("technique_id") or "").removeprefix("tech_")


def _short(run: Mapping[str, Any]) -> str:
    """The beginning of a run's id, enough to tell a handful apart."""
    return str(run["run_id"])[:12]


def _change(run: Mapping[str, Any], before: tuple[str, str] | None) -> str:
    """What has become of a run, in words."""
    if run["tracking"] == "settled":
        return f"{run['status']}, settled (end known by {run['ended_via']})"
    if run["ended_via"]:
        return f"{run['status']} (by {run['ended_via']}), details to be read"
    return str(run["status"]) if before else f"{run['status']}, tracked"
