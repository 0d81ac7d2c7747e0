"""A run as a function of the clock, and the shapes in which FLORA tells of it.

Nothing ticks: a run knows from its start when it will end and how, and its status is computed when
somebody asks. All times here are Unix milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tracker.simulator.catalogue import Technique
from tracker.simulator.fate import Fate
from tracker.simulator.options import Workspace

Shape = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run. For type "text", `url` is the text itself."""

    output_id: str
    type: str
    url: str

    def shown(self) -> dict[str, str]:
        """The output as FLORA shows it."""
        return {"output_id": self.output_id, "type": self.type, "url": self.url}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """One run: its past and its future. `technique` or `model` is set, by `run_type`.

    `started_ms` is None for a run that fails before it is started.
    """

    fate: Fate
    ordinal: int
    run_type: Literal["technique", "generation"]
    workspace: Workspace
    technique: Technique | None
    model: str | None
    inputs: tuple[Shape, ...]
    callback_url: str | None
    faults: frozenset[str]
    """What happens to its callback: names from `CALLBACK_FAULTS`."""
    created_ms: int
    started_ms: int | None
    completed_ms: int
    error_code: str | None
    """Why it fails; None for a run that completes."""
    error_message: str | None
    cost: float
    outputs: tuple[Output, ...]
    poll_url: str

    @property
    def run_id(self) -> str:
        """FLORA's `run_…` identifier."""
        return self.fate.run_id

    @property
    def succeeds(self) -> bool:
        """Whether the run completes."""
        return self.error_code is None

    @property
    def end(self) -> str:
        """The status that the run ends with."""
        return "completed" if self.succeeds else "failed"

    def status(self, now_ms: int) -> str:
        """The status at a moment."""
        if now_ms >= self.completed_ms:
            return self.end
        return "pending" if self.started_ms is None or now_ms < self.started_ms else "running"

    def progress(self, now_ms: int) -> int:
        """Per cent done at a moment; a failed run stays where it stopped."""
        last = 100 if self.succeeds else self.fate.failed_progress
        status = self.status(now_ms)
        if status in ("completed", "failed"):
            return last if self.started_ms is not None else 0
        if status == "pending" or self.started_ms is None:
            return 0
        share = (now_ms - self.started_ms) / (self.completed_ms - self.started_ms)
        return max(1, min(last - 1, int(last * share)))

    def sight(self, now_ms: int, unit: str = "ms") -> dict[str, Any]:
        """The run as the API answers it at a moment."""
        status = self.status(now_ms)
        shown: dict[str, Any] = {
            "run_id": self.run_id,
            "status": status,
            "progress": self.progress(now_ms),
            "created_at": _in_unit(self.created_ms, unit),
            "poll_url": self.poll_url,
        }
        if self.started_ms is not None and now_ms >= self.started_ms:
            shown["started_at"] = _in_unit(self.started_ms, unit)
        if status in ("completed", "failed"):
            shown["completed_at"] = _in_unit(self.completed_ms, unit)
            shown["charged_cost"] = self.cost
            shown |= self.error if status == "failed" else {"outputs": self._outputs_shown()}
        elif self.fate.shows_zeros:
            shown |= {"charged_cost": 0, "completed_at": 0}
        return shown

    def answer_to_start(self, unit: str = "ms") -> dict[str, Any]:
        """The run as the answer to its start shows it.

        Where the run ends early, the answer may already be stale when it leaves.
        """
        stale = "early" in self.faults and not self.fate.answers_end
        return self.sight(self.created_ms - 1 if stale else self.created_ms, unit)

    def history_item(self, now_ms: int, *, unit: str, with_outputs: bool) -> dict[str, Any]:
        """The run as the history lists it at a moment."""
        item = self.sight(now_ms, unit) | {
            "workspace_id": self.workspace.workspace_id,
            "project_id": self.workspace.project_id,
        }
        if self.technique is not None:
            item["technique_run_id"] = self.run_id
            item["technique"] = {
                "technique_id": self.technique.technique_id,
                "name": self.technique.name,
            }
        else:
            item["generation_id"] = self.run_id
            item["model"] = {"model_id": self.model}
        if not with_outputs and item["status"] == "completed":
            del item["outputs"], item["charged_cost"]
        return item

    def record(self, now_ms: int) -> dict[str, Any]:
        """The simulator's own record: the history item in full, and under `end` how it will end."""
        item = self.history_item(now_ms, unit="ms", with_outputs=True)
        return item | {
            "run_type": self.run_type,
            "ordinal": self.ordinal,
            "callback_url": self.callback_url,
            "faults": sorted(self.faults),
            "end": self.sight(max(now_ms, self.completed_ms)),
        }

    @property
    def error(self) -> dict[str, str]:
        """Why the run fails, as FLORA says it; empty for a run that completes."""
        said = {"error_code": self.error_code, "error_message": self.error_message}
        return {name: text for name, text in said.items() if text is not None}

    def _outputs_shown(self) -> list[dict[str, str]]:
        return [output.shown() for output in self.outputs]


def _in_unit(moment_ms: int, unit: str) -> float:
    return moment_ms / 1000 if unit == "s" else moment_ms
