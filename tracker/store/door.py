"""The one way in which observations of runs are written: in groups, each answered after its commit.

Callbacks are stored by `tracker.store.inbox` first, and come to the same merge when they are
applied.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection

from tracker.core.entry import Entry
from tracker.store.batch import Outcome, Passed, Rules, Statements, pass_batch, statements_for
from tracker.store.engine import Database
from tracker.store.group_commit import GroupCommit, call_hook
from tracker.store.text import clean_entry

NAME: Final = "door"

OnCommit = Callable[[Outcome], None]
"""Called in the event loop after each commit, before the callers are answered."""


class Door(GroupCommit[Entry, Passed]):
    """Takes entries and commits them in groups. Used as `async with Door(database, …) as door`.

    `options` are those of `GroupCommit`.
    """

    def __init__(
        self, db: Database, *, rules: Rules, on_commit: Sequence[OnCommit] = (), **options: Any
    ) -> None:
        super().__init__(self._commit_entries, name=NAME, **options)
        self._db = db
        self._rules = rules
        self._statements = statements_for(db)
        self._on_commit = tuple(on_commit)

    async def put(self, entry: Entry) -> Passed:
        """Commit an entry, and return what it did.

        Raises `StoreUnavailable` where it was not committed in time (it still may be), and
        `StoreError` where the database refuses this very entry.
        """
        return await self.submit(clean_entry(entry))

    async def put_all(self, entries: Sequence[Entry]) -> list[Passed]:
        """Commit entries, and return what each did, in order.

        They share transactions as they fit; what does not fit into one is committed in any order.
        Raises as `put` does, after all have been answered: those that could be committed are.
        """
        answers = self.submit_all([clean_entry(entry) for entry in entries])
        done = []
        for each in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(each, BaseException):
                raise each
            done.append(each)
        return done

    async def _commit_entries(self, entries: list[Entry]) -> list[Passed]:
        outcome = await self._db.write(partial(_pass, entries, self._rules, self._statements))
        for hook in self._on_commit:
            call_hook(hook, outcome)
        return outcome.passed


def _pass(
    entries: list[Entry], rules: Rules, statements: Statements, connection: Connection
) -> Outcome:
    return pass_batch(connection, entries, rules, statements)
