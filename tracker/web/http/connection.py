"""One HTTP connection and the limits on its client, and the limits on all connections together.

uvicorn's own protocol waits without limit for a request that has started, and accepts heads of any
size and any number of requests ahead. Here everything that depends on the client ends by itself;
`tracker.web.http` lists the limits. All connections are checked once a second, so that a request
needs no timer.

This builds on internals of uvicorn: `tests/web/test_uvicorn.py` lists them.
"""

import re
from collections.abc import Iterable
from functools import partial
from heapq import nsmallest
from operator import attrgetter
from typing import Any, Final, cast

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from tracker.core.log import LogRateLimit, get_logger
from tracker.web.http import Limits
from tracker.web.http.responses import Fault, Json, Take, unavailable

PARSE_BYTES: Final = 16 * 1024
"""Parsed at a time, so that too much is noticed before it is kept."""
UNSENT_BYTES: Final = 4 * 1024
"""Of responses that a slow client has not taken, before writing is paused."""
SMALL_BYTES: Final = 8 * 1024
"""A connection may always hold this much: twice an ordinary callback."""
_REQUEST_BYTES: Final = 2048
"""Approximate memory of a request, besides its bytes."""
_HEADER_BYTES: Final = 128
"""Approximate memory of each header, besides its bytes."""
_OTHER_FILES: Final = 256
"""File descriptors for the database, FLORA, and clients accepted before others are closed; half of
all, if a process may not open twice as many."""
_EVICTED_TOGETHER: Final = 32
"""Connections closed at once: finding them costs more than closing them."""

_BAD_REQUEST: Final = Fault(400, "bad_request", "This is not a valid HTTP request.")
_SLOW_HEAD: Final = Fault(408, "request_timeout", "The request did not arrive in time.")
_LARGE_HEAD: Final = Fault(431, "head_too_large", "The head of the request is too large.")
_NO_PLACE: Final = unavailable("Too many connections are open.")
_NO_MEMORY: Final = unavailable("Too many requests are being received.")

log = get_logger(__name__)


class _ReadFlow(FlowControl):
    """Resumes reading only if the client reads its responses and is not too far ahead."""

    is_ahead = False

    def resume_reading(self) -> None:
        if not self.write_paused and not self.is_ahead:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """A connection under the limits of `pool`."""

    def __init__(self, *, pool: "ConnectionPool", **options: Any) -> None:
        super().__init__(**options)
        self._pool = pool
        self._limits = pool.limits
        self.since = self.loop.time()
        """When its current phase was first seen, or its head started, by the loop's clock."""
        self.held = 0
        """Approximate memory of what its client has sent."""
        self._phase: object = None
        self._in_head = False
        self._piece = 0
        self._framing = 0
        """Bytes in a row that are no part of a body: a head, or the framing of chunks. For a head
        that starts within a piece, all of the piece."""
        self._refusal = _BAD_REQUEST
        self._ignores_input = False
        """After a refusal: only responses are still sent."""
        self._unstarted: tuple[RequestResponseCycle, Any] | None = None
        """A request that is served when its body, or the part of it that has arrived, is parsed."""
        self._earlier: list[RequestResponseCycle] = []
        """Requests before `cycle` that may not be answered yet."""

    # For the pool

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for its client: to send a request or the rest of one, even of a refused
        one, or to read the response, even the last."""
        if self.flow.write_paused or self.transport.is_closing() or not self._is_busy:
            return True
        return self.cycle.more_body and not self.pipeline

    def check(self, now: float) -> None:
        """Close it if its client has been idle, or in the middle of a head, for too long."""
        head = self._partial_head
        phase = self if self._is_busy else head or self.cycle
        if phase is not self._phase:
            self._phase, self.since = phase, now
        if self._is_busy or self.transport.is_closing():
            return
        if head is None:
            if now - self.since > self._limits.idle_seconds:
                self.transport.close()
        elif now - self.since > self._limits.head_seconds:
            self._refuse(_SLOW_HEAD)

    def evict(self) -> None:
        """Close it, because another client needs its place or its memory."""
        self.connections.discard(self)  # it no longer counts, although closing takes a moment
        responding = self._is_busy and self.cycle.response_started
        if responding or self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()  # else it would stay until its client has read the rest
        elif self._partial_head is None and not self._is_busy:
            self.transport.close()
        else:
            self._refuse(_NO_PLACE)
        self._pool.hold(self, 0)

    # Called by the transport

    def connection_made(self, transport: Any) -> None:
        """Takes a place, for which another connection may be evicted."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES)
        self.flow: _ReadFlow = _ReadFlow(transport)
        if self._pool.is_stopping:
            self.shutdown()
        elif not self._pool.admit(self):
            self._refuse(_NO_PLACE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Notifies every request that is not answered yet, not only the last."""
        super().connection_lost(exc)
        self._pool.hold(self, 0)
        for cycle in self._earlier:
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._parse(data)
        if self._unstarted is not None:
            self._start(*self._unstarted)

    def _parse(self, data: bytes) -> None:
        """Parse until a limit is exceeded."""
        if self._ignores_input:
            return
        if not self._pool.hold(self, self.held + len(data)):
            self._refuse(_NO_MEMORY)
            return
        for start in range(0, len(data), PARSE_BYTES):
            piece = data[start : start + PARSE_BYTES]
            self._piece = len(piece)
            self._framing += self._piece
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                self._ignore_upgrade(data[start + upgrade.args[0] :])
                return
            except httptools.HttpParserError:
                self._refuse(self._refusal)
                return
            too_long = self._framing > self._limits.head_bytes + PARSE_BYTES
            if too_long or (self._in_head and len(self.headers) > self._limits.headers):
                self.headers.clear()  # a piece may hold thousands
                self._refuse(_LARGE_HEAD)
                return
        self._recount()
        if self.pipeline and self.held > HIGH_WATER_LIMIT:
            self.flow.is_ahead = True
            self.flow.pause_reading()

    def pause_writing(self) -> None:
        """Stops reading from a client that does not read its responses."""
        super().pause_writing()
        if not self.transport.is_closing():
            self.flow.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self.flow.resume_reading()

    # Called by the parser. What is raised here ends the parsing.

    def on_message_begin(self) -> None:
        """Starts a head: the client is no longer idle."""
        super().on_message_begin()
        self._in_head = True
        self.since = self.loop.time()
        self._framing = self._piece

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header, and drops a trailer."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        too_large = len(self.headers) > self._limits.headers
        if self._framing > self._limits.head_bytes:  # part of it may be something else
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            too_large = too_large or size > self._limits.head_bytes
        if too_large:
            self._refusal = _LARGE_HEAD
            raise ValueError("head too large")
        self._framing = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("CONNECT is not supported")
            return
        if len(self.pipeline) >= self._limits.requests_ahead:
            raise ValueError(len(self.pipeline))
        if self.url[:1] not in (b"/", b"*"):
            self._add_host()
        self._pool.hold(self, self.held + _REQUEST_BYTES + _HEADER_BYTES * len(self.headers))
        previous = self.cycle
        super().on_headers_complete()
        if self.pipeline:
            self._earlier = [cycle for cycle in self._earlier if not cycle.response_complete]
            self._earlier.append(previous)

    def _add_host(self) -> None:
        """Let the host in an absolute target (RFC 9112, 3.2.2) count as one of the `Host` headers:
        where another one is there as well, the request is for no certain host."""
        authority = re.split(rb"[/?#]", self.url.partition(b"://")[2], maxsplit=1)[0]
        hosts = {value.lower() for name, value in self.headers if name == b"host"}
        if hosts != {authority.lower()}:
            self.headers.append((b"host", authority))

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
        if self._unstarted is not None:
            self._start(*self._unstarted)

    # Responses

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn when the head is parsed, or the request before it is answered."""
        if cycle.more_body:
            self._unstarted = cycle, app
        else:
            self._start(cycle, app)

    def _start(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Serve a request: directly, if it is complete and the application takes it."""
        self._unstarted = None
        take = self._pool.take
        if take is not None and not cycle.more_body and cycle.keep_alive:
            scope = cast(Scope, cycle.scope)
            if take(scope, bytes(cycle.body), partial(self._answer, cycle, app)):
                return
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self._recount()
        self.flow.is_ahead = len(self.pipeline) > 1 and self.held > HIGH_WATER_LIMIT
        if self.pipeline:
            super().on_response_complete()
            if self._unstarted is not None:  # the rest of its body is still to come
                self._start(*self._unstarted)
            return
        # The same without uvicorn's timer for idle connections, which `check` replaces.
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _answer(self, cycle: RequestResponseCycle, app: Any, response: bytes | None) -> None:
        """See `Answer`: the simple case of `RequestResponseCycle.send`."""
        if response is None:
            super()._start_asgi_task(cycle, app)
            return
        if cycle.disconnected:
            return
        cycle.response_started = cycle.response_complete = True
        head = self._pool.status_line(cycle.default_headers)
        if cycle.keep_alive:
            self.transport.write(head + response)
        else:  # the process stops, or the client has sent what is refused
            self.transport.write(head + b"connection: close\r\n" + response)
            self.transport.close()
        cycle.on_response()

    def _refuse(self, fault: Fault) -> None:
        """Read nothing more. Earlier requests are still answered, in order."""
        self._ignores_input = True
        if self._is_busy and not self._is_receiving:
            self.cycle.keep_alive = False
            return
        headers = {"Connection": "close", "Cache-Control": "no-store", **fault.headers}
        response = Json(fault.body(), headers=headers)
        lines = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
        self.transport.write(STATUS_LINE[fault.status] + lines + b"\r\n" + response.body)
        self.transport.close()

    # State

    @property
    def _newest(self) -> RequestResponseCycle | None:
        """The request whose head came last; none before the first."""
        return self.cycle

    @property
    def _is_busy(self) -> bool:
        """Whether a request is being answered, or queued."""
        newest = self._newest
        return newest is not None and not newest.response_complete

    @property
    def _is_receiving(self) -> bool:
        """Whether the only open request is not complete yet."""
        newest = self._newest
        if newest is None or newest.response_started or self.pipeline:
            return False
        return newest.more_body

    @property
    def _partial_head(self) -> object | None:
        """What there is of an incomplete head; the parser creates a scope for each."""
        newest = self._newest
        return None if newest is not None and newest.scope is self.scope else self.scope

    def _recount(self) -> None:
        """Recompute the memory held, unless it cannot change before a response."""
        if self._is_busy and not (self.cycle.response_started and self.cycle.more_body):
            return
        # The rest of a body that is answered already is discarded.
        has_head = self._partial_head is not None
        head = self._framing + _HEADER_BYTES * len(self.headers) if has_head else 0
        if not self._pool.hold(self, head) and not self.transport.is_closing():
            self._refuse(_NO_MEMORY)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse a head again without its offer of another protocol (RFC 9110, 7.8): the parser
        would skip the body after it."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))


class ConnectionPool:
    """All connections of a server, within `limits` and the files that the process may open.

    Each connection costs a file descriptor, and may bring bytes that are kept until its request is
    answered. Both are limited for all connections together. Beyond that, connections that have
    waited longest for their client are closed; to free memory, the large ones first. A callback
    hardly waits at all. `take` is what the application offers to take requests directly.
    """

    def __init__(self, limits: Limits, take: Take | None = None) -> None:
        self.limits = limits
        self.take = take
        self.is_stopping = False
        """Whether the server stops: it shuts down the connections that it has, and one that was
        accepted just before would go on with requests."""
        files = _open_files(limits.connections)
        self._most = min(limits.connections, max(files - _OTHER_FILES, files // 2))
        self._held = 0
        self._logged = LogRateLimit()
        self._default_headers: list[tuple[bytes, bytes]] = []
        self._status_line = b""

    def status_line(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """The start of a 200 response. uvicorn replaces its default headers once a second."""
        if default_headers is not self._default_headers:
            self._default_headers = default_headers
            headers = (b"%b: %b\r\n" % header for header in default_headers)
            self._status_line = b"HTTP/1.1 200 OK\r\n" + b"".join(headers)
        return self._status_line

    def check(self, connections: Iterable[Any], now: float) -> None:
        """Close those whose clients take too long. `now` is the loop's time."""
        for connection in list(connections):
            connection.check(now)

    def admit(self, newcomer: Connection) -> bool:
        """Make a place for it; false if all others are being served."""
        if len(newcomer.connections) <= self._most:
            return True
        evicted = nsmallest(_EVICTED_TOGETHER, _waiting(newcomer), key=attrgetter("since"))
        for connection in evicted:
            connection.evict()
        if count := self._logged.count("full", now=newcomer.loop.time()):
            log.warning("connections.full", most=self._most, count=count)
        return bool(evicted)

    def hold(self, connection: Connection, held: int) -> bool:
        """Set the memory that it holds; false if that is too much, and no other can be evicted."""
        self._held += held - connection.held
        connection.held = held
        most = self.limits.received_bytes
        if self._held <= most or held <= SMALL_BYTES:
            return True
        # Small requests go last: callbacks are small, and closing them frees the least memory.
        waiting = _waiting(connection)
        for other in sorted(waiting, key=lambda one: (one.held <= SMALL_BYTES, one.since)):
            if self._held <= most * 3 // 4:
                break
            if other.held:
                other.evict()
        if count := self._logged.count("memory", now=connection.loop.time()):
            log.warning("connections.no_memory", most=most, count=count)
        return self._held <= most


def _waiting(newcomer: Connection) -> list[Connection]:
    connections = cast(set[Connection], newcomer.connections)
    return [one for one in connections if one is not newcomer and one.is_waiting]


def _open_files(connections: int) -> int:
    """How many files the process may open, after raising its limit for so many connections."""
    enough = connections + _OTHER_FILES
    try:
        import resource  # noqa: PLC0415  (not on Windows, where files have no such limit)
    except ImportError:
        return enough
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return enough
    allowed = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
