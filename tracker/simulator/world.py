"""The state of one simulated FLORA: techniques, runs, requests and attempts, all in memory.

The world never waits and does no input or output; its clock is an argument.
"""

import asyncio
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tracker.core.clock import Clock, utc_now
from tracker.simulator.catalogue import SimulatedTechnique, load_catalogue, parse_port
from tracker.simulator.faults import ErrorAnswer
from tracker.simulator.options import Options, SimulatedWorkspace
from tracker.simulator.runs import RunRequest, RunType, SimulatedRun, digest, make_run

if TYPE_CHECKING:
    from tracker.simulator.callbacks import CallbackAttempt

_RUN_TYPES: Final[tuple[RunType, ...]] = ("technique", "generation")
_LOGGED_REQUESTS: Final = 100_000

_LONGEST_RUN: Final = 2
"""The newest preset run began this many `run_seconds` before the simulator started."""

_PlannedChange = tuple[float, Mapping[str, object], float | None]
"""When it is due (Unix milliseconds), the new values, and for how many seconds."""


class RequestRecord(NamedTuple):
    """A request to the API: its route, the run that it is about, when it came (Unix milliseconds)
    and what was answered (0: the connection was cut)."""

    route: str
    run_id: str | None
    at_ms: int
    status: int


class World:
    """One simulated FLORA.

    `runs` holds every run that was started, by its identifier, oldest first, with those that were
    `deleted`; `deliveries` every attempt at a callback; `counts` how often each route
    gave each status (0: the connection was cut), and `request_log` the last requests one by one.
    `started_with` holds the idempotency key of each run that was started with one, by the run's
    identifier, and `media_files` the names of the files behind output links (preset runs have
    none). `root` is where this FLORA is reached, without `/api/v1`. `sleep` lets the time of slow
    starts pass.
    """

    def __init__(
        self, options: Options, *, clock: Clock = utc_now, root: str = "http://127.0.0.1:8750"
    ) -> None:
        self.root = root
        self.runs: dict[str, SimulatedRun] = {}
        self.deleted: set[str] = set()
        self.started_with: dict[str, str] = {}
        self.counts: Counter[tuple[str, int]] = Counter()
        self.request_log: deque[RequestRecord] = deque(maxlen=_LOGGED_REQUESTS)
        self.deliveries: list[CallbackAttempt] = []
        self.media_files: set[str] = set()
        self.requests = 0
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self._clock = clock
        self._options = options
        self._changes: list[_PlannedChange] = []
        self._spent = 0.0
        self._presets: dict[RunType, PresetHistory] = {}
        self._listings = 0
        self._begun_ms = self.now_ms()

    @property
    def options(self) -> Options:
        """The present options, with every change that is due by the world's clock."""
        while self._changes and self._changes[0][0] <= self.true_ms():
            due_ms, changes, seconds = self._changes.pop(0)
            before = {name: getattr(self._options, name) for name in changes}
            self._options = self._options.with_changes(changes)
            if seconds is not None:
                self._plan(due_ms + seconds * 1000, before, None)
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        self._options = options

    def change(
        self, changes: Mapping[str, object], *, after: float = 0, seconds: float | None = None
    ) -> None:
        """Changes options after a number of seconds, for `seconds` or for good, by the world's
        clock. Raises `ValueError` as `Options.with_changes` does."""
        self.options.with_changes(changes)
        self._plan(self.true_ms() + after * 1000, changes, seconds)

    def true_ms(self) -> int:
        """The present moment in Unix milliseconds by the world's clock."""
        return int(self._clock().timestamp() * 1000)

    def now_ms(self) -> int:
        """The present moment in Unix milliseconds by FLORA's clock."""
        return self.true_ms() + int(self.options.clock_offset * 1000)

    def workspace_of(self, api_key: str) -> SimulatedWorkspace | None:
        return next((w for w in self.options.workspaces if w.api_key == api_key), None)

    def techniques(self) -> Sequence[SimulatedTechnique]:
        """The whole catalogue, at the prices and with the inputs of this moment."""
        return tuple(map(self._present, load_catalogue().values()))

    def technique(self, reference: str) -> SimulatedTechnique | None:
        """The technique with that identifier or slug as it is at this moment, if there is one."""
        catalogue = load_catalogue()
        found = catalogue.get(reference) or catalogue.get(f"tech_{reference}")
        return found and self._present(found)

    def sample_request(self, technique: str) -> RunRequest:
        """A technique with inputs that it accepts.

        Raises `LookupError` for a technique that is not in the catalogue.
        """
        found = self.technique(technique)
        if found is None:
            raise LookupError(f"there is no technique {technique}")
        return RunRequest(technique=found, inputs=tuple(found.sample_inputs()))

    def start(
        self,
        request: RunRequest,
        *,
        callback_url: str | None = None,
        workspace: SimulatedWorkspace | None = None,
        colleague: bool = False,
    ) -> SimulatedRun:
        """Starts a run; `colleague` marks it as started by another program.

        Raises `ErrorAnswer` (402) where the credits do not suffice.
        """
        options = self.options
        if options.credits is not None and self._spent + request.product.run_cost > options.credits:
            raise ErrorAnswer(402, "insufficient_credits", "The workspace has no credits left.")
        ordinal = len(self.runs) + 1
        run = make_run(
            request,
            options,
            run_id=f"run_{digest(options.seed, 'run', ordinal)}",
            ordinal=ordinal,
            created_ms=self.now_ms(),
            root=self.root,
            workspace=workspace or options.workspaces[0],
            callback_url=callback_url,
            colleague=colleague,
        )
        self.runs[run.run_id] = run
        self.media_files |= {
            output.url.rpartition("/")[2] for output in run.outputs if output.type != "text"
        }
        self._spent += run.cost
        return run

    def find(self, run_id: str, *workspaces: SimulatedWorkspace) -> SimulatedRun | None:
        """A run of these workspaces, started or preset; None where there is none, or it was
        removed."""
        run = self.runs.get(run_id)
        for run_type in () if run is not None else _RUN_TYPES:
            preset = self.preset(run_type)
            index = preset.index_of(run_id)
            if index is not None:
                run = preset.run(index)
        if run is None or not _is_of(run.workspace, workspaces):
            return None
        gone = run_id in self.deleted or run.created_ms < self._oldest_ms()
        return None if gone else run

    def history(
        self,
        run_type: RunType,
        *workspaces: SimulatedWorkspace,
        status: str | None = None,
        technique_id: str | None = None,
        project_id: str | None = None,
    ) -> Sequence[SimulatedRun]:
        """The workspaces' runs of one type, newest first, of these the ones with the filters'
        values; a filter of None matches every run."""
        now_ms, oldest_ms = self.now_ms(), self._oldest_ms()

        def matches(run: SimulatedRun) -> bool:
            return (
                project_id in (None, run.workspace.project_id)
                and status in (None, run.status(now_ms))
                and technique_id in (None, run.technique and run.technique.technique_id)
            )

        started = [
            run
            for run in reversed(self.runs.values())
            if run.request.run_type == run_type
            and _is_of(run.workspace, workspaces)
            and run.run_id not in self.deleted
            and run.created_ms >= oldest_ms
            and matches(run)
        ]
        preset = self.preset(run_type)
        if not preset.count or not _is_of(preset.workspace, workspaces):
            return started
        indexes = preset.indexes(since_ms=oldest_ms, technique_id=technique_id)
        if gone := {preset.index_of(run_id) for run_id in self.deleted - self.runs.keys()}:
            indexes = [i for i in indexes if i not in gone]
        if (status, project_id) != (None, None):
            indexes = [i for i in indexes if matches(preset.run(i))]
        return RunListing(started, preset, self._shuffled(indexes))

    def _shuffled(self, indexes: Sequence[int]) -> Sequence[int]:
        """These preset runs; those of one creation time in another order in each listing."""
        if (ties := self.options.history_ties) == 1:
            return indexes
        self._listings += 1
        random = Random(f"{self.options.seed}/ties/{self._listings}")
        groups = [[*group] for _, group in groupby(indexes, key=lambda i: i // ties)]
        return [i for group in groups for i in random.sample(group, len(group))]

    def preset(self, run_type: RunType) -> "PresetHistory":
        """The runs of a type that ended before the simulator started, by its first options."""
        preset, options = self._presets.get(run_type), self.options
        count = options.history if run_type == "technique" else options.history_generations
        if preset is None or preset.count != count:
            preset = PresetHistory(options, run_type, begun_ms=self._begun_ms, root=self.root)
            self._presets[run_type] = preset
        return preset

    def delete(self, run_ids: Iterable[str]) -> None:
        """Deletes runs: reads answer 404, lists leave them out; records keep them."""
        self.deleted.update(run_ids)

    def records(self) -> list[dict[str, Any]]:
        """The true record of every run that was started, oldest first, with its end, also before
        it is reached.

        The shape is a history item's, in milliseconds, with `run_type`, `callback_url`, `faults`,
        `colleague` (whether another program started it), `idempotency_key`, `deleted`, and `end`,
        which is the run as reads show it once nothing changes any more.
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

    def _present(self, technique: SimulatedTechnique) -> SimulatedTechnique:
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

    def _plan(self, due_ms: float, changes: Mapping[str, object], seconds: float | None) -> None:
        insort(self._changes, (due_ms, changes, seconds), key=itemgetter(0))


def _is_of(workspace: SimulatedWorkspace, workspaces: Iterable[SimulatedWorkspace]) -> bool:
    return any(one.workspace_id == workspace.workspace_id for one in workspaces)


class PresetHistory:
    """The ended runs of one type that the first workspace had at `begun_ms` (Unix milliseconds).

    An index of 0 is the oldest run. A run is made when it is read; its identifier holds its index,
    so that it is found without a table.
    """

    def __init__(self, options: Options, run_type: RunType, *, begun_ms: int, root: str) -> None:
        self.count = options.history if run_type == "technique" else options.history_generations
        self.workspace = options.workspaces[0]
        self._options = options
        self._run_type = run_type
        self._begun_ms = begun_ms - int(_LONGEST_RUN * options.run_seconds / options.speed * 1000)
        self._root = root
        self._techniques = tuple(load_catalogue().values())

    def run(self, index: int) -> SimulatedRun:
        """The run at an index from 0 to `count` - 1."""
        if self._run_type == "technique":
            technique = self.technique(index)
            request = RunRequest(technique=technique, inputs=tuple(technique.sample_inputs()))
        else:
            request = RunRequest(generation="image", model="image-standard")
        return make_run(
            request,
            self._options,
            run_id=self.run_id(index),
            ordinal=self._ordinal(index),
            created_ms=self.created_ms(index),
            root=self._root,
            workspace=self.workspace,
        )

    def indexes(self, *, since_ms: float, technique_id: str | None) -> Sequence[int]:
        """The runs created since then, newest first; with a technique, its runs alone."""
        first = bisect_left(range(self.count), since_ms, key=self.created_ms)
        newest_first = range(self.count - 1, first - 1, -1)
        if technique_id is None:
            return newest_first
        if self._run_type == "generation":
            return ()
        return [i for i in newest_first if self.technique(i).technique_id == technique_id]

    def run_id(self, index: int) -> str:
        ordinal = self._ordinal(index)
        return f"run_{-ordinal:08x}{digest(self._options.seed, 'preset', ordinal)[:12]}"

    def created_ms(self, index: int) -> int:
        """When the run at an index was created; they, or groups of them, are evenly spread."""
        span_ms = int(self._options.history_seconds * 1000)
        first = index - index % self._options.history_ties
        return self._begun_ms - (self.count - first) * span_ms // self.count

    def technique(self, index: int) -> SimulatedTechnique:
        return self._techniques[(index * 7 + self._options.seed) % len(self._techniques)]

    def index_of(self, run_id: str) -> int | None:
        """The index of the run with that identifier; None where there is none."""
        try:
            number = int(run_id[4:12], 16)
        except ValueError:
            return None
        index = (number - 1 - _RUN_TYPES.index(self._run_type)) // len(_RUN_TYPES)
        known = 0 <= index < self.count and self.run_id(index) == run_id
        return index if known else None

    def _ordinal(self, index: int) -> int:
        """A number that no other run has: below 0, odd for techniques, even for generations."""
        return -(len(_RUN_TYPES) * index + 1 + _RUN_TYPES.index(self._run_type))


class RunListing(Sequence[SimulatedRun]):
    """Started runs, followed by preset runs, which are made when they are read."""

    def __init__(
        self, started: Sequence[SimulatedRun], preset: PresetHistory, indexes: Sequence[int]
    ) -> None:
        self._started = started
        self._preset = preset
        self._indexes = indexes

    def __len__(self) -> int:
        return len(self._started) + len(self._indexes)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[position] for position in range(*at.indices(len(self)))]
        position = range(len(self))[at]
        started = len(self._started)
        if position < started:
            return self._started[position]
        return self._preset.run(self._indexes[position - started])
