"""What tells the rows of a sheet apart, so that each is started once wherever it stands.

A row is told by what it asks for: the technique, its inputs, and how many equal rows stand before
it. So its key stays the same when other rows are added, taken out or sorted, and in another file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

Input = dict[str, str]
"""One input as FLORA takes it: `id`, `type` and `value`."""

_HEX_DIGITS: Final = 24
"""Enough that no two rows meet by chance; whose inputs differ is compared before anything is
sent."""


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """Which of the times that a row is run: `generation` counts its deliberate reruns, `attempt`
    the fresh starts within one after a run that failed."""

    generation: int = 0
    attempt: int = 0

    def again(self) -> "Turn":
        """The first of the next generation."""
        return Turn(self.generation + 1)

    def retried(self) -> "Turn":
        """The next attempt."""
        return replace(self, attempt=self.attempt + 1)

    def before(self) -> "Turn":
        """The attempt before."""
        return replace(self, attempt=self.attempt - 1)


def canonical(inputs: Iterable[Input]) -> list[Input]:
    """The inputs by id; several values of one input stay in their order."""
    return sorted(inputs, key=lambda one: one["id"])


def row_digests(technique_id: str, rows: Iterable[Sequence[Input]]) -> list[str]:
    """One digest for each row, in order; `technique_id` is the `tech_…` form."""
    seen: Counter[str] = Counter()
    digests = []
    for inputs in rows:
        asked = _digest([technique_id, canonical(inputs)])
        digests.append(_digest([asked, seen[asked]])[:_HEX_DIGITS])
        seen[asked] += 1
    return digests


def row_key(digest: str, turn: Turn) -> str:
    """The idempotency key under which a row is started in that turn."""
    key = f"row-{digest}"
    if turn.generation:
        key += f"-again{turn.generation}"
    if turn.attempt:
        key += f"-retry{turn.attempt}"
    return key


def batch_id(workspace_slot: str, technique_id: str, rows: Iterable[tuple[int, str, Turn]]) -> str:
    """The name of a batch, the same for the same sheet: by its rows' positions and digests.

    A rerun is a batch of its own, another attempt at some rows is not.
    """
    named = [(position, digest, turn.generation) for position, digest, turn in rows]
    return f"bat_{_digest([workspace_slot, technique_id, named])[:16]}"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
