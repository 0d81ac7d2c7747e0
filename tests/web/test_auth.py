"""Who may see what: closed by default, open where FLORA and a load balancer have to come in."""

import json
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.support.scraping import read_scrape
from tests.support.waiting import eventually, let_pass
from tests.web.callbacks import PATH, event, signed
from tests.web.conftest import Serve
from tests.web.flora import START, with_flora
from tests.web.streaming import following
from tracker.core.clock import utc_now
from tracker.settings import TokenSettings
from tracker.settings.tokens import Scope as TokenScope
from tracker.settings.tokens import Token, Tokens
from tracker.store.queries.audit import list_audit
from tracker.web.app import ResponseMiddleware, build_app
from tracker.web.auth import ALL_BURST, EACH_BURST, AccessControl, AuthMiddleware, ScopedRoute
from tracker.web.http import Limits
from tracker.web.http.request import network_of
from tracker.web.http.responses import Json
from tracker.web.sessions import Sessions

TOKEN = "a-token-of-the-tests"
CLOSED = ["/api/runs", "/api/anything", "/", "/metrics", "/openapi.json", "/healthz/", "//healthz"]
OPEN = ["/healthz", "/readyz", "/callbacks/flora", "/callbacks/flora/some-token"]


async def _inside(scope: Scope, receive: Receive, send: Send) -> None:
    await Json({"inside": True})(scope, receive, send)


class _NotCounted:
    def count(self, name: str, reason: str) -> None:
        """Does nothing."""


class _NotNoted:
    def add(self, reason: str, **more: object) -> None:
        """Does nothing."""


def _without_refill(access: AccessControl) -> AccessControl:
    """However long a test takes to guess, no further guess is due meanwhile."""
    for throttle in (access._each, access._all):
        throttle._monotonic = lambda: 0.0
    return access


def _token(name: str, *scopes: str, value: str = TOKEN, **more: object) -> Token:
    return Token(
        name=name,
        value=value,
        scopes=frozenset(map(TokenScope, scopes or ["admin"])),
        **more,  # type: ignore[arg-type]
    )


def _client(
    tokens: str | Iterable[Token] | None,
    *,
    is_public: bool = False,
    client: tuple[str, int] = ("127.0.0.1", 123),
    routes: Sequence[ScopedRoute] = (),
) -> httpx.AsyncClient:
    """A client of a gate with these tokens, in front of `routes`; of a session's database nothing
    is asked."""
    given = [_token("only", value=tokens)] if isinstance(tokens, str) else tokens or ()
    in_force = Tokens(given)
    access = AccessControl(
        tokens=lambda: in_force,
        refresh=lambda: False,
        is_public=is_public,
        sessions=Sessions(
            None,  # type: ignore[arg-type]
            tokens=lambda: in_force,
            public_url=None,
            clock=utc_now,
        ),
        refusals=_NotNoted(),  # type: ignore[arg-type]
        metrics=_NotCounted(),
        clock=utc_now,
    )
    transport = httpx.ASGITransport(
        ResponseMiddleware(
            AuthMiddleware(_inside, access=_without_refill(access), routes=routes),
            limits=Limits(),
        ),
        client=client,
    )
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


@pytest.mark.parametrize(
    "header",
    [
        ("Forwarded", "for=198.51.100.7"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Anything", ""),
        ("X-Real-IP", "127.0.0.1"),
        ("Via", "1.1 proxy"),
        ("X-Forwarded", "for=198.51.100.7"),
        ("X_Forwarded_For", "127.0.0.1"),
        ("X-Real_IP", "127.0.0.1"),
    ],
)
async def test_without_a_token_what_a_proxy_passes_on_is_refused(header: tuple[str, str]) -> None:
    """A proxy on this machine asks under a loopback name, for others: they need a token."""
    async with _client(None) as client:
        assert (await client.get("/api/runs")).status_code == 200
        answer = await client.get("/api/runs", headers=[header])
        assert answer.status_code == 403
        assert "TRACKER_API_TOKEN" in answer.json()["error"]["message"]
    async with _client(TOKEN) as client:
        shown = [header, ("Authorization", f"Bearer {TOKEN}")]
        assert (await client.get("/api/runs", headers=shown)).status_code == 200


async def test_without_a_token_only_a_loopback_address_is_served() -> None:
    """Whatever `Host` says: the address that was connected to may be reached from elsewhere."""
    async with _client(None) as client:
        answer = await client.get("http://192.0.2.1/api/runs", headers={"Host": "localhost"})
        assert answer.status_code == 403


@pytest.mark.parametrize("path", CLOSED)
async def test_a_public_url_without_a_token_closes_everything(path: str) -> None:
    """Other machines are meant to reach it, by a proxy that need not show itself."""
    async with _client(None, is_public=True) as client:
        answer = await client.get(path)
        assert answer.status_code == 403
        assert "TRACKER_API_TOKEN" in answer.json()["error"]["message"]
        for path in OPEN:
            assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("public", ["https://tracker.example.com", None])
async def test_a_bare_proxy_in_front_does_not_open_it(
    serve: Serve, database_url: str, public: str | None
) -> None:
    """A proxy that sends a loopback `Host` and names whom it asks for lets nobody in, and nothing
    is started; callbacks and health pass."""
    headers = {} if public else {"X-Forwarded-For": "198.51.100.7"}
    async with serve(database_url, tracker_public_url=public) as site:
        for path in ("/", "/api/runs", "/metrics", "/openapi.json", "/login", "/static/style.css"):
            answer = await site.client.get(path, headers=headers)
            assert answer.status_code == 403, path
        started = await site.client.post("/api/runs", json=START, headers=headers)
        assert started.status_code == 403
        assert "TRACKER_API_TOKEN" in started.json()["error"]["message"]
        body = event()
        taken = await site.client.post(PATH, content=body, headers=signed(body) | headers)
        assert taken.status_code == 200
        ready = await site.client.get("/readyz", headers=headers)
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


GET, POST = "GET", "POST"


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        ("read", {(GET, "/"), (GET, "/api/runs"), (GET, "/openapi.json"), (GET, "/api/stream")}),
        ("metrics", {(GET, "/metrics")}),
        (
            "start",
            {
                *[(GET, "/"), (GET, "/api/runs"), (GET, "/openapi.json"), (GET, "/api/stream")],
                *[(POST, "/api/runs"), (POST, "/api/runs/track"), (POST, "/runs/a/b/check")],
            },
        ),
        (
            "admin",
            {
                *[(GET, "/"), (GET, "/api/runs"), (GET, "/openapi.json"), (GET, "/api/stream")],
                *[(POST, "/api/runs"), (POST, "/api/runs/track"), (POST, "/runs/a/b/check")],
                *[(GET, "/metrics"), (POST, "/deliveries/a/replay"), (POST, "/api/new/thing")],
            },
        ),
    ],
)
async def test_a_token_does_what_its_scopes_say(
    serve: Serve, sqlite_url: str, scope: str, allowed: set[tuple[str, str]]
) -> None:
    """`start` includes `read`, `admin` all; what changes something and is not named needs `admin`;
    the answer says which scope is lacking."""
    everything = {
        *[(GET, "/"), (GET, "/api/runs"), (GET, "/openapi.json"), (GET, "/api/stream")],
        *[(POST, "/api/runs"), (POST, "/api/runs/track"), (POST, "/runs/a/b/check")],
        *[(GET, "/metrics"), (POST, "/deliveries/a/replay"), (POST, "/api/new/thing")],
    }
    async with serve(sqlite_url) as site:
        routes = build_app(site.services).routes
    async with _client([_token("one", scope)], routes=routes) as client:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        answers = {ask: await client.request(*ask) for ask in everything}
    assert {ask for ask, answer in answers.items() if answer.status_code == 200} == allowed
    for ask, answer in answers.items():
        if ask not in allowed:
            assert answer.status_code == 403
            assert "one may not do this: it needs the scope" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("peer", "unit"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::"),
        ("fe80::1:2:3:4%eth0", "fe80::"),
        ("::ffff:198.51.100.7", "::ffff:198.51.100.7"),
        ("a socket", "a socket"),
    ],
)
def test_guesses_count_by_network(peer: str, unit: str) -> None:
    """Of IPv6 by what one subscriber has, who could change the address with each guess."""
    assert network_of({"client": (peer, 1)}) == unit


async def test_a_token_expires() -> None:
    """From its day on it is refused, and the answer says why; others go on."""
    past, future = utc_now() - timedelta(seconds=1), utc_now() + timedelta(hours=1)
    old = _token("old", value="o" * 16, expires=past)
    new = _token("new", value="n" * 16, expires=future)
    async with _client([old, new]) as client:
        refused = await client.get("/api/runs", headers={"Authorization": f"Bearer {'o' * 16}"})
        assert refused.status_code == 401
        assert "old has expired" in refused.json()["error"]["message"]
        taken = await client.get("/api/runs", headers={"Authorization": f"Bearer {'n' * 16}"})
        assert taken.status_code == 200
    async with _client([old]) as client:  # closed all the same
        assert (await client.get("/api/runs")).status_code == 401


async def test_guesses_are_slowed_down_and_the_right_token_is_not() -> None:
    """After a burst of wrong tokens their sender is told to wait, and cut off; whoever shows the
    right one is served in the middle of it, from the same address too."""
    right = {"Authorization": f"Bearer {TOKEN}"}
    async with _client(TOKEN) as client:
        for number in range(EACH_BURST):
            wrong = {"Authorization": f"Bearer guess-{number}"}
            assert (await client.get("/api/runs", headers=wrong)).status_code == 401
        for number in range(50):
            wrong = {"Authorization": f"Bearer other-{number}"}
            answer = await client.get("/readyz" if number % 2 else "/api/runs", headers=wrong)
            if number % 2 == 0:
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "too_many_attempts"
                assert 1 <= int(answer.headers["Retry-After"]) <= 6
                assert answer.headers["Connection"] == "close"
            assert (await client.get("/api/runs", headers=right)).status_code == 200


async def test_guesses_from_everywhere_are_slowed_down_together() -> None:
    """Who has many addresses has no more than a hundred tries at once."""
    in_force = Tokens([_token("only")])
    counted: list[str] = []

    class Counted:
        def count(self, name: str, reason: str) -> None:
            counted.append(reason)

    access = AccessControl(
        tokens=lambda: in_force,
        refresh=lambda: False,
        is_public=True,
        sessions=None,  # type: ignore[arg-type]
        refusals=_NotNoted(),  # type: ignore[arg-type]
        metrics=Counted(),
        clock=utc_now,
    )
    app = ResponseMiddleware(
        AuthMiddleware(_inside, access=_without_refill(access)), limits=Limits()
    )
    statuses = []
    for number in range(ALL_BURST + 20):
        transport = httpx.ASGITransport(app, client=(f"198.51.{number % 100}.{number // 100}", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/", headers={"Authorization": f"Bearer {number:020}"})
            statuses.append(answer.status_code)
    assert statuses == [401] * ALL_BURST + [429] * 20
    assert counted == ["wrong"] * len(statuses)


async def test_refusals_are_counted_and_logged_without_flooding(
    serve: Serve, sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A metric counts each by its reason; the log has a line for many, and no token in it."""
    from tracker.operations.telemetry import configure_logs

    configure_logs(format="json", level="info", secrets=())
    narrow = TokenSettings(name="grafana", token="g" * 20, scopes={"read", "metrics"})
    async with serve(sqlite_url, tracker_api_token=TOKEN, tokens=(narrow,)) as site:
        reader = {"Authorization": f"Bearer {'g' * 20}"}
        for number in range(60):
            wrong = {"Authorization": f"Bearer guessed-{number}"}
            await site.client.get("/api/runs", headers=wrong)
        await site.client.get("/api/runs")
        assert (await site.client.post("/api/runs", json=START, headers=reader)).status_code == 403
        found = read_scrape((await site.client.get("/metrics", headers=reader)).text)
    refused = "tracker_auth_refused_total"
    assert found.value(refused, reason="wrong") == 60
    assert found.value(refused, reason="missing") == 1
    assert found.value(refused, reason="scope") == 1
    assert found.value(refused, reason="expired") == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [line for line in lines if line["event"] == "auth.refused"]
    assert [line["reason"] for line in told] == ["wrong", "missing", "scope"]
    assert told[2]["token"] == "grafana"
    assert {line["peer"] for line in told} == {"127.0.0.1"}
    assert all(line["request_id"] for line in told)
    assert "guessed-" not in json.dumps(lines)


async def test_a_start_is_logged_with_who_asked_for_it(
    serve: Serve, sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its token's name, its address, and the request that the other lines are about."""
    from tracker.operations.telemetry import configure_logs

    async with with_flora(serve, sqlite_url, token=TOKEN) as (site, _):
        configure_logs(format="json", level="info", secrets=())
        shown = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": "order-17"}
        started = await site.client.post("/api/runs", json=START, headers=shown)
        assert started.status_code == 201
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    asked, told = [line for line in lines if line["event"].startswith("run.start")]
    assert (asked["event"], asked["technique"]) == ("run.start_requested", "icon-pack")
    assert (told["event"], told["run_id"]) == ("run.started", started.json()["run_id"])
    for line in (asked, told):
        assert line["token"] == "TRACKER_API_TOKEN"
        assert (line["peer"], line["request_id"]) == ("127.0.0.1", "order-17")


async def test_a_path_is_taken_letter_by_letter(serve: Serve, sqlite_url: str) -> None:
    """A line end after it makes it another one, which is not there, and which needs no other
    scope."""
    reader = TokenSettings(name="reader", token="r" * 20, scopes={"read"})
    async with serve(sqlite_url, tokens=(reader,)) as site:
        site.client.headers["Authorization"] = f"Bearer {'r' * 20}"
        for path in ("/metrics%0a", "/api/runs%0a", "/callbacks/flora%0a", "/healthz%0a"):
            assert (await site.client.get(path)).status_code == 404, path
            assert (await site.client.post(path)).status_code in (403, 404), path


async def test_what_another_page_sends_is_counted(serve: Serve, sqlite_url: str) -> None:
    """A form without the session's CSRF token, and a sign-in from elsewhere."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        foreign = {"Origin": "https://evil.example"}
        answer = await site.client.post("/login", data={"token": TOKEN}, headers=foreign)
        assert answer.status_code == 403
        assert (await site.client.post("/login", data={"token": TOKEN})).status_code == 303
        assert (await site.client.post("/logout", data={"csrf_token": "no"})).status_code == 403
        assert (await site.client.post("/api/runs", json=START)).status_code == 401
        shown = {"Authorization": f"Bearer {TOKEN}"}
        found = read_scrape((await site.client.get("/metrics", headers=shown)).text)
    assert found.value("tracker_auth_refused_total", reason="cross_site") == 3


async def test_the_log_counts_those_that_came_after_its_line(
    serve: Serve, sqlite_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a burst that ends before the next line is due, the number is told all the same."""
    from tracker.operations.telemetry import configure_logs

    configure_logs(format="json", level="info", secrets=())
    in_force = Tokens([_token("only")])
    access = AccessControl(
        tokens=lambda: in_force,
        refresh=lambda: False,
        is_public=True,
        sessions=None,  # type: ignore[arg-type]
        refusals=_NotNoted(),  # type: ignore[arg-type]
        metrics=_NotCounted(),
        clock=utc_now,
        log_interval=600,
    )
    app = ResponseMiddleware(AuthMiddleware(_inside, access=access), limits=Limits())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost"
    ) as client:
        for number in range(7):
            await client.get("/", headers={"Authorization": f"Bearer {number:020}"})
    let_pass(601)
    said: list[int] = []

    def all_told() -> bool:
        lines = capsys.readouterr().err.splitlines()
        said.extend(json.loads(line)["count"] for line in lines)
        return sum(said) == 7

    await eventually(all_told)
    assert len(said) <= 3


async def test_health_details_need_a_token(serve: Serve, sqlite_url: str) -> None:
    """Without a token it says only that it is ready; with one, also what FLORA says of the key."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        assert (await site.client.get("/readyz")).json() == {"status": "ready"}
        wrong = {"Authorization": f"Bearer {TOKEN}x"}
        assert (await site.client.get("/readyz", headers=wrong)).json() == {"status": "ready"}
        shown = {"Authorization": f"Bearer {TOKEN}"}
        answer = await site.client.get("/readyz", headers=shown)
        assert answer.json() == {"status": "ready", "flora": "no key is set"}


async def test_a_probe_that_is_answered_counts_as_no_refusal(serve: Serve, sqlite_url: str) -> None:
    """Without a token, a proxy's probe gets no details, and nobody was refused anything."""
    async with serve(sqlite_url) as site:
        assert "flora" in (await site.client.get("/readyz")).json()
        probe = {"X-Forwarded-For": "198.51.100.7"}
        answer = await site.client.get("/readyz", headers=probe)
        assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
        await site.services.refusals.store()
        assert await list_audit(site.services.database, limit=10) == ([], None)
        shown = (await site.client.get("/metrics")).text
        assert 'tracker_auth_refused_total{reason="not_local"} 0.0' in shown


@pytest.mark.parametrize(
    ("by", "change", "status"),
    [
        ("token", {"scopes": frozenset({TokenScope.METRICS})}, 403),
        ("session", {"scopes": frozenset({TokenScope.METRICS})}, 403),
        ("token", {"expires": utc_now()}, 401),
    ],
)
async def test_a_stream_ends_when_its_token_may_no_longer_read(
    serve: Serve, sqlite_url: str, by: str, change: dict[str, Any], status: int
) -> None:
    """Its scopes and its end are looked at again, not only whether the token is still there."""
    limits = Limits(stream_heartbeat=0.1)
    one = TokenSettings(name="one", token=TOKEN, scopes={"read"})
    async with serve(sqlite_url, tokens=(one,), limits=limits) as site:
        if by == "token":
            site.client.headers["Authorization"] = f"Bearer {TOKEN}"
        else:
            await site.client.post("/login", data={"token": TOKEN})
        async with following(site.client) as events:
            less = one.model_copy(update=change)
            settings = site.services.settings.model_copy(update={"tokens": (less,)})
            site.services.rotation.tokens = settings.access_tokens
            assert await events.ended()
        assert (await site.client.get("/api/runs")).status_code == status


async def test_a_stream_ends_when_its_token_is_taken_away(serve: Serve, sqlite_url: str) -> None:
    """What goes on for long is looked at again with each heartbeat."""
    limits = Limits(stream_heartbeat=0.1)
    async with serve(sqlite_url, tracker_api_token=TOKEN, limits=limits) as site:
        site.client.headers["Authorization"] = f"Bearer {TOKEN}"
        async with following(site.client) as events:
            settings = site.services.settings.model_copy(
                update={"tracker_api_token": (), "tokens": (_settings("another"),)}
            )
            site.services.rotation.tokens = settings.access_tokens
            assert await events.ended()
        assert (await site.client.get("/api/runs")).status_code == 401


def _settings(name: str) -> TokenSettings:
    return TokenSettings(name=name, token=f"the-token-of-{name}", scopes={"admin"})


async def test_the_whole_application_is_behind_the_gate(serve: Serve, sqlite_url: str) -> None:
    """The token of the settings is what opens the served application."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        assert (await site.client.get("/api/runs")).status_code == 401
        assert (await site.client.post("/api/runs", content=b"x" * 100_000)).status_code == 401
        assert (await site.client.get("/readyz")).status_code == 200
        shown = {"Authorization": f"Bearer {TOKEN}"}
        assert (await site.client.get("/api/runs", headers=shown)).status_code == 200
