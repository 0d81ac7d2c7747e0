"""Requests that say they are something else: another path, host, method, or page."""

import hmac
import re

import pytest
from starlette.routing import Route

from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import TOKEN, sign_in
from tests.web.serving import Answer, wire
from tests.web.streaming import following
from tracker.core.clock import utc_now
from tracker.core.observation import Observation, Source
from tracker.core.record import Observed
from tracker.settings.tokens import Scope, Token, Tokens
from tracker.store.queries import runs as read
from tracker.web.app import build_app
from tracker.web.auth import EACH_BURST
from tracker.web.http import Limits

MARK = "run_that_only_we_may_see"
CLOSED = ("api/runs", f"api/runs/{MARK}", f"runs/{MARK}", "runs", "metrics", "openapi.json")
DISGUISES = (
    "/{0}",
    "//{0}",
    "///{0}",
    "/./{0}",
    "/x/../{0}",
    "/%2e/{0}",
    "/%2e%2e/{0}",
    "/healthz/../{0}",
    "/healthz/%2e%2e/{0}",
    "/healthz%2f..%2f{0}",
    "/healthz;/{0}",
    "/healthz%00/{0}",
    "/healthz?/../{0}",
    "/healthz#/../{0}",
    "/callbacks/../{0}",
    "/callbacks/%2e%2e/{0}",
    "/callbacks/..%2f{0}",
    "/callbacks/%2e%2e%2f{0}",
    "/callbacks/%252e%252e/{0}",
    "/callbacks/..;/{0}",
    "/callbacks/..%5c{0}",
    "/callbacks//{0}",
    "/static/../{0}",
    "/static/%2e%2e/{0}",
    "/static/x/..%2f..%2f{0}",
    "/login/../{0}",
    "/{0}%00.css",
    "/{0}%20",
    "/{0}/",
    "/{0}%2f",
    "/%61pi/../{0}",
    "http://localhost/healthz/../{0}",
    "http://healthz/{0}",
    "healthz/../{0}",
)

ODD_IDS = (
    *("..", "../../api/runs", "a/b?c=d#e", "%2e%2e%2f", "a\\b", " ", "null", "-1"),
    *("\x1b[2J\r\nSet-Cookie: a=b", "\n", "a\n", "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe"),
    *("\N{ROCKET}" * 255, "run_" + "x" * 251, "a" * 200 + "/check"),
)


async def _ask(site: Site, request: bytes) -> Answer:
    async with wire(site.base_url) as connection:
        await connection.send(request)
        return await connection.answer()


def _get(target: str, *headers: str, host: str = "localhost") -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode()


async def _keep_marked(site: Site) -> None:
    seen = Observation(run_id=MARK, source=Source.HISTORY, at=utc_now())
    await site.services.writer.submit(Observed(observation=seen))


async def test_no_path_bypasses_the_token(serve: Serve, sqlite_url: str) -> None:
    """Dots, slashes, NULs and their escapes open nothing: a path is what it says, letter by
    letter, and all that is not named open needs the token."""
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        await _keep_marked(site)
        for closed in CLOSED:
            for disguise in DISGUISES:
                answer = await _ask(site, _get(disguise.format(closed)))
                target = disguise.format(closed)
                assert answer.status in (200, 303, 400, 401, 404, 405), target
                if answer.status == 200:
                    assert answer.body == b'{"status":"ok"}', target
                assert b"first_seen" not in answer.body, target
                assert b"tracker_" not in answer.body.replace(b"TRACKER_", b""), target
        assert (
            await _ask(site, _get(f"/api/runs/{MARK}", f"Authorization: Bearer {TOKEN}"))
        ).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        ("X-Forwarded-Host: localhost", "X-Forwarded-For: 127.0.0.1"),
        ("Forwarded: for=127.0.0.1;host=localhost;proto=http", "X-Real-IP: 127.0.0.1"),
        ("X-Original-URL: /healthz", "X-Rewrite-URL: /healthz"),
        ("X-Original-Host: localhost", "X-Host: localhost", "X-HTTP-Host-Override: localhost"),
        ("Via: 1.1 localhost", "True-Client-IP: 127.0.0.1", "CF-Connecting-IP: ::1"),
    ],
)
async def test_forwarded_headers_are_not_believed(
    small_site: Site, headers: tuple[str, ...]
) -> None:
    """Without a token only this machine is served, and what a header says of it does not count."""
    for target in ("/", "/api/runs", "/metrics", "http://localhost/api/runs"):
        answer = await _ask(small_site, _get(target, *headers, host="evil.example"))
        assert answer.status in (400, 403), target


async def test_the_host_of_an_absolute_target_counts(small_site: Site) -> None:
    """Without a token, a target that names another host than `Host` is for no certain one; what is
    open to everyone stays open."""
    for host, target, status in (
        ("evil.example", "/api/runs", 403),
        ("evil.example", "/healthz", 200),
        ("evil.example:80", "?", 400),  # no path
        ("user@localhost", "/api/runs", 403),
        ("127.0.0.1", "/api/runs", 403),  # not that of `Host` either
        ("localhost", "/api/runs", 200),
        ("LOCALHOST", "/api/runs?next=http://evil.example/", 200),
    ):
        for scheme in ("http", "https", "ftp"):
            answer = await _ask(small_site, _get(f"{scheme}://{host}{target}"))
            assert answer.status == status, (scheme, host, target)
    alone = b"GET http://%b/api/runs HTTP/1.1\r\n\r\n"
    assert (await _ask(small_site, alone % b"localhost")).status == 200
    assert (await _ask(small_site, alone % b"evil.example")).status == 403
    offer = _get("http://evil.example/api/runs", "Connection: upgrade", "Upgrade: h2c")
    assert (await _ask(small_site, offer)).status == 403


async def test_forwarded_addresses_do_not_add_attempts(serve: Serve, sqlite_url: str) -> None:
    """Who says that they come from elsewhere does not get more tries at the token."""
    slow = Limits(wrong_token_seconds=3600.0)  # none is added meanwhile
    async with serve(sqlite_url, limits=slow, tracker_api_token=TOKEN) as site:
        answers = [
            await site.client.post(
                "/login",
                data={"token": "wrong"},
                headers={"X-Forwarded-For": f"198.51.100.{number}", "Forwarded": f"for={number}"},
            )
            for number in range(EACH_BURST + 1)
        ]
        assert [one.status_code for one in answers] == [401] * EACH_BURST + [429]


@pytest.mark.parametrize("real", ["GET", "HEAD", "OPTIONS"])
async def test_no_header_overrides_the_method(small_site: Site, real: str) -> None:
    """No header and no parameter makes a read change something."""
    names = ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X-Original-Method")
    for target in ("/api/runs/track", "/api/runs/track?_method=POST"):
        answer = await small_site.client.request(
            real, target, headers=dict.fromkeys(names, "POST"), json={"run_id": "run_overridden"}
        )
        assert answer.status_code in (404, 405), target
    assert await read.get_run(small_site.services.database, "run_overridden") is None


async def test_runs_with_hostile_ids_are_shown(site: Site) -> None:
    """A page leads to it and stays within its own addresses; no header is made of it."""
    for run_id in ODD_IDS:
        seen = Observation(run_id=run_id, source=Source.HISTORY, at=utc_now())
        await site.services.writer.submit(Observed(observation=seen))
    assert {run["run_id"] for run in (await site.client.get("/api/runs")).json()["runs"]} == {
        *ODD_IDS
    }
    listed = await site.client.get("/runs", headers={"Accept": "text/html"})
    links = re.findall(r'<a class="id" href="(/runs/[!-~]+)"', listed.text)
    assert len(links) == len(ODD_IDS)
    for link in links:
        shown = await _ask(site, _get(link, "Accept: text/html"))
        assert "set-cookie" not in shown.headers
        if link.endswith("%2Fcheck"):  # its address is that of the action, which leads back
            assert (shown.status, shown.headers["location"]) == (303, link.removesuffix("%2Fcheck"))
        else:
            assert shown.status == 200, link


async def test_no_text_ends_its_stream_event(small_site: Site) -> None:
    """In the stream a run's texts stay within its own data, whatever line ends they hold."""
    forged = "run_1\n\nevent: reset\nid: 9\ndata: {}\r\r\u2028\u2029\x85\x0b"
    async with following(small_site.client) as events:
        seen = Observation(
            run_id=forged, source=Source.HISTORY, at=utc_now(), technique_name=forged
        )
        await small_site.services.writer.submit(Observed(observation=seen))
        event = await events.next()
        assert (event["event"], event["data"]["run"]["run_id"]) == ("run", forged)


def _changing(site: Site) -> list[tuple[str, str]]:
    """Every route that takes more than reads, with something in place of its parameters."""
    return [
        (method, re.sub(r"\{[^}]*\}", "some", route.path))
        for route in build_app(site.services).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"GET", "HEAD", "OPTIONS"}
    ]


async def test_other_sites_cannot_change_anything(serve: Serve, sqlite_url: str) -> None:
    """With the cookie alone, or from another origin with the CSRF token too, every route that
    changes something refuses; so does one of a tracker that has no token."""
    foreign = [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}]
    async with serve(sqlite_url, tracker_api_token=TOKEN) as site:
        assert (await sign_in(site.client)).status_code == 303
        page = await site.client.get("/", headers={"Accept": "text/html"})
        found = re.search(r'"X-CSRF-Token": "([^"]+)"', page.text)
        assert found is not None
        routes = _changing(site)
        assert {path for _, path in routes} >= {"/api/runs", "/api/runs/track", "/logout"}
        for method, path in routes:
            if path == "/login":  # it takes the token itself
                continue
            for headers in ({}, *({**one, "X-CSRF-Token": found[1]} for one in foreign)):
                answer = await site.client.request(method, path, headers=headers, json={})
                # From elsewhere the cookie does not count: a page leads to the sign-in.
                refused = 303 if headers else 403
                refused = 401 if path.startswith("/api") else refused
                assert answer.status_code == refused, (path, headers)
                assert "set-cookie" not in answer.headers
    async with serve(sqlite_url) as site:
        for method, path in _changing(site):
            for headers in foreign:
                answer = await site.client.request(method, path, headers=headers, json={})
                assert answer.status_code == 403, (path, headers)


@pytest.mark.parametrize("path", ["/api/runs", "/api/techniques/t", "/api/stream", "/", "/metrics"])
async def test_other_sites_cannot_embed_anything(small_site: Site, path: str) -> None:
    """Without a token a link may lead here, and what a script, an image or a frame asks for is
    refused: it would tell its page what there is, and spend what FLORA lets be asked."""
    elsewhere = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    for into in ("image", "script", "style", "empty", "iframe", "object", "embed", "font", "video"):
        answer = await small_site.client.get(path, headers=elsewhere | {"Sec-Fetch-Dest": into})
        assert answer.status_code == 403, into
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert (await small_site.client.get(path, headers=headers)).status_code == 403
    visit = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    for site in ("cross-site", "same-site", "none", "same-origin"):
        answer = await small_site.client.get("/runs", headers=visit | {"Sec-Fetch-Site": site})
        assert answer.status_code == 200, site


def test_the_time_of_a_comparison_reveals_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with each token's digest is a digest as well, whatever was shown."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    token = Token(name="only", value=TOKEN, scopes=frozenset({Scope.ADMIN}))
    tokens = Tokens([token, Token(name="other", value="o" * 99, scopes=frozenset())])
    assert tokens.find(TOKEN.encode()) is token
    for shown in (b"", b"a", TOKEN[:-1].encode(), TOKEN.encode() + b"x", b"x" * 100_000, b"\xff\0"):
        assert tokens.find(shown) is None
    assert {len(text) for pair in compared for text in pair} == {32}
    assert not any(TOKEN.encode() in pair for pair in compared)
