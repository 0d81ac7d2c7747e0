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
`limits`        the numbers
`middleware`    request ids, default headers, error responses, the deadline for reads
`prefix`        the path that a host application mounts this one under
`request`       headers, origin and body of a request
`responses`     JSON, prebuilt and error responses; which error has which status
==============  ====================================================================================
"""
