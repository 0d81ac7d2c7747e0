"""Fixtures: the services on a database of the test's own, and the application served over them."""

import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.web.callbacks import SECRET
from tests.web.described import check_described
from tests.web.mounting import PREFIX, Unmounted, hosting
from tests.web.serving import serving
from tracker.services import Services, open_services
from tracker.settings import Settings
from tracker.web.app import Mounted, build_app
from tracker.web.http import Limits


@dataclass(frozen=True, slots=True)
class Site:
    """A served application: where it is, what is behind it, and a client that keeps the rules."""

    base_url: str
    services: Services
    client: httpx.AsyncClient
    another: Callable[..., httpx.AsyncClient]
    """Makes a client that is not signed in."""


Serve = Callable[..., AbstractAsyncContextManager[Site]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each HTTP test runs with the application alone or mounted in another one, as its name
    decides, so that each has half of the tests; with both where it has the mark `served_twice`,
    because addresses are its subject, or all are asked for with `--every-database`. With the mark
    `alone` it is about our own server, which is not there where the application is mounted."""
    test = metafunc.definition
    if "is_mounted" not in metafunc.fixturenames or test.get_closest_marker("alone") is not None:
        return
    ways = {"alone": False, "mounted": True}
    every = metafunc.config.getoption("every_database")
    if not every and test.get_closest_marker("served_twice") is None:
        # Another bit of it than chooses the database: each of them is served in both ways.
        chosen = ("alone", "mounted")[zlib.crc32(metafunc.function.__name__.encode()) >> 2 & 1]
        ways = {chosen: ways[chosen]}
    metafunc.parametrize("is_mounted", list(ways.values()), ids=list(ways))


@pytest.fixture(autouse=True)
def _patient(patient: None) -> None:
    """How long the store waits for a database has its tests elsewhere."""


@pytest.fixture
def is_mounted() -> bool:
    """Whether the application is mounted in another one."""
    return False


@pytest.fixture
def serve(is_mounted: bool) -> Serve:
    """Serves the application on the database at a URL, with any settings and limits."""

    @asynccontextmanager
    async def serve(
        database_url: str, *, limits: Limits | None = None, port: int = 0, **more: Any
    ) -> AsyncIterator[Site]:
        settings = Settings(
            tracker_database_url=database_url, **({"flora_webhook_secret": SECRET} | more)
        )
        async with open_services(settings, background=False) as services, AsyncExitStack() as stack:
            if is_mounted:
                mounted = Mounted(lambda app: nullcontext())
                await stack.enter_async_context(mounted.serving(services, limits=limits))
                address = await stack.enter_async_context(hosting(mounted, port))
            else:
                app = build_app(services, limits=limits)
                address = await stack.enter_async_context(serving(app, port, limits=limits))

            def client(**options: Any) -> httpx.AsyncClient:
                transport = Unmounted() if is_mounted else None
                given = {"base_url": address, "timeout": 20, "transport": transport}
                hooks = {"response": [check_described]}
                return httpx.AsyncClient(event_hooks=hooks, **given | options)

            async with client() as one:
                yield Site(address + (PREFIX if is_mounted else ""), services, one, client)

    return serve


@pytest.fixture
async def site(serve: Serve, database_url: str) -> AsyncIterator[Site]:
    """The application as it is by default, once on each engine."""
    async with serve(database_url) as site:
        yield site


@pytest.fixture
async def small_site(serve: Serve, sqlite_url: str) -> AsyncIterator[Site]:
    """The application on SQLite, for what has nothing to do with the engine."""
    async with serve(sqlite_url) as site:
        yield site
