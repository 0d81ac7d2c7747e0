"""The HTTP server, and what it guards against.

Anyone who reaches the port can open connections and send bytes. Whatever depends on a client
therefore ends by itself, is bounded, or is answered before it is read:

=================================  =================================================================
a client that                      is stopped by
=================================  =================================================================
opens connections and is silent    `Limits.idle_seconds`; beyond `connections` those that have
                                   waited longest for their client are closed
sends a head slowly, or without    `head_seconds` (408), `head_bytes` and `headers` (431)
end
sends a body slowly, or without    a deadline (408) and a size limit (413), checked against what
end                                arrives, whatever `Content-Length` says
sends many requests without        `requests_ahead`; its further input is not read
waiting for responses
sends much on many connections     `received_bytes` for all together (503); large requests go first
does not read its responses        a small write buffer, TCP_USER_TIMEOUT (`unread_seconds`), and
                                   eviction when its place or memory is needed
hides a header behind a body       trailers are dropped (RFC 9110, 6.5.1)
asks for another protocol          the offer is ignored (RFC 9110, 7.8); CONNECT is refused
guesses tokens                     `Throttle` in `tracker.web.auth`
=================================  =================================================================

==============  ====================================================================================
module          contents
==============  ====================================================================================
`server`        binds sockets, runs the application, stops in order
`connection`    one connection and the limits on it; all connections and their limits together
`request`       headers, origin and body of a request, and the path below which it is served
`responses`     JSON, prebuilt and error responses; which error has which status
==============  ====================================================================================
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every limit on clients. Sizes are bytes, times are seconds.

    FLORA waits 10 s for the response to a callback, so 8 s limit all of it: a body that has not
    arrived by then is a 408, a commit a 503.
    """

    connections: int = 4000
    """Open at the same time; fewer if the process may not open as many files."""
    idle_seconds: float = 75.0
    """How long an idle connection stays: longer than a proxy in front keeps one for reuse."""
    unread_seconds: int = 15
    """How long a client may acknowledge nothing of what it was sent, where the system can tell."""
    head_seconds: float = 10.0
    head_bytes: int = 32 * 1024
    headers: int = 100
    """Per request."""
    requests_ahead: int = 8
    """Requests sent on one connection without waiting for a response."""
    received_bytes: int = 16 * 1024 * 1024
    """Heads and bodies, of all connections together, that are being received or wait for their
    response. A few kilobytes are always accepted: more than FLORA's own callbacks have."""
    callback_bytes: int = 256 * 1024
    callback_seconds: float = 8.0
    answer_seconds: float = 6.5
    """For reads, until the response starts. If the database stops answering, it takes half a second
    more to give up the connection."""
    api_bytes: int = 1024 * 1024
    batch_bytes: int = 8 * 1024 * 1024
    api_read_seconds: float = 10.0
    ready_seconds: float = 5.0
    wrong_token_seconds: float = 6.0
    """Between two wrong tokens from one address, after the first ten; sooner ones are a 429."""
    csv_runs: int = 50_000
    """Runs in one CSV of the list."""
    csv_page: int = 1_000
    """Runs of it that are read at a time."""
    archives: int = 2
    """ZIP files of outputs that are sent at the same time."""
    linger_bytes: int = 4 * 1024 * 1024
    linger_seconds: float = 2.0
    """How much of a refused body is still read and discarded: closing a connection on a client that
    is still sending loses the response."""
    stream_readers: int = 100
    """Readers of `/api/stream` in one process."""
    stream_queue: int = 1000
    """Changes queued for one reader; beyond that it is disconnected."""
    stream_heartbeat: float = 15.0
    stream_seconds: float = 3600.0
    """After this long a reader has to reconnect, and to authenticate again."""
