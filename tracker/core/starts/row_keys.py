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

_ROW: Final = re.compile(r"row-([0-9a-f]{24})(?:-again(\d{1,9}))?(?:-retry(\d{1,9}))?", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class RunNumber:
    """Which run of a row: `generation` counts deliberate reruns, `attempt` the retries after
    failures within one generation."""

    generation: int = 0
    attempt: int = 0

    def again(self) -> "RunNumber":
        """The first of the next generation."""
        return RunNumber(self.generation + 1)

    def retried(self) -> "RunNumber":
        return replace(self, attempt=self.attempt + 1)

    def before(self) -> "RunNumber":
        return replace(self, attempt=self.attempt - 1)


def canonical(inputs: Iterable[Input]) -> list[Input]:
    """The inputs sorted by id; several values of one input keep their order."""
    return sorted(inputs, key=lambda one: one["id"])


def row_digests(technique_id: str, rows: Iterable[Sequence[Input]]) -> list[str]:
    """One digest per row, in order; `technique_id` is the `tech_…` form."""
    seen: Counter[str] = Counter()
    digests = []
    for inputs in rows:
        asked = digest_of([technique_id, canonical(inputs)])
        digests.append(digest_of([asked, seen[asked]])[:_HEX_DIGITS])
        seen[asked] += 1
    return digests


def row_key(digest: str, run_number: RunNumber) -> str:
    """The idempotency key of that run of a row."""
    key = f"row-{digest}"
    if run_number.generation:
        key += f"-again{run_number.generation}"
    if run_number.attempt:
        key += f"-retry{run_number.attempt}"
    return key


def key_parts(key: str) -> tuple[str, RunNumber] | None:
    """The digest and run number that `row_key` made the key of; `None` for any other key."""
    found = _ROW.fullmatch(key)
    return found and (found[1], RunNumber(int(found[2] or 0), int(found[3] or 0)))


def batch_id(
    workspace_id: str, technique_id: str, rows: Iterable[tuple[int, str, RunNumber]]
) -> str:
    """The id of a batch: the same for the same positions and digests of rows.

    A rerun is a batch of its own, a retry of some rows is not.
    """
    named = [(position, digest, run_number.generation) for position, digest, run_number in rows]
    return f"bat_{digest_of([workspace_id, technique_id, named])[:16]}"


def digest_of(value: Any) -> str:
    """A digest of a JSON value, in hex: equal for equal values, whatever the order of fields."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
