"""A run as a function of the clock, and the forms in which FLORA shows it.

The end of a run is decided at its start; its status is computed for each read. All times are Unix
milliseconds.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from tracker.simulator.catalogue import GENERATIONS, SimulatedTechnique
from tracker.simulator.options import SimulatedWorkspace

if TYPE_CHECKING:
    from tracker.simulator.making import RandomDraws

RunType = Literal["technique", "generation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What is to run: a technique with its inputs, or a model for a type of generation."""

    technique: SimulatedTechnique | None = None
    inputs: tuple[Mapping[str, Any], ...] = ()
    generation: str = ""
    model: str | None = None

    @property
    def run_type(self) -> RunType:
        return "generation" if self.technique is None else "technique"

    @property
    def product(self) -> SimulatedTechnique:
        """What has its outputs and its price: the technique, or the type of generation."""
        return self.technique or GENERATIONS[self.generation]

    @property
    def unreachable(self) -> bool:
        """Whether an input links to a host under `.invalid`, which never answers."""
        return any(
            item["type"] != "text" and (urlsplit(item["value"]).hostname or "").endswith(".invalid")
            for item in self.inputs
        )


@dataclass(frozen=True, slots=True)
class SimulatedOutput:
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


@dataclass(frozen=True, slots=True)
class RunBill:
    """A run's true cost in USD, and what reads of the run show in its place.

    `steps` are pairs of a moment and the cost shown from then on, oldest first; None stands for no
    cost. The last step shows `amount`, or never shows a cost.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """One run, from its start to its end.

    `started_ms` is None for a run that fails before it is started.
    """

    run_id: str
    ordinal: int
    request: RunRequest
    draws: "RandomDraws"
    workspace: SimulatedWorkspace
    callback_url: str | None
    faults: frozenset[str]
    """The faults of its callback: names from `CALLBACK_FAULTS`."""
    created_ms: int
    started_ms: int | None
    completed_ms: int
    error_code: str | None
    """Why it fails; None for a run that completes."""
    error_message: str | None
    bill: RunBill
    outputs: tuple[SimulatedOutput, ...]
    outputs_ms: int
    """When its outputs appear; at its end or later."""
    poll_url: str
    unfinished_name: str | None
    """The status that it shows in place of `pending` and `running`."""
    end_name: str | None
    """The status that it ends with in place of the documented ones."""
    full_progress: bool
    """Whether it reports progress 100 also where it fails."""
    colleague: bool
    """Whether another program started it."""

    @property
    def technique(self) -> SimulatedTechnique | None:
        """Its technique; None for a generation."""
        return self.request.technique

    @property
    def inputs(self) -> tuple[Mapping[str, Any], ...]:
        return self.request.inputs

    @property
    def cost(self) -> float:
        """The final cost in USD, whether reads show it or not."""
        return self.bill.amount

    @property
    def succeeds(self) -> bool:
        return self.error_code is None and self.end_name is None

    @property
    def end(self) -> str:
        """The status that the run ends with."""
        return self.end_name or ("completed" if self.succeeds else "failed")

    @property
    def error(self) -> dict[str, str]:
        """Why the run fails, as FLORA shows it; empty for a run that completes."""
        error = {"error_code": self.error_code, "error_message": self.error_message}
        return {name: text for name, text in error.items() if text is not None}

    def status(self, now_ms: int) -> str:
        if now_ms >= self.completed_ms:
            return self.end
        waiting = self.started_ms is None or now_ms < self.started_ms
        return self.unfinished_name or ("pending" if waiting else "running")

    def progress(self, now_ms: int) -> int:
        """Per cent done at a moment; a failed run stays where it stopped."""
        last = 100 if self.succeeds else self.draws.failed_progress
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

        def time(moment_ms: int) -> float:
            return moment_ms / 1000 if unit == "s" else moment_ms

        shown: dict[str, Any] = {
            "run_id": self.run_id,
            "status": self.status(now_ms),
            "progress": self.progress(now_ms),
            "created_at": time(self.created_ms),
            "poll_url": self.poll_url,
        }
        if self.started_ms is not None and now_ms >= self.started_ms:
            shown["started_at"] = time(self.started_ms)
        if now_ms >= self.completed_ms:
            shown["completed_at"] = time(self.completed_ms)
            shown |= self.error
            # Before its outputs appear, a run shows an empty list of them or none.
            if self.succeeds and (now_ms >= self.outputs_ms or self.draws.shows_zeros):
                outputs = self.outputs if now_ms >= self.outputs_ms else ()
                shown["outputs"] = [output.shown(read) for output in outputs]
        elif self.draws.shows_zeros:
            shown |= {"charged_cost": 0, "completed_at": 0}
        cost = self.bill.shown(now_ms)
        if cost is not None:
            shown["charged_cost"] = cost
        return shown

    def answer_to_start(self, unit: str = "ms") -> dict[str, Any]:
        """The run as the answer to its start shows it.

        Where the run ends early, the answer may already be stale when it leaves.
        """
        stale = "early" in self.faults and not self.draws.answers_end
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
            item["model"] = {"model_id": self.request.model}
        if not with_outputs and item["status"] == "completed":
            item.pop("outputs", None)
            item.pop("charged_cost", None)
        return item

    def record(self, now_ms: int) -> dict[str, Any]:
        """The simulator's own record: the history item in full, and under `end` what reads show
        once nothing changes any more."""
        final_ms = max(self.completed_ms, self.outputs_ms, self.bill.final_ms)
        return self.history_item(now_ms, unit="ms", with_outputs=True) | {
            "run_type": self.request.run_type,
            "ordinal": self.ordinal,
            "callback_url": self.callback_url,
            "faults": sorted(self.faults),
            "colleague": self.colleague,
            "end": self.as_read(max(now_ms, final_ms)),
        }

    def billed(self, now_ms: int) -> dict[str, Any]:
        """The run's true cost: `bill` is the final cost, `shown` what reads show now, `final`
        whether that changes no more, and `priced` whether a cost is ever shown.
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


def digest(*parts: object) -> str:
    """A short identifier that the parts determine: 20 hexadecimal digits."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:20]
