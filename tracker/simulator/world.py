"""Everything that exists in one simulated FLORA: techniques, runs and what was done with them.

All of it is in memory. The world never waits and never talks to anybody; the clock is given.
"""

import heapq
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from tracker.core.clock import Clock, utc_now
from tracker.simulator.catalogue import Technique, find_technique, load_catalogue, parse_port
from tracker.simulator.delivery import Attempt
from tracker.simulator.fate import fate_of
from tracker.simulator.idempotency import KeyStore
from tracker.simulator.making import Order, generation_order, make_run, technique_order
from tracker.simulator.media import EXTENSIONS
from tracker.simulator.options import Options, Workspace
from tracker.simulator.preset import RUN_TYPES, Listing, PresetHistory, RunType
from tracker.simulator.problems import Problem
from tracker.simulator.runs import SimulatedRun

_REMEMBERED: Final = 100_000

Change = tuple[float, int, Mapping[str, object], float | None]
"""When it is due (Unix milliseconds), its number, the new values, and for how many seconds."""


class Asked(NamedTuple):
    """A request to the API: its route, the run that it is about, when it came (Unix milliseconds)
    and what was answered (0: the connection was cut)."""

    route: str
    run_id: str | None
    at_ms: int
    status: int


class World:
    """One simulated FLORA.

    `runs` holds every run that was started, by its identifier, oldest first, with those that were
    `deleted`; `deliveries` what became of each attempt at a callback; `counts` how often each route
    gave each status (0: the connection was cut), and `asked` the last requests one by one.
    `started_with` holds the idempotency key of each run that was started with one, by the run's
    identifier. `root` is where this FLORA is reached, without `/api/v1`.
    """

    def __init__(
        self, options: Options, *, clock: Clock = utc_now, root: str = "http://127.0.0.1:8750"
    ) -> None:
        self.root = root
        self.runs: dict[str, SimulatedRun] = {}
        self.deleted: set[str] = set()
        self.started_with: dict[str, str] = {}
        self.counts: Counter[tuple[str, int]] = Counter()
        self.asked: deque[Asked] = deque(maxlen=_REMEMBERED)
        self.deliveries: list[Attempt] = []
        self.keys = KeyStore()
        self.requests = 0
        self._clock = clock
        self._options = options
        self._changes: list[Change] = []
        self._changed = 0
        self._media: dict[str, str] = {}
        self._spent = 0.0
        self._presets: dict[RunType, PresetHistory] = {}
        self._begun_ms = self.now_ms()
        for after, changes in options.later:
            self.change(changes, after=after)

    @property
    def options(self) -> Options:
        """The options that hold now, with every change that is due by the world's clock."""
        while self._changes and self._changes[0][0] <= self.true_ms():
            due_ms, _, changes, seconds = heapq.heappop(self._changes)
            before = {name: getattr(self._options, name) for name in changes}
            self._options = self._options.with_changes(changes)
            if seconds is not None:
                self._schedule(due_ms + seconds * 1000, before, None)
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        self._options = options

    def change(
        self, changes: Mapping[str, object], *, after: float = 0, seconds: float | None = None
    ) -> None:
        """Changes options `after` so many seconds, for `seconds` or for good, by the world's clock.

        Raises `ValueError` as `Options.with_changes` does.
        """
        self.options.with_changes(changes)
        self._schedule(self.true_ms() + after * 1000, changes, seconds)

    def true_ms(self) -> int:
        """The present moment in Unix milliseconds by the clock that is given."""
        return int(self._clock().timestamp() * 1000)

    def now_ms(self) -> int:
        """The present moment in Unix milliseconds by FLORA's clock."""
        return self.true_ms() + int(self.options.clock_offset * 1000)

    def next_request(self) -> int:
        """The number of a request that comes in now, from 1."""
        self.requests += 1
        return self.requests

    def workspace_of(self, api_key: str) -> Workspace | None:
        """The workspace that a key belongs to."""
        return next((w for w in self.options.workspaces if w.api_key == api_key), None)

    def techniques(self) -> Sequence[Technique]:
        """The whole catalogue, at the prices and with the inputs of this moment."""
        return tuple(map(self._present, load_catalogue().values()))

    def technique(self, reference: str) -> Technique | None:
        """The technique with that identifier or slug as it is at this moment, if there is one."""
        found = find_technique(reference)
        return found and self._present(found)

    def start_technique(
        self,
        technique: Technique,
        inputs: Sequence[Mapping[str, Any]],
        *,
        callback_url: str | None = None,
        workspace: Workspace | None = None,
        unreachable: bool = False,
        colleague: bool = False,
    ) -> SimulatedRun:
        """Starts a run. Raises `Problem` (402) where the credits do not suffice."""
        order = technique_order(technique, tuple(inputs), unreachable=unreachable)
        return self._start(order, callback_url, workspace, colleague=colleague)

    def start_generation(
        self,
        kind: str,
        model: str,
        *,
        callback_url: str | None = None,
        workspace: Workspace | None = None,
    ) -> SimulatedRun:
        """Starts a generation. Raises `Problem` (402) where the credits do not suffice."""
        return self._start(generation_order(kind, model), callback_url, workspace)

    def start_colleague(self, technique: str, workspace: Workspace | None = None) -> SimulatedRun:
        """Starts a technique as another program with the workspace's key would, without callback.

        Raises `LookupError` for a technique that is not in the catalogue, `Problem` (402) where the
        credits do not suffice.
        """
        found = self.technique(technique)
        if found is None:
            raise LookupError(f"there is no technique {technique}")
        inputs = found.sample_inputs()
        return self.start_technique(found, inputs, workspace=workspace, colleague=True)

    def find(self, run_id: str, workspace: Workspace) -> SimulatedRun | None:
        """A workspace's run, started or preset; None where FLORA does not know it (any more)."""
        run = self.runs.get(run_id)
        for run_type in () if run is not None else RUN_TYPES:
            preset = self.preset(run_type)
            index = preset.index_of(run_id)
            if index is not None:
                run = preset.run(index)
        if run is None or run.workspace.workspace_id != workspace.workspace_id:
            return None
        gone = run_id in self.deleted or run.created_ms < self._oldest_ms()
        return None if gone else run

    def history(
        self,
        run_type: RunType,
        workspace: Workspace,
        *,
        status: str | None = None,
        technique_id: str | None = None,
        project_id: str | None = None,
    ) -> Sequence[SimulatedRun]:
        """A workspace's runs of one type, newest first; those with the given values where given."""
        now_ms, oldest_ms = self.now_ms(), self._oldest_ms()

        def wanted(run: SimulatedRun) -> bool:
            return (
                project_id in (None, run.workspace.project_id)
                and status in (None, run.status(now_ms))
                and technique_id in (None, run.technique and run.technique.technique_id)
            )

        live = [
            run
            for run in reversed(self.runs.values())
            if run.run_type == run_type
            and run.workspace.workspace_id == workspace.workspace_id
            and run.run_id not in self.deleted
            and run.created_ms >= oldest_ms
            and wanted(run)
        ]
        preset = self.preset(run_type)
        if not preset.count or preset.workspace.workspace_id != workspace.workspace_id:
            return live
        first = bisect_left(range(preset.count), oldest_ms, key=preset.created_ms)
        indexes: Sequence[int] = range(preset.count - 1, first - 1, -1)
        gone = {preset.index_of(run_id) for run_id in self.deleted - self.runs.keys()}
        if gone:
            indexes = [i for i in indexes if i not in gone]
        if technique_id is not None and run_type == "technique":
            indexes = [i for i in indexes if preset.technique(i).technique_id == technique_id]
        if (status, project_id) != (None, None) or (technique_id and run_type == "generation"):
            indexes = [i for i in indexes if wanted(preset.run(i))]
        return Listing(live, indexes, preset.run)

    def preset(self, run_type: RunType) -> PresetHistory:
        """The runs of a type that ended before the beginning, as the options then made them."""
        preset, options = self._presets.get(run_type), self.options
        count = options.history if run_type == "technique" else options.history_generations
        if preset is None or preset.count != count:
            preset = PresetHistory(options, run_type, begun_ms=self._begun_ms, root=self.root)
            self._presets[run_type] = preset
        return preset

    def delete(self, run_ids: Iterable[str]) -> None:
        """Lets FLORA forget runs: reads answer 404, lists leave them out; records keep them."""
        self.deleted.update(run_ids)

    def records(self) -> list[dict[str, Any]]:
        """The true record of every run that was started, oldest first, with its end even where
        that is yet to come.

        The shape is a history item's, in milliseconds, with `run_type`, `callback_url`, `faults`,
        `colleague` (whether another program started it), `idempotency_key`, `deleted`, and `end`,
        which is the run as a read of it will show it once nothing changes any more.
        """
        now_ms = self.now_ms()
        return [
            run.record(now_ms)
            | {
                "idempotency_key": self.started_with.get(run.run_id),
                "deleted": run.run_id in self.deleted,
            }
            for run in self.runs.values()
        ]

    def bills(self) -> list[dict[str, Any]]:
        """The truth about the cost of every run that was started, oldest first; in USD."""
        now_ms = self.now_ms()
        return [run.billed(now_ms) for run in self.runs.values()]

    def media_extension(self, output_id: str) -> str | None:
        """The file name extension of an output that is a link; None where there is none.

        Preset runs have no files.
        """
        return self._media.get(output_id)

    def _start(
        self,
        order: Order,
        callback_url: str | None,
        workspace: Workspace | None,
        *,
        colleague: bool = False,
    ) -> SimulatedRun:
        options = self.options
        if options.credits is not None and self._spent + order.price > options.credits:
            raise Problem(402, "insufficient_credits", "The workspace has no credits left.")
        ordinal = len(self.runs) + 1
        run = make_run(
            order,
            options,
            fate_of(options.seed, ordinal),
            ordinal=ordinal,
            created_ms=self.now_ms(),
            root=self.root,
            workspace=workspace or options.workspaces[0],
            callback_url=callback_url,
            colleague=colleague,
        )
        self.runs[run.run_id] = run
        self._media |= {
            output.output_id: EXTENSIONS[output.type]
            for output in run.outputs
            if output.type != "text"
        }
        self._spent += run.cost
        return run

    def _present(self, technique: Technique) -> Technique:
        options, slug = self.options, technique.slug
        price = options.prices.get(slug, options.prices.get(technique.technique_id))
        if price is None:
            price = round(technique.run_cost * options.price_factor, 6)
        port = options.new_inputs.get(slug, options.new_inputs.get(technique.technique_id))
        inputs = technique.inputs if port is None else (*technique.inputs, parse_port(port))
        if (price, inputs) == (technique.run_cost, technique.inputs):
            return technique
        return replace(technique, run_cost=price, inputs=inputs)

    def _oldest_ms(self) -> float:
        retention = self.options.retention
        return 0 if retention is None else self.now_ms() - retention * 1000

    def _schedule(
        self, due_ms: float, changes: Mapping[str, object], seconds: float | None
    ) -> None:
        self._changed += 1
        heapq.heappush(self._changes, (due_ms, self._changed, changes, seconds))
