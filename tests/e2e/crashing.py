"""A `tracker` process that kills itself at one crash point, just before or just after.

A crash point is a moment at which something becomes true for others: a transaction is committed, or
a request reaches FLORA and is answered. SIGKILL comes before the commit is sent or after it has
returned, before the request leaves or after its answer is there; nothing is flushed, and nobody is
told. `tracker` itself knows nothing of this: the switch sits in the two functions through which
every write and every request goes.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeVar

import httpx
from sqlalchemy import Connection

from tests.e2e.short_waits import shorten_all_waits, shorten_key_memory
from tracker.core.record import Entry, Observed
from tracker.store.engine import Database

T = TypeVar("T")
When = Literal["before", "after"]

COMMITS: Final = (
    # Callbacks: acknowledged once they are stored, and applied after.
    *("inbox: store", "inbox: apply"),
    # The writer of observations, by what a group brings.
    *("writer: start", "writer: poll", "writer: history", "writer: nothing seen"),
    # The start log.
    *("starts.reserve", "starts.take", "starts.mark_sent", "starts.mark"),
    *("starts.prolong", "starts.give_back"),
    *("workspaces.keep_id", "workspaces.give_ids", "clock.agree"),
    # Who works at what, and until when nobody asks FLORA.
    *("coordination.claim_due", "coordination.renew"),
    *(
        "coordination.take_lease",
        "coordination.drop_lease",
        "coordination.reset_far_schedules",
        "workspaces.keep_wait",
        "workspaces.keep_contact",
    ),
    *("sweeps.begin", "sweeps.add", "sweeps.finish", "rollups.compact"),
    *("batches.keep", "batches.finish"),
    *("batches.claim_due", "batches.renew_launch", "batches.end_launch"),
    *("batches.release_launch", "batches.finish_ended"),
    *("endpoints.fan_out", "endpoints.configure", "messages.record_and_claim"),
    *("techniques.define", "techniques.doubt", "techniques.add_listed", "techniques.mark_gone"),
)
SELDOM: Final = (
    *("messages.release", "messages.resend", "messages.recover", "messages.catch_up"),
    *("coordination.release", "coordination.check_writes"),
    "sweeps.forget_after",
    "deliveries.quarantine",
    "replay.requeue",
    "replay.acknowledge",
    "statements.forget_run",
    "inbox: notify",
    "batches.stop",
)
"""Commits that come only where something is broken, or someone asks."""
REQUESTS: Final = (
    *("POST /techniques/*/runs", "GET /techniques/*/runs/*", "GET /technique-runs"),
    *("GET /generations", "GET /runs/*", "GET /techniques", "GET /techniques/*"),
    "GET /workspaces",
    "POST /hook",  # to an endpoint
)
_IDS = re.compile(r"(?<=/techniques/)[^/]+|(?<=/runs/)[^/]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The `nth` time, from 1, that a process comes to a commit or a request of that `name`, or to
    any where it is `None`."""

    when: When
    name: str | None = None
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.when} {self.name or 'any'}"


def prepare(at: Point | None) -> None:
    """Make this process hasty, and let it die `at` that point."""
    shorten_all_waits()
    shorten_key_memory()
    if at is not None:
        Switch(at).install()


class Switch:
    """Counts how often a process comes to the crash points that are meant, and ends it at one."""

    def __init__(self, at: Point) -> None:
        self._at = at
        self._count = 0
        self._wanted = at.nth

    def install(self) -> None:
        """Watch every commit and every request of this process."""
        write, statement = Database.write, Database.send
        send = httpx.AsyncHTTPTransport.handle_async_request

        async def watched_write(
            database: Database, work: Callable[[Connection], T], *, seconds: float | None = None
        ) -> T:
            if _applies(work):
                return await watched_apply(database, work)
            name = self._reached(names_of(work))
            if name is None:
                return await write(database, work, seconds=seconds)

            def written(connection: Connection) -> T:
                done = work(connection)
                self._die("before", name)
                return done

            with self._next_one_if_it_fails():
                committed = await write(database, written, seconds=seconds)
            self._die("after", name)
            return committed

        async def watched_apply(database: Database, work: Callable[[Connection], T]) -> T:
            reached: list[str] = []

            def written(connection: Connection) -> T:
                done = work(connection)
                # To find that nothing waits is no commit. One that is done again is one.
                if done.taken and not reached:  # type: ignore[attr-defined]
                    name = self._reached({"inbox: apply"})
                    reached.extend([name] if name else [])
                if reached:
                    self._die("before", reached[0])
                return done

            with self._next_one_if_it_fails(lambda: bool(reached)):
                committed = await write(database, written)
            if reached:
                self._die("after", reached[0])
            return committed

        async def watched_statement(database: Database, text: str, values: Any) -> Any:
            stores = "INSERT INTO deliveries" in text
            name = self._reached({"inbox: store" if stores else "inbox: notify"})
            if name is None:
                return await statement(database, text, values)
            self._die("before", name)
            with self._next_one_if_it_fails():
                committed = await statement(database, text, values)
            self._die("after", name)
            return committed

        async def watched_send(
            transport: httpx.AsyncHTTPTransport, request: httpx.Request
        ) -> httpx.Response:
            path = _IDS.sub("*", request.url.path.removeprefix("/api/v1"))
            name = self._reached([f"{request.method} {path}"])
            if name is None:
                return await send(transport, request)
            self._die("before", name)
            with self._next_one_if_it_fails():
                response = await send(transport, request)
                await response.aread()
            self._die("after", name)
            return response

        def watched_execute(finish: Callable[[Any], Any]) -> Callable[..., Any]:
            def execute(database: Database, statement: Any, values: Any = None) -> Any:
                def work(connection: Connection) -> Any:
                    return finish(connection.execute(statement, values))

                # The store's function that executes the statement.
                caller = sys._getframe(1)
                work.__module__ = caller.f_globals["__name__"]
                work.__qualname__ = caller.f_code.co_qualname
                return watched_write(database, work)

            return execute

        Database.write = watched_write  # type: ignore[method-assign]
        Database.execute = watched_execute(lambda result: result.rowcount)  # type: ignore[method-assign]
        Database.execute_row = watched_execute(lambda result: result.first())  # type: ignore[method-assign]
        Database.send = watched_statement  # type: ignore[method-assign]
        httpx.AsyncHTTPTransport.handle_async_request = watched_send  # type: ignore[method-assign]

    def _reached(self, names: Collection[str]) -> str | None:
        """Of these names of one commit or request, that of the point, if this is its moment."""
        unknown = {*names} - {*COMMITS, *SELDOM, *REQUESTS}
        assert not unknown, f"crash points that are in no list: {unknown}"
        if self._at.name is not None and self._at.name not in names:
            return None
        self._count += 1
        return (self._at.name or next(iter(names))) if self._count == self._wanted else None

    @contextmanager
    def _next_one_if_it_fails(self, is_meant: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Without a commit or an answer there is no "after": then the next one is meant, however
        many were begun meanwhile."""
        try:
            yield
        except BaseException:
            if is_meant():
                self._wanted = self._count + 1
            raise

    def _die(self, when: When, name: str) -> None:
        """End this process as a power cut would, leaving word of where it was."""
        if when == self._at.when:
            os.write(2, f"killed {when} {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # in no case does this thread go on


def _applies(work: Callable[[Any], Any]) -> bool:
    function = work.func if isinstance(work, partial) else work
    return function.__qualname__ == "Applier.apply_waiting"


def names_of(work: Callable[[Any], Any]) -> set[str]:
    """What a write is called: after the store's function that made it, or what the writer takes."""
    function = work.func if isinstance(work, partial) else work
    module = function.__module__.rpartition(".")[2]
    if module == "writer":
        return {f"writer: {_kind(entry)}" for entry in work.args[0]}
    name = function.__qualname__.partition(".")[0].lstrip("_")
    if (module, name) == ("deliveries", "store"):
        return {"inbox: store"}
    return {f"{module}.{re.sub('_(sqlite|postgres)$', '', name)}"}


def _kind(entry: Entry) -> str:
    """What an entry reports of a run, or else what it is."""
    return entry.observation.source.value if isinstance(entry, Observed) else "nothing seen"
