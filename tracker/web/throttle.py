"""How often something may be tried: one bucket of tries for each key, filled again with time."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MOST_KEYS: Final = 10_000
"""So many keys are remembered; whoever would fill them up only makes room for others."""


class Throttle:
    """`burst` tries at once, and then one every `refill` seconds, for each key."""

    def __init__(
        self, *, burst: int, refill: float, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._refill = refill
        self._monotonic = monotonic
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when the bucket is full again

    def take(self, key: str) -> float:
        """Take a try: 0 where there was one, else the seconds until there is."""
        now = self._monotonic()
        full_at = max(self._full_at.get(key, now), now) + self._refill
        wait = full_at - now - self._burst * self._refill
        if wait > 1e-9:
            return wait
        self._keep(key, full_at)
        return 0.0

    def give_back(self, key: str) -> None:
        """The last try of this key does not count."""
        if key in self._full_at:
            self._full_at[key] -= self._refill

    def _keep(self, key: str, full_at: float) -> None:
        self._full_at[key] = full_at
        self._full_at.move_to_end(key)
        if len(self._full_at) > MOST_KEYS:
            self._full_at.popitem(last=False)
