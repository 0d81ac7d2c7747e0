"""Idempotency keys, in either of the two ways that FLORA's sources describe."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tracker.simulator.options import Options
from tracker.simulator.problems import Problem

REPLAY_MS: Final = 24 * 3600 * 1000
CONFLICT_MS: Final = 2 * 3600 * 1000

UsedKey = tuple[str, str]
"""A workspace's identifier and the key."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered to a start: the status and the body's bytes."""

    status: int
    body: bytes


class KeyStore:
    """The keys that were used, each with its workspace.

    In the mode "replay" a key gives its original answer again for 24 hours; in "conflict" a second
    use is refused for two.
    """

    def __init__(self) -> None:
        self._used: dict[UsedKey, tuple[int, str, Answer]] = {}
        self._busy: set[UsedKey] = set()

    def recall(
        self, key: UsedKey, fingerprint: str, options: Options, now_ms: int
    ) -> Answer | None:
        """The answer to give again, or None where the key is new or forgotten.

        Raises `Problem`: 422 where the key came with another request, 409 in the mode "conflict"
        and where the first request with the key has not finished.
        """
        if key in self._busy:
            raise Problem(409, "conflict", "A request with this idempotency key is in progress.")
        used = self._used.get(key)
        if used is None:
            return None
        used_ms, original, answer = used
        lifetime_ms = REPLAY_MS if options.idempotency == "replay" else CONFLICT_MS
        if options.key_hours is not None:
            lifetime_ms = int(options.key_hours * 3600 * 1000)
        if now_ms - used_ms >= lifetime_ms:
            return None
        if options.idempotency == "conflict":
            raise Problem(
                409, "idempotency_duplicate", "This idempotency key has been used already."
            )
        if fingerprint != original:
            raise Problem(
                422, "idempotency_conflict", "This idempotency key was used with another body."
            )
        return answer

    @contextmanager
    def in_progress(self, key: UsedKey) -> Iterator[None]:
        """While this lasts, another request with the key is refused."""
        self._busy.add(key)
        try:
            yield
        finally:
            self._busy.discard(key)

    def keep(self, key: UsedKey, fingerprint: str, answer: Answer, now_ms: int) -> None:
        """Remembers what was answered to a use of a key."""
        self._used[key] = (now_ms, fingerprint, answer)

    def release(self, key: UsedKey) -> None:
        """Lets a key be used as if it were new."""
        self._used.pop(key, None)


def fingerprint_of(path: str, body: dict[str, Any]) -> str:
    """What makes two requests the same: their path and body, however the body was written."""
    canonical = json.dumps([path, body], sort_keys=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
