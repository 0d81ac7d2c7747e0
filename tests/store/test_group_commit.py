"""Group commit: in order, in bounded groups, and never more than there is room for."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.logs import capture_logs
from tests.support.waiting import eventually, let_pass
from tracker.core.errors import StoreError, StoreUnavailable
from tracker.core.waiting import ClosingStack
from tracker.store.errors import StoreBusy
from tracker.store.writing.group_commit import MAX_GROUP_BYTES, GroupCommit


class Committed:
    """A database of one's own: which groups came, and what is in its way."""

    def __init__(self) -> None:
        self.groups: list[list[bytes]] = []
        self.free = asyncio.Event()
        self.free.set()
        self.raised: list[Exception] = []
        self.bad: set[bytes] = set()

    async def commit(self, group: list[bytes]) -> Sequence[int]:
        await self.free.wait()
        if self.raised:
            raise self.raised.pop(0)
        if self.bad & set(group):
            raise StoreError("no")
        self.groups.append(group)
        return [len(item) for item in group]


@dataclass(eq=False)
class Lengths(GroupCommit[bytes, int]):
    """Commits with `commit`."""

    name = "test"
    commit: Callable[[list[bytes]], Awaitable[Sequence[int]]]

    async def _commit(self, items: list[bytes]) -> Sequence[int]:
        return await self.commit(items)

    def _size(self, item: bytes) -> int:
        return len(item)


def group_commit(committed: Committed, **options: Any) -> Lengths:
    return Lengths(committed.commit, **options)


async def test_what_comes_during_a_commit_shares_the_next() -> None:
    """One alone is committed alone; those that queue meanwhile are committed together."""
    committed = Committed()
    async with group_commit(committed) as group:
        committed.free.clear()
        first = group.enqueue(b"a")
        await asyncio.sleep(0.01)
        later = [group.enqueue(b"x" * number) for number in range(1, 6)]
        assert group.waiting == 6
        committed.free.set()
        assert await asyncio.gather(first, *later) == [1, 1, 2, 3, 4, 5]
    assert [len(one) for one in committed.groups] == [1, 5]


async def test_room_is_counted_in_bytes_and_in_items() -> None:
    """What cannot be kept is refused at once, and what is committed makes room again."""
    committed = Committed()
    async with group_commit(committed, max_waiting=3, max_waiting_bytes=100) as group:
        with pytest.raises(StoreUnavailable):
            group.enqueue_all([b"x" * 60, b"x" * 41])
        with pytest.raises(StoreUnavailable):
            group.enqueue_all([b""] * 4)
        for _ in range(3):
            await asyncio.gather(*group.enqueue_all([b"x" * 60, b"x" * 40]))
    assert len(committed.groups) == 3


async def test_a_group_has_at_most_so_many_items_and_bytes() -> None:
    """The last item may go beyond the bytes; order is kept, and none is left behind."""
    committed = Committed()
    half = b"x" * (MAX_GROUP_BYTES // 2 - 1)
    async with group_commit(committed, max_group=7) as group:
        await asyncio.gather(*group.enqueue_all([half] * 5))
        await asyncio.gather(*group.enqueue_all([b"%d" % number for number in range(20)]))
    assert [len(one) for one in committed.groups] == [3, 2, 7, 7, 6]
    assert [item for one in committed.groups[2:] for item in one] == [
        b"%d" % number for number in range(20)
    ]


async def test_only_the_item_that_is_to_blame_fails() -> None:
    """A group that is refused is split until the bad item is alone; a locked row alike."""
    committed = Committed()
    committed.bad = {b"bad"}
    committed.raised = [StoreBusy("locked")]
    async with group_commit(committed) as group:
        items = [b"%d" % number for number in range(20)]
        items[13] = b"bad"
        answers = await asyncio.gather(*group.enqueue_all(items), return_exceptions=True)
    failed = [number for number, each in enumerate(answers) if isinstance(each, Exception)]
    assert failed == [13]
    assert sum(len(one) for one in committed.groups) == 19


async def test_a_database_that_is_away_is_tried_again_until_the_deadline() -> None:
    """Who waits too long is told, and why; what comes after is committed."""
    committed = Committed()
    committed.raised = [StoreUnavailable("away")] * 1000
    async with group_commit(committed, deadline=60) as group:
        answer = group.enqueue(b"a")
        await eventually(lambda: group.trouble)
        assert not answer.done()
        let_pass(60)
        with pytest.raises(StoreUnavailable, match="away"):
            await answer
        assert group.trouble is not None
        committed.raised.clear()
        assert await group.enqueue(b"b") == 1
        assert group.trouble is None


async def test_closing_commits_what_waits() -> None:
    """And refuses the rest."""
    committed = Committed()
    async with group_commit(committed, max_group=10) as group:
        answers = group.enqueue_all([b"x"] * 45)
    assert await asyncio.gather(*answers) == [1] * 45
    with pytest.raises(StoreUnavailable):
        group.enqueue(b"late")


async def test_a_close_that_is_cut_short_leaves_nobody_waiting() -> None:
    """The database does not answer: what is being written and what waits is refused."""
    committed = Committed()
    committed.free.clear()
    async with ClosingStack(0.05) as stack:
        group = await stack.open("group", group_commit(committed, max_group=2))
        answers = group.enqueue_all([b"x"] * 3)
        await asyncio.sleep(0)
    for answer in answers:
        with pytest.raises(StoreUnavailable):
            await answer


async def test_a_fault_ends_no_group_commit() -> None:
    """Whoever waits for the group is told, and the next one is committed."""
    committed = Committed()
    answers = iter([[], [7]])

    async def commit(group: list[bytes]) -> Sequence[int]:
        await committed.commit(group)
        return next(answers)

    with capture_logs() as lines:
        async with Lengths(commit) as group:
            with pytest.raises(StoreUnavailable):
                await group.enqueue(b"a")
            assert await group.enqueue(b"b") == 7
    assert [(line["event"], line["loop"]) for line in lines] == [("loop.failed", "test")]
