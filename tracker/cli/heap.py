"""One heap for all threads of a process that stays."""

import ctypes
from contextlib import suppress
from typing import Final

_M_ARENA_MAX: Final = -8


def share_the_heap() -> None:
    """Have all threads take their memory from one heap. Has to come before there are any.

    glibc gives each thread one of its own, in which what SQLite's threads let go of lies scattered:
    the process grows for hours, by a tenth. They wait for Python's lock anyhow, so that they do not
    wait for each other here. Where there is another C library nothing happens.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
