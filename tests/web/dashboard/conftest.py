"""Fixtures: a site with a token, and a client that has signed in."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.web.conftest import Serve, Site

TOKEN = "a-token-of-the-tests"
HTML = {"Accept": "text/html"}


async def sign_in(client: httpx.AsyncClient, token: str = TOKEN, **query: str) -> httpx.Response:
    """Send the sign-in's form, as a browser does."""
    return await client.post("/login", data={"token": token}, params=query)


def csrf_of(page: str) -> str:
    """The token that a page shows with what it sends."""
    found = re.search(r'"X-CSRF-Token": "([^"]*)"', page)
    assert found is not None
    return found[1]


@pytest.fixture
async def closed(serve: Serve, sqlite_url: str) -> AsyncIterator[Site]:
    """A site with a token, before the sign-in."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        yield site


@pytest.fixture
async def browser(closed: Site) -> httpx.AsyncClient:
    """A client that has signed in, and asks as browsers do."""
    assert (await sign_in(closed.client)).status_code == 303
    closed.client.headers.update(HTML)
    return closed.client
