"""All connections of a server: how many there may be, what they may hold, and who has to go.

Each costs a file, and a process has only so many: where they are used up, nobody is let in any
more, nor is the database reached. Each may also bring bytes that have to be kept until its request
is answered. Both are bounded for all connections together, and beyond that those go that have
waited longest for their client; where it is about memory, the large ones first. A callback comes,
is answered, and hardly waits at all.
"""

from collections.abc import Iterable
from heapq import nsmallest
from operator import attrgetter
from typing import Any, Final, cast

import structlog

from tracker.core.seldom import Seldom
from tracker.web.connection import Connection
from tracker.web.limits import Limits

log = structlog.get_logger(__name__)

_OTHER_FILES: Final = 256
"""For the database, FLORA, and those who are let in before others have gone; half of all files,
where a process may not open twice as many."""
_AT_ONCE: Final = 32
"""So many go together: to look for them costs more than to let them go."""
_SMALL: Final = 8 * 1024
"""Bytes that a connection may always hold: an ordinary callback takes half of it."""


class ConnectionLimit:
    """Keeps connections within `limits`, and within the files that this process may open."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        files = _files(limits.connections)
        self._most = min(limits.connections, max(files - _OTHER_FILES, files // 2))
        self._held = 0
        self._seldom = Seldom()

    def connection(self, **given: Any) -> Connection:
        """A new connection, as uvicorn makes its own."""
        return Connection(limit=self, **given)

    def look_round(self, connections: Iterable[Any], now: float) -> None:
        """Ends those whose clients take too long. `now` is the loop's time."""
        for connection in list(connections):
            connection.look(now)

    def admit(self, newcomer: Connection) -> bool:
        """Makes room for it where there is none; false where everybody is being served."""
        if len(newcomer.connections) <= self._most:
            return True
        gone = nsmallest(_AT_ONCE, _waiting(newcomer), key=attrgetter("since"))
        for connection in gone:
            connection.give_way()
        if count := self._seldom.count("full", now=newcomer.loop.time()):
            log.warning("connections.full", most=self._most, count=count)
        return bool(gone)

    def hold(self, connection: Connection, held: int) -> bool:
        """Count `held` bytes for it, in place of what it held before; false where there is no room
        for them, and nobody who could make some."""
        self._held += held - connection.held
        connection.held = held
        most = self.limits.received_bytes
        if self._held <= most or held <= _SMALL:
            return True
        # Small requests go last: callbacks are, and letting them go makes the least room.
        for other in sorted(_waiting(connection), key=lambda one: (one.held <= _SMALL, one.since)):
            if self._held <= most * 3 // 4:
                break
            if other.held:
                other.give_way()
        if count := self._seldom.count("memory", now=connection.loop.time()):
            log.warning("connections.no_memory", most=most, count=count)
        return self._held <= most


def _waiting(newcomer: Connection) -> list[Connection]:
    """All others whose clients are waited for."""
    everybody = cast(set[Connection], newcomer.connections)
    return [one for one in everybody if one is not newcomer and one.is_waiting]


def _files(wanted: int) -> int:
    """How many files this process may open, after it asked for enough to serve `wanted`."""
    try:
        import resource  # noqa: PLC0415  (not on Windows, where files have no such bound)
    except ImportError:
        return wanted + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return enough
    allowed = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
