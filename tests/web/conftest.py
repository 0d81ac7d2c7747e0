"""Fixtures: the services on a database of the test's own, and the application served over them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.web.callbacks import SECRET
from tests.web.serving import serving
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.web.app import build_app
from tracker.web.http.limits import Limits


@dataclass(frozen=True, slots=True)
class Site:
    """A served application: where it is, what is behind it, and a client that keeps the rules."""

    base_url: str
    services: Services
    client: httpx.AsyncClient


Serve = Callable[..., AbstractAsyncContextManager[Site]]


@asynccontextmanager
async def _serve(
    database_url: str, *, limits: Limits | None = None, port: int = 0, **more: Any
) -> AsyncIterator[Site]:
    settings = Settings(
        tracker_database_url=database_url, **({"flora_webhook_secret": SECRET} | more)
    )
    async with (
        open_services(settings, background=False) as services,
        serving(build_app(services, limits=limits), port, limits=limits) as base_url,
        httpx.AsyncClient(base_url=base_url, timeout=20) as client,
    ):
        yield Site(base_url, services, client)


@pytest.fixture
def serve() -> Serve:
    """Serves the application on the database at a URL, with any settings and limits."""
    return _serve


@pytest.fixture
async def site(database_url: str) -> AsyncIterator[Site]:
    """The application as it is by default, once on each engine."""
    async with _serve(database_url) as site:
        yield site


@pytest.fixture
async def small_site(sqlite_url: str) -> AsyncIterator[Site]:
    """The application on SQLite, for what has nothing to do with the engine."""
    async with _serve(sqlite_url) as site:
        yield site
