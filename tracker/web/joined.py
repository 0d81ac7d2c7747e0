"""An answer's head and body in one packet.

uvicorn writes them one after the other, and each write is a call of the kernel and a packet of its
own: for an answer as small as ours a third of what the server does with a request.
"""

import asyncio


class Joined:
    """What an answer is written to, in front of `transport`.

    A write is kept back until the next one, and no longer than this turn of the event loop.
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
