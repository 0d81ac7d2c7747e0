"""All connections of a server: how many there may be, and who has to go for somebody else.

Each costs a file, and a process has only so many: where they are used up, nobody is let in any
more, nor is the database reached. So there is a bound below that, and above it those go that have
waited longest for their client. A callback comes, is answered, and hardly waits at all.
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


class Crowd:
    """Keeps connections within `limits`, and within the files that this process may open."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        files = _files(limits.connections)
        self._most = min(limits.connections, max(files - _OTHER_FILES, files // 2))
        self._full = Seldom()

    def connection(self, **given: Any) -> Connection:
        """A new connection, as uvicorn makes its own."""
        return Connection(limits=self._limits, admit=self._admit, **given)

    def look_round(self, connections: Iterable[Any], now: float) -> None:
        """Ends those whose clients take too long. `now` is the loop's time."""
        for connection in list(connections):
            connection.look(now)

    def _admit(self, newcomer: Connection) -> bool:
        """Makes room for it where there is none; false where everybody is being served."""
        everybody = cast(set[Connection], newcomer.connections)
        if len(everybody) <= self._most:
            return True
        waiting = (one for one in everybody if one is not newcomer and one.is_waiting)
        gone = nsmallest(_AT_ONCE, waiting, key=attrgetter("since"))
        for connection in gone:
            connection.give_way()
        if count := self._full.count("full", now=newcomer.since):
            log.warning("connections.full", most=self._most, count=count)
        return bool(gone)


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
