"""The verdict: what the tracker holds of each run, field by field against what was simulated."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

Run = Mapping[str, Any]
"""A run as the tracker's API shows it."""
Record = Mapping[str, Any]
"""A run as the simulator's own list of records shows it."""

_TIMES: Final = ("created_at", "started_at", "completed_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One run: as the tracker has it, as it was, and the fields in which they differ."""

    run: Run
    record: Record
    differences: tuple[str, ...]

    @property
    def callback(self) -> str:
        """What became of its callback."""
        if self.record["callback_url"] is None:
            return "none"
        return "lost" if "drop" in self.record["faults"] else "came"


def judge(runs: Iterable[Run], records: Iterable[Record]) -> list[Verdict]:
    """A verdict for each run that either side knows, oldest first."""
    held = {run["run_id"]: run for run in runs}
    true = {record["run_id"]: record for record in records}
    verdicts = [_compare(held.get(run_id, {}), record) for run_id, record in true.items()]
    nowhere: Record = {"callback_url": None, "faults": []}
    verdicts += [
        Verdict(run=run, record=nowhere, differences=("unknown to FLORA",))
        for run_id, run in held.items()
        if run_id not in true
    ]
    return verdicts


def _compare(run: Run, record: Record) -> Verdict:
    end = record["end"]
    expected = {
        "run_id": record["run_id"],
        "technique_id": record["technique"]["technique_id"],
        "workspace_id": record["workspace_id"],
        "tracking": "settled",
        "status": end["status"],
        "charged_cost": end["charged_cost"],
        "error_code": end.get("error_code"),
        "error_message": end.get("error_message"),
        "outputs": [
            (position, output["output_id"], output["type"], output["url"])
            for position, output in enumerate(end.get("outputs", ()))
        ],
        **{name: end.get(name) for name in _TIMES},
    }
    found = {
        **run,
        "outputs": [
            (output["position"], output["output_id"], output["type"], output["url"])
            for output in run.get("outputs", ())
        ],
        **{name: _milliseconds(run.get(name)) for name in _TIMES},
    }
    return Verdict(
        run=run or {"run_id": record["run_id"]},
        record=record,
        differences=tuple(name for name, value in expected.items() if found.get(name) != value),
    )


def _milliseconds(time: str | None) -> int | None:
    """The Unix milliseconds of an ISO 8601 time."""
    return None if time is None else round(datetime.fromisoformat(time).timestamp() * 1000)
