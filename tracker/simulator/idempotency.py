"""Idempotency keys, in either of the two ways that FLORA's sources describe."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, Literal

from tracker.simulator.problems import Problem

REPLAY_MS: Final = 24 * 3600 * 1000
CONFLICT_MS: Final = 2 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered to a start: the status and the body's bytes."""

    status: int
    body: bytes


class KeyStore:
    """The keys that were used, for each workspace.

    In the mode "replay" a key gives its original answer again for 24 hours; in "conflict" a second
    use is refused for two.
    """

    def __init__(self, mode: Literal["replay", "conflict"]) -> None:
        self._mode = mode
        self._used: dict[tuple[str, str], tuple[int, str, Answer]] = {}

    def recall(self, workspace_id: str, key: str, fingerprint: str, now_ms: int) -> Answer | None:
        """The answer to give again, or None where the key is new or forgotten.

        Raises `Problem`: 422 where the key came with another request, 409 in the mode "conflict".
        """
        used = self._used.get((workspace_id, key))
        if used is None:
            return None
        used_ms, original, answer = used
        if now_ms - used_ms >= (REPLAY_MS if self._mode == "replay" else CONFLICT_MS):
            return None
        if self._mode == "conflict":
            raise Problem(
                409, "idempotency_duplicate", "This idempotency key has been used already."
            )
        if fingerprint != original:
            raise Problem(
                422, "idempotency_conflict", "This idempotency key was used with another body."
            )
        return answer

    def keep(
        self, workspace_id: str, key: str, fingerprint: str, answer: Answer, now_ms: int
    ) -> None:
        """Remembers what was answered to the first use of a key."""
        self._used[workspace_id, key] = (now_ms, fingerprint, answer)


def fingerprint_of(path: str, body: dict[str, Any]) -> str:
    """What makes two requests the same: their path and body, however the body was written."""
    canonical = json.dumps([path, body], sort_keys=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
