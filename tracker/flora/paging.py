"""Reading a list page after page, to its end."""

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
            raise FloraUnreadable("the list has no end: FLORA gave the same cursor twice")
        seen.add(cursor)
