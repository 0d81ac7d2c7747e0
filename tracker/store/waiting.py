"""What waits to be committed, first come, first served: bounded in number and in bytes.

While the database is down senders go on, and a callback may be as big as 256 KiB: what nobody can
keep is refused while there is memory left to refuse it with.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tracker.core.entry import Delivered, Entry, Replayed
from tracker.store.batch import Passed

MAX_BATCH_BYTES: Final = 8 * 1024 * 1024
"""The most bytes of callback bodies in one transaction."""
MAX_WAITING_BYTES: Final = 64 * 1024 * 1024
"""The most bytes of callback bodies that wait."""


@dataclass(slots=True, eq=False)
class Waiting:
    """An entry, and who waits for it until `expires`, by the event loop's clock."""

    entry: Entry
    answer: asyncio.Future[Passed]
    expires: float


class WaitingList:
    """The list. `most` is how many may be on it, `most_bytes` how many bytes of bodies."""

    def __init__(self, *, most: int, most_bytes: int = MAX_WAITING_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._list: deque[Waiting] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._list)

    def has_room(self, entries: Sequence[Entry]) -> bool:
        """Whether these may be added."""
        more = sum(map(_size, entries))
        return len(self._list) + len(entries) <= self._most and (
            self._bytes + more <= self._most_bytes
        )

    def add(self, waiting: Waiting) -> None:
        """Put one at the end."""
        self._list.append(waiting)
        self._bytes += _size(waiting.entry)

    def fills(self, most: int) -> bool:
        """Whether those who wait fill a transaction, of `most` entries or of the most bytes."""
        return len(self._list) >= most or self._bytes >= MAX_BATCH_BYTES

    def take(self, most: int) -> list[Waiting]:
        """Take the first ones off, as many as go into one transaction."""
        taken: list[Waiting] = []
        size = 0
        while self._list and len(taken) < most and size < MAX_BATCH_BYTES:
            if isinstance(self._list[0].entry, Replayed):
                # Alone: among others it would lock deliveries out of their order.
                return taken or [self._pop()]
            waiting = self._pop()
            size += _size(waiting.entry)
            taken.append(waiting)
        return taken

    def take_expired(self, now: float) -> list[Waiting]:
        """Take off those whose time is up: the first ones, because all wait equally long."""
        expired: list[Waiting] = []
        while self._list and self._list[0].expires <= now:
            expired.append(self._pop())
        return expired

    @property
    def first_expires(self) -> float | None:
        """When the first one's time is up; `None` where none waits."""
        return self._list[0].expires if self._list else None

    def _pop(self) -> Waiting:
        waiting = self._list.popleft()
        self._bytes -= _size(waiting.entry)
        return waiting


def _size(entry: Entry) -> int:
    """The bytes of a callback's body; what else is in an entry is small."""
    return len(entry.delivery.body) if isinstance(entry, Delivered) else 0
