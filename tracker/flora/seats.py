"""So many may be at something at a time; whoever wants to waits in one of two lines."""

import asyncio
from collections import deque


class Seats:
    """Some seats, and before them two lines: one for what is fresh, one for everything else.

    Each line is served in its order. Where somebody waits in both, they take turns, so that
    neither keeps the other from going on.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._lines: dict[bool, deque[asyncio.Future[None]]] = {True: deque(), False: deque()}
        self._last_was_fresh = False

    async def take(self, *, fresh: bool) -> None:
        """Wait for a seat, and have it."""
        if self._free > 0:
            self._free -= 1
            return
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines[fresh].append(ticket)
        try:
            await ticket
        except asyncio.CancelledError:
            if not ticket.cancelled():  # the seat was given in the same moment
                self.give_back()
            raise

    def give_back(self) -> None:
        """Leave a seat: whoever is next has it."""
        for each in self._lines.values():
            while each and each[0].cancelled():  # by one who left, and may not have noticed yet
                each.popleft()
        line = self._lines[not self._last_was_fresh] or self._lines[self._last_was_fresh]
        if not line:
            self._free += 1
            return
        self._last_was_fresh = line is self._lines[True]
        line.popleft().set_result(None)
