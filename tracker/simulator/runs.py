"""A run as a function of the clock, and the shapes in which FLORA tells of it.

Nothing ticks: a run knows from its start when it will end and how, and its status is computed when
somebody asks. All times here are Unix milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tracker.simulator.bill import Bill
from tracker.simulator.catalogue import Technique
from tracker.simulator.fate import Fate, digest
from tracker.simulator.options import Workspace

Shape = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run. For type "text", `url` is the text itself."""

    output_id: str
    type: str
    url: str

    def shown(self, read: int | None = None) -> dict[str, str]:
        """The output as FLORA shows it; with the number of the read, its link is signed for it."""
        url = self.url
        if read is not None and self.type != "text":
            url += f"?signature={digest(self.output_id, 'read', read)}"
        return {"output_id": self.output_id, "type": self.type, "url": url}


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
    bill: Bill
    outputs: tuple[Output, ...]
    outputs_ms: int
    """When its outputs appear; at its end or later."""
    poll_url: str
    unfinished_name: str | None = None
    """The status that it shows in place of `pending` and `running`."""
    end_name: str | None = None
    """The status that it ends with in place of the documented ones."""
    full_progress: bool = False
    """Whether it reports progress 100 also where it fails."""
    colleague: bool = False
    """Whether another program started it."""

    @property
    def run_id(self) -> str:
        """FLORA's `run_…` identifier."""
        return self.fate.run_id

    @property
    def cost(self) -> float:
        """What FLORA bills in the end, in USD, whether it shows it or not."""
        return self.bill.amount

    @property
    def succeeds(self) -> bool:
        """Whether the run completes."""
        return self.error_code is None and self.end_name is None

    @property
    def end(self) -> str:
        """The status that the run ends with."""
        return self.end_name or ("completed" if self.succeeds else "failed")

    @property
    def final_ms(self) -> int:
        """The moment from which reads of the run do not change any more."""
        return max(self.completed_ms, self.outputs_ms, self.bill.final_ms)

    def status(self, now_ms: int) -> str:
        """The status at a moment."""
        if now_ms >= self.completed_ms:
            return self.end
        waiting = self.started_ms is None or now_ms < self.started_ms
        return self.unfinished_name or ("pending" if waiting else "running")

    def progress(self, now_ms: int) -> int:
        """Per cent done at a moment; a failed run stays where it stopped."""
        last = 100 if self.succeeds else self.fate.failed_progress
        if now_ms >= self.completed_ms:
            if self.full_progress:
                return 100
            return last if self.started_ms is not None else 0
        if self.started_ms is None or now_ms < self.started_ms:
            return 0
        share = (now_ms - self.started_ms) / (self.completed_ms - self.started_ms)
        return max(1, min(last - 1, int(last * share)))

    def as_read(self, now_ms: int, unit: str = "ms", read: int | None = None) -> dict[str, Any]:
        """The run as the API answers it at a moment; `read` signs its links for that read."""
        shown: dict[str, Any] = {
            "run_id": self.run_id,
            "status": self.status(now_ms),
            "progress": self.progress(now_ms),
            "created_at": _in_unit(self.created_ms, unit),
            "poll_url": self.poll_url,
        }
        if self.started_ms is not None and now_ms >= self.started_ms:
            shown["started_at"] = _in_unit(self.started_ms, unit)
        if now_ms >= self.completed_ms:
            shown["completed_at"] = _in_unit(self.completed_ms, unit)
            shown |= self.error
            # Before its outputs appear, a run shows an empty list of them or none.
            if self.succeeds and (now_ms >= self.outputs_ms or self.fate.shows_zeros):
                there = self.outputs if now_ms >= self.outputs_ms else ()
                shown["outputs"] = [output.shown(read) for output in there]
        elif self.fate.shows_zeros:
            shown |= {"charged_cost": 0, "completed_at": 0}
        cost = self.bill.shown(now_ms)
        if cost is not None:
            shown["charged_cost"] = cost
        return shown

    def answer_to_start(self, unit: str = "ms") -> dict[str, Any]:
        """The run as the answer to its start shows it.

        Where the run ends early, the answer may already be stale when it leaves.
        """
        stale = "early" in self.faults and not self.fate.answers_end
        return self.as_read(self.created_ms - 1 if stale else self.created_ms, unit)

    def history_item(
        self, now_ms: int, *, unit: str, with_outputs: bool, read: int | None = None
    ) -> dict[str, Any]:
        """The run as the history lists it at a moment."""
        item = self.as_read(now_ms, unit, read) | {
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
            item.pop("outputs", None)
            item.pop("charged_cost", None)
        return item

    def record(self, now_ms: int) -> dict[str, Any]:
        """The simulator's own record: the history item in full, and under `end` what reads of the
        run will show once nothing changes any more."""
        item = self.history_item(now_ms, unit="ms", with_outputs=True)
        return item | {
            "run_type": self.run_type,
            "ordinal": self.ordinal,
            "callback_url": self.callback_url,
            "faults": sorted(self.faults),
            "colleague": self.colleague,
            "end": self.as_read(max(now_ms, self.final_ms)),
        }

    def billed(self, now_ms: int) -> dict[str, Any]:
        """The truth about the run's cost: `bill` is what it costs in the end, `shown` what reads
        show now, `final` whether that changes no more, and `priced` whether a cost is ever shown.
        """
        return {
            "run_id": self.run_id,
            "workspace_id": self.workspace.workspace_id,
            "end": self.end,
            "quote": self.bill.quote,
            "bill": self.bill.amount,
            "shown": self.bill.shown(now_ms),
            "final": now_ms >= self.bill.final_ms,
            "priced": self.bill.shown(self.bill.final_ms) is not None,
        }

    @property
    def error(self) -> dict[str, str]:
        """Why the run fails, as FLORA says it; empty for a run that completes."""
        said = {"error_code": self.error_code, "error_message": self.error_message}
        return {name: text for name, text in said.items() if text is not None}


def _in_unit(moment_ms: int, unit: str) -> float:
    return moment_ms / 1000 if unit == "s" else moment_ms
