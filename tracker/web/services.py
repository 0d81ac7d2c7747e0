"""What the HTTP side needs of the rest of the tracker, named so that a test can build it.

`tracker.wiring` makes the real ones; a test hands over a real database and receiver of its own.
"""

from collections.abc import Iterable
from typing import Protocol

from pydantic import SecretStr

from tracker.core.clock import Clock
from tracker.store.engine import Database
from tracker.tracking.receive import Received
from tracker.tracking.start import Started, StartRequest
from tracker.tracking.track import Tracked
from tracker.tracking.workspaces import Workspace


class WebSettings(Protocol):
    """The settings that are about the HTTP side."""

    @property
    def tracker_api_token(self) -> SecretStr | None:
        """What `/api` and the pages are opened with; without one only loopback is served."""

    @property
    def callback_url(self) -> str | None:
        """Where FLORA is told to post."""


class Receives(Protocol):
    """The use case behind `POST /callbacks/flora`."""

    async def receive(
        self, body: bytes, *, signature: str | None, webhook_id: str | None
    ) -> Received:
        """Returns when the delivery is committed.

        Raises `SignatureError`, `SettingsError` where there is no secret, and `StoreUnavailable`.
        """


class Starts(Protocol):
    """The use case behind `POST /api/runs`."""

    async def start(self, request: StartRequest) -> Started:
        """Starts a run once.

        Raises `StartError`, `FloraError`, `StoreUnavailable` and `SettingsError`.
        """


class Tracks(Protocol):
    """The use case behind `POST /api/runs/track`."""

    async def track(
        self,
        run_id: str,
        *,
        technique: str | None,
        workspace_id: str | None,
        poll_url: str | None,
    ) -> Tracked:
        """Tracks a run started elsewhere; raises `InvalidRequest` and `StoreUnavailable`."""


class Services(Protocol):
    """All that `build_app` is given."""

    @property
    def settings(self) -> WebSettings:
        """The settings."""

    @property
    def database(self) -> Database:
        """The database, for reading."""

    @property
    def receiver(self) -> Receives:
        """Takes callbacks."""

    @property
    def starter(self) -> Starts:
        """Starts runs."""

    @property
    def tracker(self) -> Tracks:
        """Takes runs that were started elsewhere."""

    @property
    def workspaces(self) -> Iterable[Workspace]:
        """The configured workspaces."""

    @property
    def clock(self) -> Clock:
        """The time."""
