"""Lists of FLORA by their cursors, which are offsets as far as its reference shows."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from tracker.core.errors import FloraUnreadable
from tracker.flora.parse import Page

T = TypeVar("T")


async def pages(read: Callable[[str | None], Awaitable[Page[T]]]) -> AsyncGenerator[Page[T], None]:
    """Every page of the list that `read(cursor)` reads.

    Raises `FloraUnreadable` if a cursor comes twice: in a circle the end of the list cannot be told
    from a gap in it.
    """
    seen: set[str] = set()
    cursor: str | None = None
    while True:
        page = await read(cursor)
        yield page
        cursor = page.next_cursor
        if cursor is None:
            return
        if cursor in seen:
            raise circular()
        seen.add(cursor)


def circular() -> FloraUnreadable:
    """The error for a list whose cursors lead back to a page that was read."""
    return FloraUnreadable("the list has no end: FLORA gave the same cursor twice")


def offset_of(cursor: str) -> int | None:
    """The offset that a cursor stands for; `None` if it stands for anything else.

    FLORA's reference shows base64url of `{"offset":20}`, without padding (flora-api.md, 6).
    """
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        match json.loads(raw):
            case {"offset": int(offset), **more} if not more and offset >= 0:
                return offset
    except (ValueError, binascii.Error, RecursionError):
        pass
    return None


def cursor_at(offset: int) -> str | None:
    """The cursor of an offset; the top of the list has none."""
    if offset == 0:
        return None
    return base64.urlsafe_b64encode(b'{"offset":%d}' % offset).rstrip(b"=").decode("ascii")
