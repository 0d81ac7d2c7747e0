"""How much of a client's bytes and time is taken: every bound of the HTTP side in one place."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes are bytes, times are seconds.

    FLORA waits 10 s for the answer to a callback, so 8 s bound all of it: a body that has not come
    by then is a 408, a commit a 503.
    """

    connections: int = 4000
    """So many may be open; fewer where the process may not open as many files."""
    idle_seconds: float = 75.0
    """How long an idle connection stays: longer than a proxy in front keeps one for reuse."""
    head_seconds: float = 10.0
    head_bytes: int = 32 * 1024
    headers: int = 100
    """In one request."""
    requests_ahead: int = 8
    """So many may be sent without waiting for an answer."""
    received_bytes: int = 16 * 1024 * 1024
    """For all that is being received or waits to be answered, heads and bodies of all connections
    together. A few kilobytes are always taken, which is more than FLORA's own callbacks have."""
    callback_bytes: int = 256 * 1024
    callback_seconds: float = 8.0
    answer_seconds: float = 6.5
    """For what is only looked at, until the answer begins. Where the database has fallen silent it
    takes two more to let go of the connection."""
    api_bytes: int = 1024 * 1024
    api_read_seconds: float = 10.0
    ready_seconds: float = 5.0
    linger_bytes: int = 4 * 1024 * 1024
    linger_seconds: float = 2.0
    """What is still read, and thrown away, of a body that is refused: a connection that is closed
    on a client which is still sending loses the answer."""
    stream_readers: int = 100
    """So many may follow `/api/stream` of one process."""
    stream_room: int = 1000
    """So many changes may wait for one of them; then it is dropped."""
    stream_heartbeat: float = 15.0
    stream_seconds: float = 3600.0
    """After so long a reader has to connect again, and to show again that it may."""
