"""What the demo shows: the runs while they progress, and how they compare with the simulator's
records."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

ApiRun = Mapping[str, Any]
"""A run as the tracker's API shows it."""
TrueRecord = Mapping[str, Any]
"""A run as the simulator's own list of records shows it."""

_TIMES: Final = ("created_at", "started_at", "completed_at")
_STYLES: Final = {"completed": "green", "failed": "red", "running": "yellow", "pending": "dim"}
_PLAIN_WIDTH: Final = 1000
"""Width of the output where it is no terminal; tables take what they need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """One run: the tracker's, the simulator's, and the fields in which they differ."""

    run: ApiRun
    record: TrueRecord
    differences: tuple[str, ...]

    @property
    def callback(self) -> str:
        """Whether a callback was requested, and whether it came."""
        if self.record["callback_url"] is None:
            return "none"
        return "lost" if "drop" in self.record["faults"] else "came"


def compare_runs(runs: Iterable[ApiRun], records: Iterable[TrueRecord]) -> list[RunComparison]:
    """A comparison for each run that either side knows, oldest first."""
    tracked = {run["run_id"]: run for run in runs}
    true = {record["run_id"]: record for record in records}
    unknown: TrueRecord = {"callback_url": None, "faults": []}
    return [_compare(tracked.get(run_id, {}), record) for run_id, record in true.items()] + [
        RunComparison(run=run, record=unknown, differences=("unknown to FLORA",))
        for run_id, run in tracked.items()
        if run_id not in true
    ]


def _compare(run: ApiRun, record: TrueRecord) -> RunComparison:
    end = record["end"]
    outputs = [
        {"position": position, **output} for position, output in enumerate(end.get("outputs", ()))
    ]
    expected = {
        "run_id": record["run_id"],
        "technique_id": record["technique"]["technique_id"],
        "workspace_id": record["workspace_id"],
        "tracking": "settled",
        "status": end["status"],
        "charged_cost": end["charged_cost"],
        "error_code": end.get("error_code"),
        "error_message": end.get("error_message"),
        "outputs": outputs,
        **{name: end.get(name) for name in _TIMES},
    }
    found = {
        **run,
        "outputs": [
            {name: output[name] for name in ("position", "output_id", "type", "url")}
            for output in run.get("outputs", ())
        ],
        **{name: _milliseconds(run.get(name)) for name in _TIMES},
    }
    return RunComparison(
        run=run or {"run_id": record["run_id"]},
        record=record,
        differences=tuple(name for name, value in expected.items() if found.get(name) != value),
    )


def _milliseconds(time: str | None) -> int | None:
    return None if time is None else round(datetime.fromisoformat(time).timestamp() * 1000)


class DemoDisplay:
    """Shows the demo on a stream: a live table on a terminal, a line for each change elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(
            file=stream, highlight=False, width=None if stream.isatty() else _PLAIN_WIDTH
        )
        self._on_terminal = stream.isatty()
        self._live: Live | None = None
        self._began = time.monotonic()
        self._shown: dict[str, tuple[str, str]] = {}

    @contextmanager
    def live(self) -> Iterator[None]:
        """While runs are in progress."""
        self._console.print(
            "A local FLORA loses two callbacks of five; one run is started without the tracker.\n"
        )
        if not self._on_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield

    def update(self, runs: Sequence[ApiRun]) -> None:
        if self._live is not None:
            self._live.update(_progress_table(runs), refresh=True)
            return
        for run in runs:
            state = (run["status"], run["tracking"])
            before = self._shown.get(run["run_id"])
            if state != before:
                self._shown[run["run_id"]] = state
                self._console.print(
                    f"{time.monotonic() - self._began:5.1f} s  {_short_id(run):<12}  "
                    f"{_technique(run):<14}  {_change(run, is_new=before is None)}"
                )

    def show_result(self, comparisons: Sequence[RunComparison]) -> None:
        """Show every run, how its end became known, and whether it agrees with the records."""
        table = _table("run", "technique", "callback", "end by", "status", ">cost", ">outputs")
        table.add_column("agrees")
        for one in comparisons:
            run = one.run
            table.add_row(
                _short_id(run),
                _technique(run),
                one.callback,
                str(run.get("ended_via")),
                _status(run),
                f"{run.get('charged_cost') or 0:.2f}",
                str(len(run.get("outputs", ()))),
                "yes" if not one.differences else f"no: {', '.join(one.differences)}",
            )
        sources = Counter(str(one.run.get("ended_via")) for one in comparisons)
        by_source = ", ".join(f"{count} by {source}" for source, count in sources.most_common())
        lost = sum(one.callback == "lost" for one in comparisons)
        wrong = sum(bool(one.differences) for one in comparisons)
        self._console.print()
        self._console.print(table)
        self._console.print()
        self._console.print(
            f"{len(comparisons)} runs, {lost} callbacks lost; ends known: {by_source}."
        )
        if wrong:
            self._console.print(f"{wrong} of them differ from the simulator's records.")
        else:
            self._console.print(
                "Status, outputs, cost and times of every run are those of the simulator's records."
            )

    def show_json(self, comparisons: Sequence[RunComparison]) -> None:
        """Print the result as JSON to stdout."""
        runs = [
            {**one.run, "callback": one.callback, "differences": list(one.differences)}
            for one in comparisons
        ]
        agree = not any(one.differences for one in comparisons)
        print(json.dumps({"agree": agree, "runs": runs}, indent=2), file=sys.stdout)


def _progress_table(runs: Sequence[ApiRun]) -> Table:
    table = _table("run", "technique", "status", ">progress", "tracking", "end known by")
    for run in runs:
        table.add_row(
            _short_id(run),
            _technique(run),
            _status(run),
            f"{run['progress']:.0f} %",
            run["tracking"],
            run["ended_via"] or "",
        )
    return table


def _table(*columns: str) -> Table:
    """A table with these columns; `>` aligns one to the right."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column[0] == ">" else "left")
    return table


def _status(run: ApiRun) -> Text:
    status = str(run.get("status", "unknown"))
    return Text(status, style=_STYLES.get(status, ""))


def _technique(run: ApiRun) -> str:
    return str(run.get("technique_id") or "").removeprefix("tech_")


def _short_id(run: ApiRun) -> str:
    return str(run["run_id"])[:12]


def _change(run: ApiRun, *, is_new: bool) -> str:
    if run["tracking"] == "settled":
        return f"{run['status']}, settled (end known by {run['ended_via']})"
    if run["ended_via"]:
        return f"{run['status']} (by {run['ended_via']}), fetching results"
    return f"{run['status']}, tracked" if is_new else str(run["status"])
