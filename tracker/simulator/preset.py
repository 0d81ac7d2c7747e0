"""A history that was there before the beginning: each of its runs is made when it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, overload

from tracker.simulator.catalogue import Technique, load_catalogue
from tracker.simulator.fate import digest, fate_of
from tracker.simulator.making import generation_order, make_run, technique_order
from tracker.simulator.options import Options
from tracker.simulator.runs import SimulatedRun

RunType = Literal["technique", "generation"]

RUN_TYPES: Final[tuple[RunType, ...]] = ("technique", "generation")
"""The types of runs."""

_LONGEST: Final = 2
"""The newest of these runs began this many `run_seconds` before the beginning."""


class PresetHistory:
    """The ended runs of one type that the first workspace had at `begun_ms` (Unix milliseconds).

    An index of 0 is the oldest run. A run's identifier holds its index, so that it is found
    without a table.
    """

    def __init__(self, options: Options, run_type: RunType, *, begun_ms: int, root: str) -> None:
        self.count = options.history if run_type == "technique" else options.history_generations
        self.workspace = options.workspaces[0]
        self._options = options
        self._run_type = run_type
        self._begun_ms = begun_ms - int(_LONGEST * options.run_seconds / options.speed * 1000)
        self._root = root
        self._techniques = tuple(load_catalogue().values())

    def run(self, index: int) -> SimulatedRun:
        """The run at an index from 0 to `count` - 1."""
        options = self._options
        if self._run_type == "technique":
            technique = self.technique(index)
            order = technique_order(technique, tuple(technique.sample_inputs()))
        else:
            order = generation_order("image", "image-standard")
        fate = fate_of(options.seed, self._ordinal(index))
        return make_run(
            order,
            options,
            replace(fate, run_id=self.run_id(index)),
            ordinal=self._ordinal(index),
            created_ms=self.created_ms(index),
            root=self._root,
            workspace=self.workspace,
        )

    def run_id(self, index: int) -> str:
        """The identifier of the run at an index."""
        ordinal = self._ordinal(index)
        return f"run_{-ordinal:08x}{digest(self._options.seed, 'preset', ordinal)[:12]}"

    def created_ms(self, index: int) -> int:
        """When the run at an index was created; they are evenly spread."""
        span_ms = int(self._options.history_seconds * 1000)
        return self._begun_ms - (self.count - index) * span_ms // self.count

    def technique(self, index: int) -> Technique:
        """The technique of the run at an index."""
        return self._techniques[(index * 7 + self._options.seed) % len(self._techniques)]

    def index_of(self, run_id: str) -> int | None:
        """The index of the run with that identifier; None where there is none."""
        try:
            number = int(run_id[4:12], 16)
        except ValueError:
            return None
        index = (number - 1 - RUN_TYPES.index(self._run_type)) // len(RUN_TYPES)
        known = 0 <= index < self.count and self.run_id(index) == run_id
        return index if known else None

    def _ordinal(self, index: int) -> int:
        """A number that no other run has: below 0, odd for techniques, even for generations."""
        return -(len(RUN_TYPES) * index + 1 + RUN_TYPES.index(self._run_type))


class Listing(Sequence[SimulatedRun]):
    """Runs that exist, followed by preset ones that are made only where they are read."""

    def __init__(
        self,
        live: Sequence[SimulatedRun],
        indexes: Sequence[int],
        make: Callable[[int], SimulatedRun],
    ) -> None:
        self._live = live
        self._indexes = indexes
        self._make = make

    def __len__(self) -> int:
        return len(self._live) + len(self._indexes)

    def __iter__(self) -> Iterator[SimulatedRun]:
        yield from self._live
        yield from map(self._make, self._indexes)

    @overload
    def __getitem__(self, at: int) -> SimulatedRun: ...
    @overload
    def __getitem__(self, at: slice) -> list[SimulatedRun]: ...
    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[position] for position in range(*at.indices(len(self)))]
        position = range(len(self))[at]
        live = len(self._live)
        if position < live:
            return self._live[position]
        return self._make(self._indexes[position - live])
