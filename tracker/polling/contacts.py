"""Whether FLORA answers in each workspace, the same in all processes.

Each process stores what its requests have shown, and reads what the others have stored, so that all
of them say the same about FLORA, also one that asks nothing itself. A worker asks FLORA where no
process has asked for `PROBE_IDLE_AFTER`: few requests show its absence within a minute.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Self

from tracker.core.contact import ContactState, joined
from tracker.core.errors import FloraError
from tracker.core.log import get_logger
from tracker.core.waiting import cancel, repeat
from tracker.polling.history import attributed_page
from tracker.store.queries import workspaces
from tracker.workspaces import Service, Workspace

PROBE_FAILING_AFTER: Final = 15.0
"""Seconds after the last request after which a FLORA that failed is asked again."""
PROBE_IDLE_AFTER: Final = 25.0
"""The same for one that answered, by the requests of all processes."""
PROBE_SECONDS: Final = 10.0
"""How long a probe may take, repetitions included."""
KEEP_TICK: Final = 0.5
"""Seconds within which a long-running process stores a change."""
KEEP_EVERY: Final = timedelta(seconds=20)
"""How often the time of the last request is stored while nothing else changes."""

log = get_logger(__name__)


@dataclass(kw_only=True, eq=False)
class Contacts(Service):
    """The workspaces' connections to FLORA. With `background` they are stored all the time, else
    when it is closed."""

    background: bool

    def __post_init__(self) -> None:
        self._stored: Mapping[str, ContactState] = {}
        self._kept: dict[str, ContactState] = {}
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self.background:
            keeping = repeat("contacts", self._keep_next)
            self._keeping = asyncio.create_task(keeping, name="contacts")
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel(self._keeping)
        await self.keep()

    def of(self, workspace: Workspace) -> ContactState | None:
        """What is known of a workspace, by this process and what was last read; `None` if nothing
        is."""
        stored = self._stored.get(workspace.place)
        own = workspace.client.state if workspace.client else None
        return joined(stored, own) if stored and own else own or stored

    async def read(self) -> None:
        """Read what all processes have stored. Raises `StoreUnavailable`."""
        await self.workspaces.recall()
        self._stored = await workspaces.stored_contacts(self.database, now=self.clock())

    async def keep(self) -> None:
        """Store what this process has seen since it last did. Raises `StoreUnavailable`."""
        for workspace in self.workspaces:
            own = workspace.client.state if workspace.client else None
            if own is not None and _is_news(own, self._kept.get(workspace.place)):
                await workspaces.keep_contact(self.database, workspace.place, own, now=self.clock())
                self._kept[workspace.place] = own

    async def probe(self) -> None:
        """Read the newest run of each workspace where FLORA's last answer was a failure, or where
        it has not been asked for a while. Raises `StoreUnavailable`."""
        keyed = self.workspaces.keyed
        if any(self._is_due(one) for one in keyed):
            await self.read()  # another process may have asked
        await asyncio.gather(*(_probe(one) for one in keyed if self._is_due(one)))

    def _is_due(self, workspace: Workspace) -> bool:
        client, others = workspace.require_client(), self._stored.get(workspace.place)
        if client.contact.failing or client.breaker.open:
            return client.contact.idle_seconds >= PROBE_FAILING_AFTER
        if client.contact.idle_seconds < PROBE_IDLE_AFTER:
            return False
        idle = timedelta(seconds=PROBE_IDLE_AFTER)
        return others is None or self.clock() - others.asked_at >= idle

    async def _keep_next(self) -> None:
        await self.keep()
        await asyncio.sleep(KEEP_TICK)


async def _probe(workspace: Workspace) -> None:
    with suppress(FloraError):  # the client has taken note of it
        page = await workspace.require_client().history(limit=1, deadline=PROBE_SECONDS)
        attributed_page(workspace, page.items)


def _is_news(own: ContactState, kept: ContactState | None) -> bool:
    if kept is None or abs(own.asked_at - kept.asked_at) >= KEEP_EVERY:  # a clock may be set back
        return True
    # Each failed request has another reason: that is no news.
    was, now = (
        (one.answered_at is None, one.trouble and (one.trouble.trouble, one.trouble.since))
        for one in (kept, own)
    )
    return was != now
