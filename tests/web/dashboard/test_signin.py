"""Signing in and out: what the cookie is, whom it lets in, and how often one may guess."""

from datetime import timedelta

import httpx
import pytest
from starlette.types import Scope

from tests.web.conftest import Serve, Site
from tests.web.dashboard.conftest import HTML, TOKEN, csrf_of, sign_in
from tracker.core.clock import utc_now
from tracker.web.dashboard.signin import EACH_BURST, local_path
from tracker.web.sessions import LASTS, Sessions
from tracker.web.throttle import MOST_KEYS, Throttle

PAGES = ["/", "/runs", "/runs/run_1", "/deliveries", "/techniques", "/sweeps", "/no/such/page"]


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_leads_to_the_sign_in_and_back(closed: Site, path: str) -> None:
    """Whoever is not signed in is led to the form, and from there to where they were going."""
    answer = await closed.client.get(path, params={"state": "failed"}, headers=HTML)
    assert answer.status_code == 303
    form = await closed.client.get(answer.headers["Location"])
    assert form.status_code == 200
    signed_in = await closed.client.post(answer.headers["Location"], data={"token": TOKEN})
    assert signed_in.status_code == 303
    assert signed_in.headers["Location"] == f"{path}?state=failed"


async def test_programs_get_401_and_no_form(closed: Site) -> None:
    """`/api` answers in JSON, whoever asks; a script's request is told where the form is."""
    answer = await closed.client.get("/api/runs", headers=HTML)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "unauthorized"
    script = await closed.client.get(
        "/runs",
        headers={"HX-Request": "true", "HX-Current-URL": f"{closed.base_url}/runs?state=open"},
    )
    assert script.status_code == 401
    assert script.headers["HX-Redirect"] == "/login?next=%2Fruns%3Fstate%3Dopen"


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
        # A proxy that asks by a name of its own: the page's origin tells, and then the cookie.
        proxied = await site.client.post(
            "/login", data={"token": TOKEN}, headers={"Origin": "https://tracker.example"}
        )
        assert proxied.headers["Set-Cookie"].startswith("__Host-tracker_session=")
        assert (await site.client.get("/", headers=shown)).status_code == 200


async def test_a_wrong_token_opens_nothing(closed: Site) -> None:
    """The form says so, sets no cookie, and does not show what was typed."""
    answer = await sign_in(closed.client, "wrong <b>guess</b>")
    assert answer.status_code == 401
    assert "not the token" in answer.text
    assert "guess" not in answer.text
    assert "Set-Cookie" not in answer.headers
    assert (await closed.client.get("/", headers=HTML)).status_code == 303


async def test_guessing_is_slowed_down(closed: Site) -> None:
    """After a burst of wrong tokens even the right one has to wait, and the answer says how
    long."""
    for _ in range(EACH_BURST):
        assert (await sign_in(closed.client, "wrong")).status_code == 401
    refused = await sign_in(closed.client)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "Set-Cookie" not in refused.headers


async def test_signing_in_often_is_not_guessing(closed: Site) -> None:
    """A right token gives its try back."""
    for _ in range(EACH_BURST + 5):
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


async def test_a_foreign_page_cannot_sign_somebody_in(closed: Site) -> None:
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
    """The form leads to a page of ours and nowhere else."""
    assert local_path(text) == path


def _request(cookie: str, **more: object) -> Scope:
    return {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [(b"cookie", cookie.encode()), (b"host", b"localhost")],
        **more,
    }


def test_a_session_ends_by_itself_and_with_its_token() -> None:
    """After a working day, when the token changes, and when anything of the cookie does."""
    now = utc_now()
    sessions = Sessions(TOKEN, public_url=None, clock=lambda: now)
    cookie = sessions.begin(_request("")).split(";")[0]
    assert sessions.of(_request(cookie)) is not None
    assert sessions.of(_request(f"{cookie}; {cookie}")) is None
    assert sessions.of(_request(cookie[:-1] + ("A" if cookie[-1] != "A" else "B"))) is None
    assert Sessions("another", public_url=None, clock=lambda: now).of(_request(cookie)) is None

    for later, holds in ((LASTS - timedelta(seconds=1), True), (LASTS, False)):
        then = now + later
        at = Sessions(TOKEN, public_url=None, clock=lambda then=then: then)
        assert (at.of(_request(cookie)) is not None) is holds
    before = Sessions(TOKEN, public_url=None, clock=lambda: now - timedelta(hours=1))
    assert before.of(_request(cookie)) is None


@pytest.mark.parametrize("value", ["", "x", ".", "..", "1.2.3", "9" * 400, "é.ü.ß", "1..", "a.b."])
def test_any_other_cookie_is_none(value: str) -> None:
    """Whatever stands in it, nothing breaks."""
    sessions = Sessions(TOKEN, public_url=None, clock=utc_now)
    scope = _request("")
    scope["headers"] = [(b"cookie", f"tracker_session={value}".encode("latin-1", "replace"))]
    assert sessions.of(scope) is None


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
