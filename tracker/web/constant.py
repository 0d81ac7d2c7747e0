"""Answers that are always the same, made once and written at once.

The layers that an answer goes out through, and the server's own check of each of its headers, cost
a callback as much as its signature does. Where the server knows nothing of this, the answer goes
out like any other, and is the same.
"""

from collections.abc import Callable
from typing import Any, Final

from starlette.types import Scope

from tracker.web.answers import Json
from tracker.web.everywhere import EVERYWHERE, request_id_header

WRITE: Final = "tracker.write_constant"
"""Where a request's scope has the server's `Write`."""
Write = Callable[[bytes], bool]
"""Writes an answer of status 200, from the first of its own headers on, and ends the request with
it; false where that cannot be done, and nothing has been written."""


class Constant:
    """A JSON answer of status 200."""

    def __init__(self, content: Any) -> None:
        self.send = Json(content)
        """The same as an ASGI application, for any server, and for all layers to see."""
        headers = [*self.send.raw_headers, *EVERYWHERE]
        self._head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self._end = b"\r\n\r\n" + self.send.body

    def write(self, scope: Scope) -> bool:
        """Answers a request, past all layers; false where that cannot be done, and was not."""
        write: Write | None = scope.get(WRITE)
        if write is None:
            return False
        name, value = request_id_header(scope)
        return write(b"%b%b: %b%b" % (self._head, name, value, self._end))
