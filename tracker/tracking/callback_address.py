"""Where FLORA is asked to send the callback of a start: to an address of the start's own.

A proxy may pass on the exact path `/callbacks/flora` alone, so that every callback to a start's own
address is lost. After five that did not come new starts get the bare address again, for an hour.
"""

import secrets
import time
from typing import Final

import structlog

from tracker.core.clock import Clock
from tracker.store import callback_addresses
from tracker.store.engine import Database

ASK_EVERY: Final = 15.0
"""Seconds for which what the database says is believed."""

log = structlog.get_logger(__name__)


def new_token() -> str:
    """The last part of a start's own callback address: nobody can guess it."""
    return secrets.token_urlsafe(24)


class CallbackAddresses:
    """Gives addresses. `url` is the bare one; `None` where FLORA cannot reach this service."""

    def __init__(self, database: Database, *, url: str | None, clock: Clock) -> None:
        self._database = database
        self._url = url
        self._clock = clock
        self._asked_at = float("-inf")
        self.is_bare = False

    async def of(self, token: str | None) -> str | None:
        """The address for a start with that token. Raises `StoreUnavailable`."""
        if self._url is None or token is None:
            return self._url
        if time.monotonic() - self._asked_at >= ASK_EVERY:
            was_bare = self.is_bare
            self.is_bare = await callback_addresses.own_are_missing(
                self._database, now=self._clock()
            )
            self._asked_at = time.monotonic()
            if self.is_bare and not was_bare:
                log.error(
                    "callbacks.own_addresses_missing",
                    count=callback_addresses.MISSING,
                    advice=f"let {self._url}/ and everything below it through; `tracker doctor` "
                    "tries both",
                )
        return self._url if self.is_bare else f"{self._url}/{token}"
