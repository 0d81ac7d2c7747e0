"""A database whose writes fail when a test says so."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sqlalchemy import Connection

from tracker.store.engine import Database

T = TypeVar("T")


class FaultyDatabase(Database):
    """A database of which each write ends with the next of `faults`, if there is one: its work is
    done, and rolled back. `tried` is how many writes there were."""

    faults: Iterator[Exception] = iter(())
    tried = 0

    async def write(self, work: Callable[[Connection], T], **options: Any) -> T:
        self.tried += 1
        fault = next(self.faults, None)
        if fault is None:
            return await super().write(work, **options)

        def fails(connection: Connection) -> T:
            work(connection)
            raise fault

        return await super().write(fails, **options)
