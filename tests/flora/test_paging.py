"""Reading a list to its end."""

from collections.abc import Awaitable, Callable

import pytest

from tracker.core.errors import FloraUnreadable
from tracker.flora.client import pages
from tracker.flora.parse import Page

Read = Callable[[str | None], Awaitable[Page[str]]]


def reader(cursors: dict[str | None, str | None], asked: list[str | None]) -> Read:
    async def read(cursor: str | None) -> Page[str]:
        asked.append(cursor)
        return Page(items=[f"after {cursor}"], next_cursor=cursors[cursor], unreadable={})

    return read


async def test_every_page_in_turn() -> None:
    """Each page is asked for with the cursor of the one before it, up to the last."""
    asked: list[str | None] = []
    read = reader({None: "a", "a": "b", "b": None}, asked)
    assert [page.items async for page in pages(read)] == [["after None"], ["after a"], ["after b"]]
    assert asked == [None, "a", "b"]


@pytest.mark.parametrize(
    "cursors", [{None: "a", "a": "a"}, {None: "a", "a": "b", "b": "a"}], ids=["itself", "circle"]
)
async def test_a_circle_ends(cursors: dict[str | None, str | None]) -> None:
    """Pages that go round in a circle are each read once, and then said to have no end."""
    asked: list[str | None] = []
    with pytest.raises(FloraUnreadable, match="same cursor"):
        async for _ in pages(reader(cursors, asked)):
            pass
    assert asked == list(cursors)
