"""Reading a list page after page, to its end, and the one form of cursor that can be made here."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from tracker.core.errors import FloraUnreadable
from tracker.flora.parse import Page

T = TypeVar("T")


async def pages(read: Callable[[str | None], Awaitable[Page[T]]]) -> AsyncGenerator[Page[T], None]:
    """Every page of the list that `read(cursor)` reads, from the first on.

    Raises `FloraUnreadable` where a cursor comes a second time: the pages go round in a circle, so
    that the list's end cannot be told from a hole in it.
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
    """The offset that a cursor stands for; `None` where it says anything else, or cannot be read.

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
    """The inverse of `offset_of`; the list's top needs no cursor."""
    if offset == 0:
        return None
    return base64.urlsafe_b64encode(b'{"offset":%d}' % offset).rstrip(b"=").decode("ascii")
