"""What the HTTP side needs of the rest of the tracker, named so that a test can build it.

`tracker.services` makes the real ones; a test hands over a real database and receiver of its own.
"""

from collections.abc import Callable
from typing import Protocol

from starlette.types import ASGIApp

from tracker.core.clock import Clock
from tracker.core.record import Record
from tracker.core.tokens import Tokens
from tracker.explaining.explainer import Explanation
from tracker.polling.workspaces import Workspaces
from tracker.receiving.receive import Received
from tracker.receiving.replay import Replay
from tracker.starting.start import Started, StartRequest
from tracker.starting.track import Tracked
from tracker.store.engine import Database
from tracker.store.queries.audit import Refusals
from tracker.store.queries.spending import Usage
from tracker.store.queries.techniques import TechniqueRow
from tracker.store.signals import Signals


class WebSettings(Protocol):
    """The settings that are about the HTTP side."""

    @property
    def access_tokens(self) -> Tokens:
        """What `/api`, the pages and the metrics are opened with; without any only this machine is
        served."""

    @property
    def is_public(self) -> bool:
        """Whether we are reached from outside."""

    @property
    def tracker_public_url(self) -> str | None:
        """Where we are reached from outside."""

    @property
    def flora_base_url(self) -> str:
        """Where FLORA is."""

    @property
    def callback_url(self) -> str | None:
        """Where FLORA is told to post."""


class Rotates(Protocol):
    """The secrets that are in force."""

    @property
    def tokens(self) -> Tokens:
        """The access tokens."""

    def check(self) -> bool:
        """Look whether secrets have changed; whether any has."""


class Receives(Protocol):
    """The use case behind `POST /callbacks/flora`."""

    async def receive(
        self,
        body: bytes,
        *,
        signature: str | None,
        webhook_id: str | None,
        token: str | None = None,
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


class Budgets(Protocol):
    """What the budgets have left."""

    async def usages(self) -> list[Usage]:
        """How far each of them is used; raises `StoreUnavailable`."""


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


class Finds(Protocol):
    """The use case behind `GET /api/techniques/{technique}`."""

    async def find(self, technique: str) -> TechniqueRow | None:
        """A technique by id or slug; raises `FloraError` and `StoreUnavailable`."""


class Reads(Protocol):
    """The use case behind "check now"."""

    async def read_now(self, record: Record) -> Record:
        """Reads one run at once; raises `StoreUnavailable`."""


class Replays(Protocol):
    """The use case behind "replay"."""

    async def replay(self, delivery_id: str) -> Replay:
        """Reads a quarantined delivery again; raises `UnknownDelivery` and `StoreUnavailable`."""


class Explains(Protocol):
    """The use case behind "what happened"."""

    async def explain(self, run_id: str) -> Explanation | None:
        """How a run came to be known; `None` for one that is not."""


class Tells(Protocol):
    """What is counted, and how that is told."""

    def callback_taken(self, received: Received, seconds: float) -> None:
        """Counts a callback that was committed, `seconds` after its headers came."""

    def callback_refused(self, reason: str) -> None:
        """Counts one that was not kept. Reasons are few, and fixed."""

    def auth_refused(self, reason: str) -> None:
        """Counts a request that was refused for who sent it. Reasons are few, and fixed."""

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """The text for Prometheus, and its content type."""


class Services(Protocol):
    """All that `build_app` is given."""

    @property
    def settings(self) -> WebSettings:
        """The settings that the process began with."""

    @property
    def rotation(self) -> Rotates:
        """The secrets in force."""

    @property
    def database(self) -> Database:
        """The database, for reading."""

    @property
    def signals(self) -> Signals:
        """Says when runs change."""

    @property
    def catalogue(self) -> Finds:
        """Knows the techniques."""

    @property
    def receiver(self) -> Receives:
        """Takes callbacks."""

    @property
    def starter(self) -> Starts:
        """Starts runs."""

    @property
    def budgets(self) -> Budgets:
        """Tells how far the budgets are used."""

    @property
    def tracker(self) -> Tracks:
        """Takes runs that were started elsewhere."""

    @property
    def poller(self) -> Reads:
        """Reads a run now."""

    @property
    def replayer(self) -> Replays:
        """Reads a stored callback again."""

    @property
    def explainer(self) -> Explains:
        """Tells how a run came to be known."""

    @property
    def workspaces(self) -> Workspaces:
        """The configured workspaces."""

    @property
    def traced(self) -> Callable[[ASGIApp], ASGIApp]:
        """Puts the layer of OpenTelemetry around an application, if there is one."""

    @property
    def metrics(self) -> Tells:
        """Counts, and tells."""

    @property
    def refusals(self) -> Refusals:
        """Notes refused requests in the audit log."""

    @property
    def clock(self) -> Clock:
        """The time."""
