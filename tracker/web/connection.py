"""One HTTP connection, and what a client may make of it: time, memory, and other people's places.

uvicorn's own protocol waits for ever for a request that has begun, takes a head of any size, and as
many requests ahead as are sent. Here whatever depends on the client ends by itself:

===============================  ================================================================
the connection                   ends
===============================  ================================================================
has nothing to do                after `idle_seconds`
has brought a part of a head     after `head_seconds`, with 408; at more than `head_bytes`, with 431
has brought a part of a body     as the application says, which reads it
has brought whole requests       when they are answered, each in its turn; with the last of
                                 `requests_ahead`, if there are more
takes its answers slowly         when somebody else needs its place; where it takes nothing at all,
                                 after `UNREAD` of `tracker.web.server`
===============================  ================================================================

`tracker.web.crowd` looks at each of them once a second, so that this costs a request no timer.
"""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tracker.web.answers import to_json
from tracker.web.constant import WRITE
from tracker.web.faults import Fault, unavailable
from tracker.web.joined import Joined
from tracker.web.limits import Limits

_NO_HTTP: Final = Fault(400, "bad_request", "This is no request as HTTP has it.")
_TOO_SLOW: Final = Fault(408, "request_timeout", "The request did not come in time.")
_LONG_HEAD: Final = Fault(431, "head_too_large", "The head of the request is too large.")
_NO_ROOM: Final = unavailable("Too many connections are open.")


class Connection(HttpToolsProtocol):
    """A connection. `admit` says whether there is room for one more.

    The methods that are no part of uvicorn's protocol are for whoever keeps all of them in order.
    """

    def __init__(
        self, *, limits: Limits, admit: Callable[["Connection"], bool], **given: Any
    ) -> None:
        super().__init__(**given)
        self._limits = limits
        self._admit = admit
        self.since = self.loop.time()
        """When it was first seen to be where it stands, by the loop's clock."""
        self._stand: object = None
        self._framing = 0
        """How many bytes came in a row that are no part of a body: a head, the frame of chunks."""
        self._refusal = _NO_HTTP
        self._is_deaf = False
        """Whether what comes is thrown away: this connection only has yet to answer."""
        self._before: list[RequestResponseCycle] = []
        """Requests that may still be answered, while `cycle` is one that came after them."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is the client's turn: to ask, to bring the rest of what it asks, or to take
        what it was answered, be it the last."""
        is_unread = self.flow.write_paused or self.transport.is_closing()
        return is_unread or not self._is_busy or self._is_receiving

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
        """Ends it, because somebody else needs its place."""
        self.connections.discard(self)  # it is no longer counted, though it takes a moment to go
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()  # else it would stay until its client has taken the rest
        elif self._begun_head is None and not self._is_busy:
            self.transport.close()
        else:
            self._refuse(_NO_ROOM)

    def connection_made(self, transport: Any) -> None:
        """Takes its place, for which another one may have to go."""
        super().connection_made(transport)
        self._answers = Joined(transport, self.loop)
        if not self._admit(self):
            self._refuse(_NO_ROOM)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells every request that is not answered yet, not the last alone."""
        super().connection_lost(exc)
        for cycle in self._before:
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Reads on, as far as the client is listened to."""
        if self._is_deaf:
            return
        self._framing += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._read_without_the_offer(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._refusal)
        else:
            if self._framing > self._limits.head_bytes:
                self._refuse(_LONG_HEAD)

    def on_headers_complete(self) -> None:
        """Hands the request on. What is raised here ends the reading."""
        if self._framing > self._limits.head_bytes:  # a body may be part of that
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
        before = self.cycle
        super().on_headers_complete()
        self.cycle.transport = self._answers  # type: ignore[assignment]  # as far as it is used
        self.scope[WRITE] = partial(self._write_constant, self.cycle)  # type: ignore[typeddict-unknown-key]
        if self.pipeline:
            self._before = [cycle for cycle in self._before if not cycle.response_complete]
            self._before.append(before)

    def _write_constant(self, cycle: RequestResponseCycle, answer: bytes) -> bool:
        """See `tracker.web.constant.Write`: the plain case of what uvicorn does with an answer."""
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
