"""What all answers have in common, and errors that nobody foresaw."""

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tests.support.logs import capture_logs
from tests.web.conftest import Site
from tracker.core.errors import FloraRefusal, StoreUnavailable, TrackerError
from tracker.web.app import ResponseMiddleware
from tracker.web.http import Limits
from tracker.web.http.responses import Fault

SECRET_WORD = "swordfish"


def _client(app: object, **options: bool) -> httpx.AsyncClient:
    edge = ResponseMiddleware(app, limits=Limits())  # type: ignore[arg-type]
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(edge, **options), base_url="http://localhost"
    )


async def test_an_unforeseen_error_shows_a_number_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client gets an id under which the log has the whole story."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError(SECRET_WORD)

    async with _client(broken) as client:
        answer = await client.get("/api/runs")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "internal_error"
    assert SECRET_WORD not in answer.text
    assert "Traceback" not in answer.text
    number = error["message"].split()[-1].rstrip(".")
    assert number in caplog.text
    assert SECRET_WORD in caplog.text


async def test_half_an_answer_is_not_followed_by_another() -> None:
    """Once something was sent, an error can only cut the connection."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise LookupError(SECRET_WORD)

    async with _client(broken, raise_app_exceptions=True) as client:
        with pytest.raises(LookupError):
            await client.get("/api/runs")


async def test_every_answer_has_the_security_headers(small_site: Site) -> None:
    """Errors included; and nothing is kept by a cache."""
    for path in ("/healthz", "/metrics", "/openapi.json", "/api/runs", "/api/nothing", "/nothing"):
        answer = await small_site.client.get(path)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        policy = answer.headers["Content-Security-Policy"]
        assert policy == "default-src 'none'; frame-ancestors 'none'"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "server" not in answer.headers


async def test_an_unknown_route_is_a_404_in_the_same_shape(small_site: Site) -> None:
    """Nothing is redirected: FLORA would not follow."""
    for path in ("/nothing", "/api/nothing", "/api/runs/", "/callbacks/flora/a/b"):
        answer = await small_site.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_another_method_is_a_405_that_names_all_that_are_allowed(small_site: Site) -> None:
    """In the same shape too."""
    for path, allowed in {
        "/api/runs": "GET, HEAD, POST",
        "/api/runs/run_1": "GET, HEAD",
        "/api/runs/run_1/events": "GET, HEAD",
        "/healthz": "GET, HEAD",
    }.items():
        answer = await small_site.client.put(path, content=b"body")
        assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
        assert answer.json()["error"]["code"] == "method_not_allowed"


async def test_an_answer_to_head_has_no_body(small_site: Site) -> None:
    """A load balancer may ask so."""
    answer = await small_site.client.head("/healthz")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_a_database_that_is_down_is_said_seldom() -> None:
    """Each request would say the same; what FLORA refuses is said of each."""
    errors: list[TrackerError] = [StoreUnavailable("the disk is full")] * 5
    errors += [FloraRefusal(status=500, code="internal_error", message="oops")] * 2
    waiting = iter(errors)

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise next(waiting)

    async with _client(fails) as client:
        with capture_logs() as lines:
            statuses = [(await client.get("/api/runs")).status_code for _ in errors]
    assert statuses == [503] * 5 + [502] * 2
    assert [line["status"] for line in lines] == [503, 502, 502]
    assert {line["event"] for line in lines} == {"request.failed"}
    assert [line["count"] for line in lines] == [1, 1, 1]


async def test_an_error_page_that_fails_does_not_hide_the_error() -> None:
    """The client gets the answer in the shape for programs."""

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise StoreUnavailable("the disk is full")

    def no_page(scope: Scope, fault: Fault) -> Response | None:
        raise LookupError(SECRET_WORD)

    edge = ResponseMiddleware(fails, limits=Limits(), error_page=no_page)
    transport = httpx.ASGITransport(edge)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
    assert SECRET_WORD not in answer.text
