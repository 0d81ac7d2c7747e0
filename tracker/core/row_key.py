"""Idempotency keys of the rows of a sheet, so that each row is started once.

A row is identified by its technique, its inputs and the number of equal rows before it. Its key
stays the same when other rows are added, removed or sorted, and in another file.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

Input = dict[str, str]
"""One input as FLORA takes it: `id`, `type` and `value`."""

_HEX_DIGITS: Final = 24
"""Enough to rule out accidental collisions; inputs are compared before anything is sent."""

_KEY: Final = re.compile(r"row-([0-9a-f]{24})(?:-again(\d{1,9}))?(?:-retry(\d{1,9}))?", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """Which run of a row: `generation` counts deliberate reruns, `attempt` the retries after
    failures within one generation."""

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
    """The inputs sorted by id; several values of one input keep their order."""
    return sorted(inputs, key=lambda one: one["id"])


def row_digests(technique_id: str, rows: Iterable[Sequence[Input]]) -> list[str]:
    """One digest per row, in order; `technique_id` is the `tech_…` form."""
    seen: Counter[str] = Counter()
    digests = []
    for inputs in rows:
        asked = _digest([technique_id, canonical(inputs)])
        digests.append(_digest([asked, seen[asked]])[:_HEX_DIGITS])
        seen[asked] += 1
    return digests


def row_key(digest: str, turn: Turn) -> str:
    """The idempotency key of a row in that turn."""
    key = f"row-{digest}"
    if turn.generation:
        key += f"-again{turn.generation}"
    if turn.attempt:
        key += f"-retry{turn.attempt}"
    return key


def key_parts(key: str) -> tuple[str, Turn] | None:
    """The digest and turn that `row_key` made the key of; `None` for any other key."""
    found = _KEY.fullmatch(key)
    return found and (found[1], Turn(int(found[2] or 0), int(found[3] or 0)))


def batch_id(workspace_slot: str, technique_id: str, rows: Iterable[tuple[int, str, Turn]]) -> str:
    """The id of a batch: the same for the same positions and digests of rows.

    A rerun is a batch of its own, a retry of some rows is not.
    """
    named = [(position, digest, turn.generation) for position, digest, turn in rows]
    return f"bat_{_digest([workspace_slot, technique_id, named])[:16]}"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
