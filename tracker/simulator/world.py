"""Everything that exists in one simulated FLORA: techniques, runs and what was done with them.

All of it is in memory. The world never waits and never talks to anybody; the clock is given.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from tracker.core.clock import Clock, utc_now
from tracker.simulator.catalogue import Port, Technique, load_catalogue
from tracker.simulator.delivery import Attempt
from tracker.simulator.fate import FAILURES, Fate, digest, fate_of
from tracker.simulator.idempotency import KeyStore
from tracker.simulator.media import EXTENSIONS
from tracker.simulator.options import CALLBACK_FAULTS, Options, Workspace
from tracker.simulator.problems import Problem
from tracker.simulator.runs import Output, SimulatedRun

_GENERATIONS: Final = {
    "image": ("imageUrl", 0.04),
    "video": ("videoUrl", 0.5),
    "audio": ("audioUrl", 0.06),
    "text": ("text", 0.01),
}
"""Output type and cost in USD for each type of generation."""

_UNREACHABLE: Final = next(error for error in FAILURES if error[0] == "input_unreachable")
_REMEMBERED: Final = 100_000


class Asked(NamedTuple):
    """A request to the API: its route, the run that it is about, when it came (Unix milliseconds)
    and what was answered (0: the connection was cut)."""

    route: str
    run_id: str | None
    at_ms: int
    status: int


class World:
    """One simulated FLORA.

    `runs` holds every run by its identifier, oldest first; `deliveries` what became of each attempt
    at a callback; `counts` how often each route gave each status (0: the connection was cut), and
    `asked` the last requests one by one.
    `root` is where this FLORA is reached, without `/api/v1`.
    """

    def __init__(
        self, options: Options, *, clock: Clock = utc_now, root: str = "http://127.0.0.1:8750"
    ) -> None:
        self.options = options
        self.root = root
        self.runs: dict[str, SimulatedRun] = {}
        self.counts: Counter[tuple[str, int]] = Counter()
        self.asked: deque[Asked] = deque(maxlen=_REMEMBERED)
        self.deliveries: list[Attempt] = []
        self.keys = KeyStore(options.idempotency)
        self.requests = 0
        self._clock = clock
        self._media: dict[str, str] = {}
        self._spent = 0.0

    def now_ms(self) -> int:
        """The present moment in Unix milliseconds."""
        return int(self._clock().timestamp() * 1000)

    def next_request(self) -> int:
        """The number of a request that comes in now, from 1."""
        self.requests += 1
        return self.requests

    def workspace_of(self, api_key: str) -> Workspace | None:
        """The workspace that a key belongs to."""
        return next((w for w in self.options.workspaces if w.api_key == api_key), None)

    def techniques(self) -> Sequence[Technique]:
        """The whole catalogue."""
        return tuple(load_catalogue().values())

    def start_technique(
        self,
        technique: Technique,
        inputs: Sequence[Mapping[str, Any]],
        *,
        callback_url: str | None = None,
        workspace: Workspace | None = None,
        unreachable: bool = False,
    ) -> SimulatedRun:
        """Starts a run. Raises `Problem` (402) where the credits do not suffice."""
        return self._start(
            "technique",
            ports=technique.outputs,
            cost=technique.run_cost,
            text=lambda port: f"{technique.name}: {port.id}\n“Made by the simulator” ✓",
            technique=technique,
            inputs=tuple(inputs),
            callback_url=callback_url,
            workspace=workspace,
            unreachable=unreachable,
        )

    def start_generation(
        self,
        kind: str,
        model: str,
        *,
        callback_url: str | None = None,
        workspace: Workspace | None = None,
    ) -> SimulatedRun:
        """Starts a generation. Raises `Problem` (402) where the credits do not suffice."""
        output_type, cost = _GENERATIONS[kind]
        return self._start(
            "generation",
            ports=(Port(kind, output_type),),
            cost=cost,
            text=lambda _: f"{model}\n“Made by the simulator” ✓",
            model=model,
            callback_url=callback_url,
            workspace=workspace,
        )

    def history(
        self, run_type: Literal["technique", "generation"], workspace: Workspace
    ) -> list[SimulatedRun]:
        """A workspace's runs of one type, newest first."""
        return [
            run
            for run in reversed(self.runs.values())
            if run.run_type == run_type and run.workspace == workspace
        ]

    def records(self) -> list[dict[str, Any]]:
        """The true record of every run, oldest first, with its end even where that is yet to come.

        The shape is a history item's, in milliseconds, with `run_type`, `callback_url`, `faults`
        and `end`, which is the run as a read of it will show it once it has ended.
        """
        now_ms = self.now_ms()
        return [run.record(now_ms) for run in self.runs.values()]

    def media_extension(self, output_id: str) -> str | None:
        """The file name extension of an output that is a link; None where there is none."""
        return self._media.get(output_id)

    def _start(
        self,
        run_type: Literal["technique", "generation"],
        *,
        ports: Sequence[Port],
        cost: float,
        text: Callable[[Port], str],
        technique: Technique | None = None,
        model: str | None = None,
        inputs: tuple[Mapping[str, Any], ...] = (),
        callback_url: str | None = None,
        workspace: Workspace | None = None,
        unreachable: bool = False,
    ) -> SimulatedRun:
        options = self.options
        if options.credits is not None and self._spent + cost > options.credits:
            raise Problem(402, "insufficient_credits", "The workspace has no credits left.")
        ordinal = len(self.runs) + 1
        fate = fate_of(options.seed, ordinal)
        error_code: str | None = None
        error_message: str | None = None
        if unreachable:
            error_code, error_message = _UNREACHABLE
        elif fate.fails < options.failures:
            error_code, error_message = fate.error_code, fate.error_message
        faults = self._callback_faults(fate) if callback_url is not None else frozenset[str]()
        created_ms, started_ms, completed_ms = self._times(fate, early="early" in faults)
        path = f"techniques/{technique.technique_id}/runs" if technique is not None else "runs"
        run = SimulatedRun(
            fate=fate,
            ordinal=ordinal,
            run_type=run_type,
            workspace=workspace or options.workspaces[0],
            technique=technique,
            model=model,
            inputs=inputs,
            callback_url=callback_url,
            faults=faults,
            created_ms=created_ms,
            # What cannot be fetched fails the run before it is started.
            started_ms=None if error_code == _UNREACHABLE[0] else started_ms,
            completed_ms=completed_ms,
            error_code=error_code,
            error_message=error_message,
            cost=cost if error_code is None else 0,
            outputs=tuple(
                self._output(fate.run_id, position, port, text)
                for position, port in enumerate(ports)
                if error_code is None
            ),
            poll_url=f"{self.root}/api/v1/{path}/{fate.run_id}",
        )
        self.runs[run.run_id] = run
        self._spent += run.cost
        return run

    def _times(self, fate: Fate, *, early: bool) -> tuple[int, int, int]:
        created_ms = self.now_ms()
        if early:
            return created_ms, created_ms, created_ms
        duration = self.options.run_seconds * fate.spread / self.options.speed * 1000
        started_ms = created_ms + int(duration * fate.pending_share)
        return created_ms, started_ms, created_ms + int(duration)

    def _callback_faults(self, fate: Fate) -> frozenset[str]:
        rates = self.options.rates
        struck = {name for name in CALLBACK_FAULTS if getattr(fate, name) < rates[name]}
        if "drop" in struck:
            # What never comes is neither early, late nor doubled; a forgery comes all the same.
            struck &= {"drop", "bad_signature"}
        elif "early" in struck:
            struck -= {"late", "reorder"}
        return frozenset(struck)

    def _output(
        self, run_id: str, position: int, port: Port, text: Callable[[Port], str]
    ) -> Output:
        output_id = digest(run_id, "output", position)
        if port.type == "text":
            return Output(output_id, port.type, text(port))
        extension = EXTENSIONS[port.type]
        self._media[output_id] = extension
        return Output(output_id, port.type, f"{self.root}/media/{output_id}.{extension}")
