"""Who may see what: closed by default, open where FLORA and a load balancer have to come in."""

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.web.conftest import Serve
from tracker.web.answers import Json
from tracker.web.auth import Gate
from tracker.web.edge import Edge
from tracker.web.limits import Limits

TOKEN = "a-token-of-the-tests"
CLOSED = ["/api/runs", "/api/anything", "/", "/metrics", "/openapi.json", "/healthz/", "//healthz"]
OPEN = ["/healthz", "/readyz", "/callbacks/flora"]


async def _inside(scope: Scope, receive: Receive, send: Send) -> None:
    await Json({"inside": True})(scope, receive, send)


def _client(token: str | None, **more: object) -> httpx.AsyncClient:
    gate = Gate(_inside, token=token, **more)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(Edge(gate, limits=Limits()))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize("path", CLOSED)
async def test_a_token_opens_what_is_closed(path: str) -> None:
    """With a token set everything but the named paths needs it, and a 401 says how to show it."""
    async with _client(TOKEN) as client:
        refused = await client.get(path)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "unauthorized"
        let_in = await client.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
        assert let_in.status_code == 200


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("token", [None, TOKEN])
async def test_callbacks_and_health_need_nothing(path: str, token: str | None) -> None:
    """FLORA has no token, and comes from outside under any name."""
    async with _client(token) as client:
        answer = await client.get(path, headers={"Host": "tracker.example.com"})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"BEARER  {TOKEN} ", 200),
        ("Bearer", 401),
        ("Bearer ", 401),
        (TOKEN, 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Bearer {TOKEN.upper()}", 401),
        ("Bearer \xff", 401),
    ],
)
async def test_only_the_whole_token_counts(value: str, status: int) -> None:
    """The scheme's case does not matter, every character of the token does."""
    async with _client(TOKEN) as client:
        answer = await client.get("/api/runs", headers={"Authorization": value.encode("latin-1")})
        assert answer.status_code == status


async def test_two_tokens_are_none() -> None:
    """A request that shows two things is not guessed about."""
    async with _client(TOKEN) as client:
        headers = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer other")]
        assert (await client.get("/api/runs", headers=headers)).status_code == 401


async def test_another_pass_lets_in_as_well() -> None:
    """A sign-in can be added beside the token; without a token there is nothing to sign in with."""

    def by_cookie(scope: Scope) -> bool:
        return (b"cookie", b"signed-in") in scope["headers"]

    async with _client(TOKEN, passes=[by_cookie]) as client:
        answer = await client.get("/api/runs", headers={"Cookie": "signed-in"})
        assert answer.status_code == 200
        assert (await client.get("/api/runs")).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("tracker.localhost:8000", 200),
        ("localhost.", 200),
        ("127.0.0.1", 200),
        ("127.8.9.10:80", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("tracker.example.com", 403),
        ("localhost.example.com", 403),
        ("127.0.0.1.example.com", 403),
        ("192.168.1.4:8000", 403),
        ("0.0.0.0", 403),
        ("[::]:8000", 403),
        ("localhost@example.com", 403),
        ("example.com@localhost", 403),
        ("localhost/path", 403),
        ("localhost:port", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
async def test_without_a_token_only_this_machine_is_served(host: str, status: int) -> None:
    """A page whose own name was pointed at 127.0.0.1 sends that name, and is refused."""
    async with _client(None) as client:
        answer = await client.get("/api/runs", headers={"Host": host})
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["code"] == "forbidden"
            assert "TRACKER_API_TOKEN" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "origins", "status"),
    [
        ("POST", [], 200),
        ("POST", ["http://localhost:8000"], 200),
        ("POST", ["http://localhost:3000"], 403),
        ("POST", ["https://example.com"], 403),
        ("POST", ["null"], 403),
        ("POST", ["http://localhost:8000", "https://example.com"], 403),
        ("GET", ["http://localhost:8000"], 200),
        ("GET", ["https://example.com"], 403),  # its script would ask FLORA through us
    ],
)
async def test_without_a_token_another_page_asks_for_nothing(
    method: str, origins: list[str], status: int
) -> None:
    """A browser sends a foreign page's form to loopback too: what it would start costs money."""
    async with _client(None) as client:
        headers = [("Host", "localhost:8000"), *(("Origin", origin) for origin in origins)]
        answer = await client.request(method, "/api/runs", headers=headers)
        assert answer.status_code == status


async def test_the_whole_application_is_behind_the_gate(serve: Serve, sqlite_url: str) -> None:
    """The token of the settings is what opens the served application."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        assert (await site.client.get("/api/runs")).status_code == 401
        assert (await site.client.post("/api/runs", content=b"x" * 100_000)).status_code == 401
        assert (await site.client.get("/readyz")).status_code == 200
        shown = {"Authorization": f"Bearer {TOKEN}"}
        assert (await site.client.get("/api/runs", headers=shown)).status_code == 200
