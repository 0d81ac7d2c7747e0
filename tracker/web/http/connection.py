"""One HTTP connection, and what a client may make of it: time, memory, and other people's places.

uvicorn's own protocol waits for ever for a request that has begun, takes a head of any size, and as
many requests ahead as are sent. Here whatever depends on the client ends by itself:

===============================  ================================================================
the connection                   ends
===============================  ================================================================
has nothing to do                after `idle_seconds`
has brought a part of a head     after `head_seconds`, with 408; beyond `head_bytes` or `headers`,
                                 with 431
has brought a part of a body     as the application says, which reads it
has brought whole requests       when they are answered, each in its turn; with the last of
                                 `requests_ahead`, if there are more
takes its answers slowly         when another client needs its place or its memory; where it takes
                                 nothing at all, after `UNREAD` of `tracker.web.http.server`
===============================  ================================================================

Nothing more is read of a client that does not take its answers. Trailers are dropped: they come
after the decisions that headers are for (RFC 9110, 6.5.1). `tracker.web.http.connection` counts
what all connections hold and looks at each of them once a second, so that this costs a request no
timer.

This builds on internals of uvicorn: `tests/web/test_uvicorn.py` says which.
"""

import asyncio
from collections.abc import Iterable
from functools import partial
from heapq import nsmallest
from http import HTTPStatus
from operator import attrgetter
from typing import Any, Final, cast

import httptools
import structlog
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tracker.core.rate_limited_log import Seldom
from tracker.web.http.answers import WRITE, to_json
from tracker.web.http.errors import Fault, unavailable
from tracker.web.http.limits import Limits

PIECE: Final = 16 * 1024
"""Bytes that are parsed at a time, so that what is too much is noticed before it is kept."""
UNSENT: Final = 4 * 1024
"""Bytes of answers that wait for a slow client before it is given no more."""
_OBJECTS: Final = 2048
"""What a request costs in memory besides its bytes, about."""
_HEADER: Final = 128
"""What each of its headers costs besides its bytes, about."""

_NO_HTTP: Final = Fault(400, "bad_request", "This is no request as HTTP has it.")
_TOO_SLOW: Final = Fault(408, "request_timeout", "The request did not come in time.")
_LONG_HEAD: Final = Fault(431, "head_too_large", "The head of the request is too large.")
_NO_ROOM: Final = unavailable("Too many connections are open.")
_NO_MEMORY: Final = unavailable("Too many requests are being received.")


class _Flow(FlowControl):
    """Reads on only from a client that takes its answers and has not sent too far ahead."""

    is_ahead = False

    def resume_reading(self) -> None:
        if not self.write_paused and not self.is_ahead:
            super().resume_reading()


class Joined:
    """What an answer is written to, in front of `transport`: its head and body in one packet.

    uvicorn writes them one after the other, and each write is a call of the kernel and a packet of
    its own: for an answer as small as ours a third of what the server does with a request. A write
    is kept back until the next one, and no longer than this turn of the event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._kept: bytes | None = None

    def write(self, data: bytes) -> None:
        """Write it with what was kept back, or keep it back."""
        if self._kept is None:
            self._kept = data
            self._loop.call_soon(self.flush)
        else:
            whole, self._kept = self._kept + data, None
            self._transport.write(whole)

    def flush(self) -> None:
        """Write what is kept back, if its reader has not gone since: uvloop minds that."""
        if self._kept is not None:
            alone, self._kept = self._kept, None
            if not self._transport.is_closing():
                self._transport.write(alone)

    def close(self) -> None:
        """Close the connection behind what was written."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the connection is closed, or will be."""
        return self._transport.is_closing()


class Connection(HttpToolsProtocol):
    """A connection, one of those that `limit` keeps in order.

    The methods that are no part of uvicorn's protocol are for the limit.
    """

    def __init__(self, *, limit: "ConnectionLimit", **given: Any) -> None:
        super().__init__(**given)
        self._limit = limit
        self._limits = limit.limits
        self.since = self.loop.time()
        """When it was first seen to be where it stands, or began a head, by the loop's clock."""
        self.held = 0
        """Bytes that its client has brought and that may still be in memory, about."""
        self._stand: object = None
        self._piece = 0
        self._framing = 0
        """How many bytes came in a row that are no part of a body: a head, the frame of chunks. Of
        a head that begins within a piece, all of the piece."""
        self._refusal = _NO_HTTP
        self._is_deaf = False
        """Whether what comes is thrown away: this connection only has yet to answer."""
        self._before: list[RequestResponseCycle] = []
        """Requests that may still be answered, while `cycle` is one that came after them."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is the client's turn: to ask, to bring the rest of what it asks (though it may
        be refused already), or to take what it was answered, be it the last."""
        if self.flow.write_paused or self.transport.is_closing() or not self._is_busy:
            return True
        return self.cycle.more_body and not self.pipeline

    def look(self, now: float) -> None:
        """Ends it, if its client has left it where it stands for too long."""
        head = self._begun_head
        stand = self if self._is_busy else head or self.cycle
        if stand is not self._stand:
            self._stand, self.since = stand, now
        if self._is_busy or self.transport.is_closing():
            return
        if head is None:
            if now - self.since > self._limits.idle_seconds:
                self.transport.close()
        elif now - self.since > self._limits.head_seconds:
            self._refuse(_TOO_SLOW)

    def give_way(self) -> None:
        """Ends it, because another client needs its place or its memory."""
        self.connections.discard(self)  # it is no longer counted, though it takes a moment to go
        is_answered = self._is_busy and self.cycle.response_started
        if is_answered or self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()  # else it would stay until its client has taken the rest
        elif self._begun_head is None and not self._is_busy:
            self.transport.close()
        else:
            self._refuse(_NO_ROOM)
        self._limit.hold(self, 0)

    def connection_made(self, transport: Any) -> None:
        """Takes its place, for which another one may have to go."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT)
        self.flow: _Flow = _Flow(transport)
        self._answers = Joined(transport, self.loop)
        if not self._limit.admit(self):
            self._refuse(_NO_ROOM)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells every request that is not answered yet, not the last alone."""
        super().connection_lost(exc)
        self._limit.hold(self, 0)
        for cycle in self._before:
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Reads on, as far as the client is listened to."""
        if self._is_deaf:
            return
        if not self._limit.hold(self, self.held + len(data)):
            self._refuse(_NO_MEMORY)
            return
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self._piece = len(piece)
            self._framing += self._piece
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as offer:
                self._read_without_the_offer(data[start + offer.args[0] :])
                return
            except httptools.HttpParserError:
                self._refuse(self._refusal)
                return
            if self._framing > self._limits.head_bytes + PIECE:
                self._refuse(_LONG_HEAD)
                return
        self._settle()
        if self.pipeline and self.held > HIGH_WATER_LIMIT:
            self.flow.is_ahead = True
            self.flow.pause_reading()

    def _settle(self) -> None:
        """Counts anew what is held, where that is not known to be the same until an answer."""
        if self._is_busy and not (self.cycle.response_started and self.cycle.more_body):
            return
        # What comes of a body that is answered already is thrown away.
        head = 0 if self._begun_head is None else self._framing + _HEADER * len(self.headers)
        if not self._limit.hold(self, head) and not self.transport.is_closing():
            self._refuse(_NO_MEMORY)

    def pause_writing(self) -> None:
        """The client does not take what it is answered: nothing more is read of it."""
        super().pause_writing()
        if not self.transport.is_closing():
            self.flow.pause_reading()

    def resume_writing(self) -> None:
        """It takes its answers again."""
        super().resume_writing()
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def on_message_begin(self) -> None:
        """Begins a head: the client is not the one that has been idle longest any more."""
        super().on_message_begin()
        self.since = self.loop.time()
        self._framing = self._piece

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header, and drops a trailer. What is raised here ends the reading."""
        if getattr(self.cycle, "scope", None) is self.scope:
            return
        super().on_header(name, value)
        if len(self.headers) > self._limits.headers:
            self._refusal = _LONG_HEAD
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        """Hands the request on. What is raised here ends the reading."""
        if self._framing > self._limits.head_bytes:  # something else may be part of that
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self._limits.head_bytes:
                self._refusal = _LONG_HEAD
                raise ValueError(size)
        self._framing = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("no tunnel begins here")
            return
        if len(self.pipeline) >= self._limits.requests_ahead:
            raise ValueError(len(self.pipeline))
        self._limit.hold(self, self.held + _OBJECTS + _HEADER * len(self.headers))
        before = self.cycle
        super().on_headers_complete()
        self.cycle.transport = self._answers  # type: ignore[assignment]  # as far as it is used
        self.scope[WRITE] = partial(self._write_constant, self.cycle)  # type: ignore[typeddict-unknown-key]
        if self.pipeline:
            self._before = [cycle for cycle in self._before if not cycle.response_complete]
            self._before.append(before)

    def _write_constant(self, cycle: RequestResponseCycle, answer: bytes) -> bool:
        """See `tracker.web.http.answers.Write`: the plain case of what uvicorn does."""
        if cycle.response_started or cycle.disconnected or not cycle.keep_alive:
            return False
        if self.flow.write_paused or cycle.more_body:
            return False
        cycle.response_started = cycle.response_complete = True
        self._answers.flush()
        defaults = b"".join(b"%b: %b\r\n" % header for header in cycle.default_headers)
        self.transport.write(b"HTTP/1.1 200 OK\r\n%b%b" % (defaults, answer))
        cycle.message_event.set()
        cycle.on_response()
        return True

    def on_response_complete(self) -> None:
        """Goes on to the next request, or to the connection's end."""
        self._answers.flush()  # of an answer to HEAD there is no body
        self._settle()
        self.flow.is_ahead = len(self.pipeline) > 1 and self.held > HIGH_WATER_LIMIT
        if self.pipeline:
            super().on_response_complete()
            return
        # The same without a timer for the time in which nothing comes: `look` sees to that.
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Hands a part of the body on."""
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Hands the end of the body on."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    @property
    def _newest(self) -> RequestResponseCycle | None:
        """The request whose head came last; none before the first."""
        return self.cycle

    @property
    def _is_busy(self) -> bool:
        """Whether a request is being answered, or waits for its turn."""
        newest = self._newest
        return newest is not None and not newest.response_complete

    @property
    def _is_receiving(self) -> bool:
        """Whether the one request that is being answered is not whole yet."""
        newest = self._newest
        if newest is None or newest.response_started or self.pipeline:
            return False
        return newest.more_body

    @property
    def _begun_head(self) -> object | None:
        """What there is of a head that is not whole; the parser begins a scope with each."""
        newest = self._newest
        return None if newest is not None and newest.scope is self.scope else self.scope

    def _read_without_the_offer(self, rest: bytes) -> None:
        """Reads on after a head that offers another protocol. None is spoken here, and then the
        offer means nothing (RFC 9110, 7.8); the parser would give up the body for it."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self, fault: Fault) -> None:
        """The last that is read of this client. What it asked before is answered, and in order."""
        self._is_deaf = True
        if self._is_busy and not self._is_receiving:
            self.cycle.keep_alive = False
            return
        body = to_json(fault.body())
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **fault.headers,
        }
        lines = [f"HTTP/1.1 {fault.status} {HTTPStatus(fault.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()


# All connections of a server: how many there may be, what they may hold, and who has to go.
#
# Each costs a file, and a process has only so many: where they are used up, nobody is let in any
# more, nor is the database reached. Each may also bring bytes that have to be kept until its
# request is answered. Both are bounded for all connections together, and beyond that those go
# that have waited longest for their client; where it is about memory, the large ones first. A
# callback comes, is answered, and hardly waits at all.


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
