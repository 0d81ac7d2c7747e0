"""Signing in and out: what the cookie is, whom it lets in, and how often one may guess."""

import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import httpx
import pytest
from sqlalchemy import text
from starlette.types import Scope

from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, TOKEN, csrf_of, sign_in
from tests.web.flora import START
from tests.web.streaming import following
from tracker.core.clock import utc_now
from tracker.operations.telemetry import configure_logs
from tracker.services import open_services
from tracker.settings import Settings, TokenSettings
from tracker.settings.tokens import Scope as TokenScope
from tracker.settings.tokens import Token, Tokens
from tracker.store.engine import Database
from tracker.web.auth import EACH_BURST, MOST_KEYS, Throttle
from tracker.web.dashboard.site import local_path
from tracker.web.http import Limits
from tracker.web.sessions import IDLE, LASTS, Sessions

pytestmark = pytest.mark.served_twice

PAGES = ["/", "/runs", "/runs/run_1", "/deliveries", "/techniques", "/health", "/no/such/page"]


async def test_a_page_leads_to_the_sign_in_and_back(closed: Site) -> None:
    """Without a session a page leads to the sign-in, and that to the wanted page."""
    for path in PAGES:
        closed.client.cookies.clear()
        answer = await closed.client.get(path, params={"state": "failed"}, headers=HTML)
        assert answer.status_code == 303
        form = await closed.client.get(answer.headers["Location"])
        assert form.status_code == 200
        signed_in = await closed.client.post(answer.headers["Location"], data={"token": TOKEN})
        assert signed_in.status_code == 303
        assert signed_in.headers["Location"] == f"{path}?state=failed"


async def test_programs_get_401_and_no_form(closed: Site) -> None:
    """`/api` answers in JSON, also to browsers; a script's request gets the address of the form."""
    answer = await closed.client.get("/api/runs", headers=HTML)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "unauthorized"
    script = await closed.client.get(
        "/runs",
        headers={
            "HX-Request": "true",
            "HX-Current-URL": f"{closed.client.base_url}/runs?state=open",
        },
    )
    assert script.status_code == 401
    assert script.headers["HX-Redirect"] == "/login?next=%2Fruns%3Fstate%3Dopen"
    for page, then in (
        (f"{closed.client.base_url}/runs/run_1", "/login?next=%2Fruns%2Frun_1"),
        ("https://evil.example//evil.example/x", "/login"),
        ("http://[", "/login"),
        ("", "/login"),
    ):
        form = await closed.client.post("/runs/run_1/check", headers=HTML | {"Referer": page})
        assert (form.status_code, form.headers["Location"]) == (303, then)


async def test_the_cookie_opens_pages_and_the_api(browser: httpx.AsyncClient) -> None:
    """It counts under /api too, for what changes nothing."""
    assert (await browser.get("/")).status_code == 200
    assert (await browser.get("/api/runs")).status_code == 200


async def test_the_cookie_is_kept_from_scripts_and_other_sites(closed: Site) -> None:
    """HttpOnly, SameSite, with an end; each sign-in makes a new one, and none has the token."""
    first = (await sign_in(closed.client)).headers["Set-Cookie"]
    closed.client.cookies.clear()
    second = (await sign_in(closed.client)).headers["Set-Cookie"]
    for cookie in (first, second):
        parts = cookie.split("; ")
        assert {"HttpOnly", "SameSite=Lax", "Path=/", "Max-Age=43200"} <= set(parts)
        assert "Secure" not in parts  # this is plain http, on loopback
        assert TOKEN not in cookie
    assert first != second


async def test_over_https_the_cookie_is_secure(serve: Serve, sqlite_url: str) -> None:
    """Where the public address is https and was asked for, no http page can read or set it."""
    public = {"tracker_public_url": "https://tracker.example"}
    async with serve(sqlite_url, tracker_api_token=TOKEN, **public) as site:
        outside = {"Host": "tracker.example", "Origin": "https://tracker.example"}
        answer = await site.client.post("/login", data={"token": TOKEN}, headers=outside)
        cookie = answer.headers["Set-Cookie"]
        assert cookie.startswith("__Host-tracker_session=")
        assert cookie.endswith("; Secure")
        shown = {"Cookie": cookie.split(";")[0]}
        inside = await site.client.get("/", headers={**shown, "Host": "tracker.example"})
        assert inside.status_code == 200
        # A browser that came over http has another cookie, which does not count here.
        plain = {"Cookie": shown["Cookie"].removeprefix("__Host-")}
        refused = await site.client.get("/", headers={**plain, "Host": "tracker.example"})
        assert refused.status_code == 303
        # A proxy that uses another host name: the page's origin counts, and then the cookie.
        proxied = await site.client.post(
            "/login", data={"token": TOKEN}, headers={"Origin": "https://tracker.example"}
        )
        assert proxied.headers["Set-Cookie"].startswith("__Host-tracker_session=")
        assert (await site.client.get("/", headers=shown)).status_code == 200


async def test_a_wrong_token_opens_nothing(closed: Site) -> None:
    """The form shows an error, sets no cookie, and does not repeat the input."""
    answer = await sign_in(closed.client, "wrong <b>guess</b>")
    assert answer.status_code == 401
    assert "The token is wrong." in answer.text
    assert "guess" not in answer.text
    assert "Set-Cookie" not in answer.headers
    assert (await closed.client.get("/", headers=HTML)).status_code == 303


async def test_guessing_is_slowed_down_and_keeps_nobody_out(serve: Serve, sqlite_url: str) -> None:
    """After a burst of wrong tokens the next wrong one has to wait, and the form says how long; the
    right one is taken all the same."""
    slow = Limits(wrong_token_seconds=600.0)  # none is due while the test guesses
    async with serve(sqlite_url, limits=slow, tracker_api_token=TOKEN) as closed:
        for _ in range(EACH_BURST):
            assert (await sign_in(closed.client, "wrong")).status_code == 401
        refused = await sign_in(closed.client, "wrong")
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "Set-Cookie" not in refused.headers
        assert "Too many wrong tokens" in refused.text
        assert (await sign_in(closed.client)).status_code == 303


async def test_signing_out_ends_it(browser: httpx.AsyncClient) -> None:
    """The browser forgets its cookie; without the page's token nobody is signed out."""
    assert (await browser.post("/logout")).status_code == 403
    csrf = csrf_of((await browser.get("/")).text)
    answer = await browser.post("/logout", data={"csrf_token": csrf})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/login")
    assert "Max-Age=0" in answer.headers["Set-Cookie"]
    assert (await browser.get("/")).status_code == 303


async def test_without_a_token_there_is_nothing_to_sign_in_to(small_site: Site) -> None:
    """Pages are open on this machine, and only there."""
    assert (await small_site.client.get("/", headers=HTML)).status_code == 200
    login = await small_site.client.get("/login")
    assert (login.status_code, login.headers["Location"]) == (303, "/")
    foreign = {**HTML, "Host": "tracker.example"}
    for path in ("/", "/login", "/static/x/style.css"):
        assert (await small_site.client.get(path, headers=foreign)).status_code == 403


async def test_a_foreign_page_cannot_sign_someone_in(closed: Site) -> None:
    """A form of another origin is refused, and so is a browser's word that it crossed sites."""
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = await closed.client.post("/login", data={"token": TOKEN}, headers=headers)
        assert answer.status_code == 403
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (None, "/"),
        ("/runs?state=failed", "/runs?state=failed"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/\t/evil.example", "/"),
        ("https://evil.example", "/"),
        ("javascript:alert(1)", "/"),
        ("", "/"),
    ],
)
def test_the_way_back_stays_here(text: str | None, path: str) -> None:
    """The form leads to a page of the dashboard and nowhere else."""
    assert local_path(text) == path


def _token(name: str, value: str = TOKEN) -> Token:
    return Token(name=name, value=value, scopes=frozenset({TokenScope.ADMIN}))


def _request(cookie: str, **more: object) -> Scope:
    return {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [(b"cookie", cookie.encode("latin-1", "replace")), (b"host", b"localhost")],
        **more,
    }


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with all tables, on each engine."""
    async with open_services(Settings(tracker_database_url=database_url)) as services:
        yield services.database


class _Signed:
    """The sessions of one token, at a time that a test sets."""

    def __init__(self, database: Database, *tokens: Token) -> None:
        self.now = utc_now()
        self.tokens = Tokens(tokens)
        self.sessions = Sessions(
            database, tokens=lambda: self.tokens, public_url=None, clock=self._clock
        )

    def _clock(self) -> datetime:
        return self.now

    async def begin(self, token: Token) -> str:
        """The cookie of a new session."""
        return (await self.sessions.start(_request(""), token)).split(";")[0]

    async def holds(self, cookie: str) -> bool:
        """Whether it lets in now."""
        return await self.sessions.of(_request(cookie)) is not None


async def test_a_session_ends_after_a_while_without_use(database: Database) -> None:
    """A session in use lasts a working day at most; its use is recorded once a minute."""
    token = _token("one")
    signed = _Signed(database, token)
    cookie, idle = await signed.begin(token), await signed.begin(token)
    assert cookie != idle
    began = signed.now
    step = IDLE - timedelta(seconds=1)
    signed.now += step
    while signed.now - began < LASTS:
        assert await signed.holds(cookie)
        signed.now += step
    assert not await signed.holds(idle)
    assert not await signed.holds(cookie)


async def test_a_session_does_not_last_until_a_wrong_time_comes(database: Database) -> None:
    """One of a clock that was ahead ends when that is corrected, and for good with the next
    sign-in; a correction by an hour ends none."""
    token = _token("one")
    signed = _Signed(database, token)
    cookie = await signed.begin(token)
    signed.now -= timedelta(hours=1)
    assert await signed.holds(cookie)
    signed.now -= timedelta(days=730)
    assert not await signed.holds(cookie)
    await signed.begin(token)
    signed.now += timedelta(days=730)
    assert not await signed.holds(cookie)


async def test_a_session_ends_with_its_token(database: Database) -> None:
    """A token that is taken away, changed or expired takes its sign-ins with it; a rotation in
    which it only moves to another place does not."""
    old, new = _token("TRACKER_API_TOKEN", "o" * 20), _token("TRACKER_API_TOKEN", "n" * 20)
    signed = _Signed(database, old, _token("second", "n" * 20))
    cookie = await signed.begin(old)
    assert await signed.holds(cookie)
    signed.tokens = Tokens([_token("second", "x" * 20), _token("renamed", "o" * 20)])
    assert await signed.holds(cookie)
    signed.tokens = Tokens([new])
    assert not await signed.holds(cookie)
    signed.tokens = Tokens([Token(name="o", value="o" * 20, scopes=old.scopes, expires=signed.now)])
    assert not await signed.holds(cookie)


async def test_any_other_cookie_is_none(database: Database) -> None:
    """A broken cookie breaks nothing, and a repeated one is not accepted."""
    token = _token("one")
    signed = _Signed(database, token)
    cookie = await signed.begin(token)
    odd = ("", "x", ".", "..", "1.2.3", "9" * 400, "é.ü.ß", "1..", "a.b.", "A" * 43, "-" * 43)
    for value in odd:
        assert not await signed.holds(f"tracker_session={value}"), value
    assert not await signed.holds(f"{cookie}; {cookie}")
    assert not await signed.holds(f"__Host-{cookie}")


async def test_the_table_holds_neither_cookie_nor_token(database: Database) -> None:
    """The stored digests are not enough to sign in, and old rows are removed."""
    token = _token("one")
    signed = _Signed(database, token)
    cookie = (await signed.begin(token)).partition("=")[2]
    async with database.read() as connection:
        (row,) = (await connection.execute(text("SELECT * FROM sessions"))).all()
    assert cookie not in str(row)
    assert TOKEN not in str(row)
    signed.now += LASTS
    await signed.begin(token)
    async with database.read() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM sessions"))).scalar_one() == 1


async def test_a_copied_cookie_ends_with_the_sign_out(closed: Site) -> None:
    """Signing out in one browser ends every copy of its cookie, on pages, under `/api` and in a
    stream that was open; another sign-in goes on."""
    assert (await sign_in(closed.client)).status_code == 303
    copy = httpx.Cookies(closed.client.cookies)
    csrf = csrf_of((await closed.client.get("/", headers=HTML)).text)
    async with (
        closed.another(cookies=copy) as thief,
        closed.another() as other,
    ):
        assert (await sign_in(other)).status_code == 303
        assert (await thief.get("/api/runs")).status_code == 200
        out = await closed.client.post("/logout", data={"csrf_token": csrf})
        assert out.status_code == 303
        assert (await thief.get("/", headers=HTML)).status_code == 303
        assert (await thief.get("/api/runs")).status_code == 401
        started = await thief.post("/api/runs", json=START, headers={"X-CSRF-Token": csrf})
        assert started.status_code == 401
        assert (await other.get("/api/runs")).status_code == 200


async def test_a_stream_ends_with_the_sign_out(serve: Serve, sqlite_url: str) -> None:
    """What a signed-out browser left open is closed with the next heartbeat."""
    limits = Limits(stream_heartbeat=0.1)
    async with serve(sqlite_url, tracker_api_token=TOKEN, limits=limits) as site:
        await sign_in(site.client)
        csrf = csrf_of((await site.client.get("/", headers=HTML)).text)
        async with (
            site.another(cookies=site.client.cookies) as copy,
            following(copy) as events,
        ):
            await site.client.post("/logout", data={"csrf_token": csrf})
            assert await events.ended()


BROWSERS: tuple[tuple[dict[str, str], bool], ...] = (
    ({}, False),
    ({"Origin": "http://127.0.0.1"}, False),
    ({"Origin": "https://tracker.example"}, True),
    ({"X-Forwarded-Proto": "https"}, True),
    ({"X-Forwarded-Proto": "https, http"}, True),
    ({"X-Forwarded-Proto": "http"}, False),
    ({"Forwarded": "for=198.51.100.7;proto=https;host=tracker.example"}, True),
    ({"Forwarded": 'for="[::1]:1", proto="HTTPS"'}, True),
    # The browser's own headers go before a proxy's.
    ({"Origin": "http://tracker.example", "X-Forwarded-Proto": "https"}, False),
)
"""Headers of a sign-in, and whether the browser came by https."""


async def test_the_cookie_is_secure_whenever_the_browser_came_by_https(closed: Site) -> None:
    """Also where no public URL is set: by the origin of the form, or the proxy's word for it."""
    for headers, secure in BROWSERS:
        host = headers.get("Origin", "http://tracker.example").partition("://")[2]
        closed.client.cookies.clear()
        answer = await closed.client.post(
            "/login", data={"token": TOKEN}, headers={"Host": host, **headers}
        )
        assert answer.status_code == 303, headers
        cookie = answer.headers["Set-Cookie"]
        assert cookie.endswith("; Secure") is secure, headers
        assert cookie.startswith("__Host-") is secure, headers
        closed.client.cookies.clear()
        shown = {"Cookie": cookie.split(";")[0]}
        assert (await closed.client.get("/", headers=shown)).status_code == 200, headers
        if secure:  # under the name that a plain page could set it is not the same
            plain = {"Cookie": shown["Cookie"].removeprefix("__Host-")}
            assert (await closed.client.get("/", headers=plain)).status_code == 303


async def test_a_read_token_changes_nothing(serve: Serve, sqlite_url: str) -> None:
    """Its pages offer nothing that it may not do, and what it sends all the same is refused."""
    reader = TokenSettings(name="producer", token="r" * 20, scopes={"read"})
    async with serve(sqlite_url, tracker_api_token=TOKEN, tokens=(reader,)) as site:
        assert (await sign_in(site.client, "r" * 20)).status_code == 303
        page = (await site.client.get("/", headers=HTML)).text
        assert "it may see all but the audit log, and start or change nothing" in page
        shown = {"X-CSRF-Token": csrf_of(page)}
        assert (await site.client.get("/api/runs")).status_code == 200
        assert (await site.client.get("/metrics")).status_code == 403
        for path in ("/api/runs", "/api/runs/track", "/runs/run_1/check", "/deliveries/d/replay"):
            answer = await site.client.post(path, json=START, headers=shown)
            assert answer.status_code == 403, path
        out = await site.client.post("/logout", data={"csrf_token": csrf_of(page)})
        assert out.headers["Location"] == "/login"


async def test_a_token_without_read_signs_nobody_in(serve: Serve, sqlite_url: str) -> None:
    """The form shows the reason."""
    scraper = TokenSettings(name="prometheus", token="m" * 20, scopes={"metrics"})
    async with serve(sqlite_url, tokens=(scraper,)) as site:
        answer = await sign_in(site.client, "m" * 20)
        assert answer.status_code == 403
        assert "prometheus may not see pages" in answer.text
        assert "Set-Cookie" not in answer.headers


async def test_signing_in_and_out_is_logged(
    closed: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the token's name, the address and the request; never the token."""
    configure_logs(format="json", level="info", secrets=())
    await sign_in(closed.client)
    csrf = csrf_of((await closed.client.get("/", headers=HTML)).text)
    await closed.client.post("/logout", data={"csrf_token": csrf})
    log = capsys.readouterr().err
    events = [json.loads(line) for line in log.splitlines() if '"auth.' in line]
    assert [line["event"] for line in events] == ["auth.signed_in", "auth.signed_out"]
    for line in events:
        assert (line["token"], line["peer"]) == ("TRACKER_API_TOKEN", "127.0.0.1")
        assert line["request_id"]
    assert TOKEN not in log


def test_a_throttle_gives_its_burst_and_then_one_after_the_other() -> None:
    """Each key has its own bucket, and remembering them takes bounded room."""
    clock = [0.0]
    throttle = Throttle(burst=3, refill=10, monotonic=lambda: clock[0])
    assert [throttle.take("a") for _ in range(4)] == [0, 0, 0, 10]
    assert throttle.take("b") == 0
    clock[0] = 10
    assert [throttle.take("a") for _ in range(2)] == [0, 10]
    throttle.give_back("a")
    assert [throttle.take("a") for _ in range(2)] == [0, 10]
    for number in range(2 * MOST_KEYS):
        throttle.take(str(number))
    assert len(throttle._full_at) == MOST_KEYS
