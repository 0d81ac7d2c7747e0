"""Lists of runs: their pages and cursors, and a history from before the simulator started."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tracker.simulator.catalogue import SimulatedTechnique, load_catalogue
from tracker.simulator.faults import ErrorAnswer
from tracker.simulator.making import make_run
from tracker.simulator.options import Options
from tracker.simulator.runs import RunRequest, RunType, SimulatedRun, digest

RUN_TYPES: Final[tuple[RunType, ...]] = ("technique", "generation")

_DEFAULT_LIMIT: Final = 20
_MAX_LIMIT: Final = 100

_LONGEST_RUN: Final = 2
"""The newest preset run began this many `run_seconds` before the simulator started."""


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

    def run_id(self, index: int) -> str:
        ordinal = self._ordinal(index)
        return f"run_{-ordinal:08x}{digest(self._options.seed, 'preset', ordinal)[:12]}"

    def created_ms(self, index: int) -> int:
        """When the run at an index was created; they are evenly spread."""
        span_ms = int(self._options.history_seconds * 1000)
        return self._begun_ms - (self.count - index) * span_ms // self.count

    def technique(self, index: int) -> SimulatedTechnique:
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


def page_bounds(
    query: Mapping[str, str], count: int, options: Options, now_ms: int
) -> tuple[slice, object]:
    """Which of `count` items `cursor` and `limit` ask for, and the cursor of the next page.

    Raises `ErrorAnswer` where `limit` is not a number from 1 to 100 or the cursor is not ours.
    """
    text = query.get("limit", str(_DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= _MAX_LIMIT):
        raise ErrorAnswer.invalid(("limit", f"must be a number from 1 to {_MAX_LIMIT}"))
    cursor = query.get("cursor")
    start = decode_cursor(cursor, options, now_ms) if cursor else 0
    end = start + int(text)
    return slice(start, end), encode_cursor(end, options, now_ms) if end < count else None


def encode_cursor(offset: int, options: Options, now_ms: int) -> object:
    """The cursor that stands for an offset: as at FLORA, base64url of `{"offset":N}`.

    With `opaque_cursors` the offset is hidden, and the cursor contains its age. Other types are
    the offset itself, or an object that holds it.
    """
    if options.cursor_type != "text":
        return offset if options.cursor_type == "number" else {"offset": offset}
    content = b'{"offset":%d}' % offset
    if options.opaque_cursors:
        opened = json.dumps([offset, now_ms, options.cursor_epoch]).encode()
        content = _masked(opened, options.seed)
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii")


def decode_cursor(cursor: str, options: Options, now_ms: int) -> int:
    """The offset that a cursor stands for.

    Raises `ErrorAnswer` for what `encode_cursor` never made, and for opaque cursors that are too
    old or of another epoch.
    """
    if options.cursor_type == "number" and cursor.isdecimal():
        return int(cursor)
    try:
        content = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        if options.opaque_cursors:
            offset, made_ms, epoch = json.loads(_masked(content, options.seed))
            age = (now_ms - made_ms) / 1000
            valid = epoch == options.cursor_epoch and age <= (options.cursor_seconds or math.inf)
        else:
            offset, valid = json.loads(content)["offset"], True
    except (ValueError, KeyError, TypeError, RecursionError):
        offset, valid = None, False
    if not valid or type(offset) is not int or offset < 0:
        raise ErrorAnswer.invalid(("cursor", "is not a cursor of this list"))
    return offset


def _masked(content: bytes, seed: int) -> bytes:
    """The content made unreadable, or readable again."""
    mask = hashlib.shake_128(b"cursor/%d" % seed).digest(len(content))
    return bytes(a ^ b for a, b in zip(content, mask, strict=True))
