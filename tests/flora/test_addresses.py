"""Where the key may go."""

import httpx
import pytest

from tracker.core.errors import FloraUnreadable, NotFound, SettingsError
from tracker.flora.client import FloraUrls, PollUrlRefused

FLORA = FloraUrls("https://app.flora.test/api/v1")


@pytest.mark.parametrize(
    "base",
    [
        "https://app.flora.test/api/v1",
        "https://app.flora.test/api/v1/",
        "https://app.flora.test:8443",
        "http://127.0.0.1:8000/api/v1",
        "http://localhost:8000",
        "http://[::1]:8000/api/v1",
    ],
)
def test_good_bases(base: str) -> None:
    """An https root is a base, and so is an http one on this machine; its last slash is dropped."""
    url = FloraUrls(base).of("runs", "run_1")
    assert str(url) == f"{base.rstrip('/')}/runs/run_1"


@pytest.mark.parametrize(
    "base",
    [
        "",
        "app.flora.test",
        "http://app.flora.test/api/v1",
        "http://127.0.0.1.evil.test/api/v1",
        "http://localhost.evil.test",
        "ftp://app.flora.test",
        "https://",
        "https://user:password@app.flora.test/api/v1",
        "https://app.flora.test/api/v1?x=1",
        "https://app.flora.test/api/v1#x",
        "https://app.flora.test:port",
        "https://app.flora.test/\x00",
        "https://999.1.1.1",
    ],
)
def test_bad_bases(base: str) -> None:
    """Anything else is refused, without repeating what may hold a password."""
    with pytest.raises(SettingsError, match="FLORA_BASE_URL") as caught:
        FloraUrls(base)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    ("segment", "path"),
    [
        ("../x", b"/api/v1/runs/..%2Fx"),
        ("a/b?c#d", b"/api/v1/runs/a%2Fb%3Fc%23d"),
        ("%2e%2e", b"/api/v1/runs/%252e%252e"),
        ("run 1", b"/api/v1/runs/run%201"),
        ("\N{SNOWMAN}", b"/api/v1/runs/%E2%98%83"),
        ("\ud800\n", b"/api/v1/runs/%3F%0A"),
        ("...", b"/api/v1/runs/..."),
    ],
)
def test_an_id_cannot_leave_its_path(segment: str, path: bytes) -> None:
    """Whatever an id holds, it stays one segment of the path."""
    assert FLORA.of("runs", segment).raw_path == path


@pytest.mark.parametrize("segment", ["", ".", "..", "x" * 256])
def test_what_can_be_no_id(segment: str) -> None:
    """A segment that would change the path, or is far too long, does not exist."""
    with pytest.raises(NotFound):
        FLORA.of("techniques", segment, "runs")


def test_queries() -> None:
    """What is given stands in the query, escaped; what is `None` does not."""
    url = FLORA.of("technique-runs", cursor="a&b=c", limit=100, technique_id=None)
    assert dict(url.params) == {"cursor": "a&b=c", "limit": "100"}
    assert FLORA.of("technique-runs", cursor=None).query == b""


def test_a_monstrous_cursor() -> None:
    """A cursor that no URL can hold is FLORA's fault."""
    with pytest.raises(FloraUnreadable, match="cursor"):
        FLORA.of("technique-runs", cursor="x" * 100_000)


@pytest.mark.parametrize(
    ("poll_url", "followed"),
    [
        ("https://app.flora.test/api/v1/runs/1", "https://app.flora.test/api/v1/runs/1"),
        ("HTTPS://APP.FLORA.TEST:443/api/v1/runs/1", "https://app.flora.test/api/v1/runs/1"),
        ("https://app.flora.test/api/v2/r?a=b#c", "https://app.flora.test/api/v2/r?a=b"),
        ("/api/v1/runs/1", "https://app.flora.test/api/v1/runs/1"),
    ],
)
def test_poll_urls_on_the_origin(poll_url: str, followed: str) -> None:
    """A poll_url on FLORA's origin is followed, however the origin is spelt."""
    assert FLORA.follow(poll_url) == httpx.URL(followed)


@pytest.mark.parametrize(
    "poll_url",
    [
        "https://evil.test/api/v1/runs/1",
        "https://app.flora.test.evil.test/x",
        "https://evil.test#app.flora.test",
        "https://evil.test?app.flora.test",
        "https://app.flora.test:8443/x",
        "http://app.flora.test/x",
        "http://app.flora.test:443/x",
        "https://app.flora.test@evil.test/x",
        "https://user@app.flora.test/x",
        "https://user:pw@app.flora.test/x",
        "https://app.flora.test\\@evil.test/x",
        "https://app.flora.test%2eevil.test/x",
        "https://app.flora.test%00.evil.test/x",
        "https://app.flora.test./x",
        "//evil.test/x",
        "///evil.test/x",
        "https:/evil.test/x",
        "https://\N{FULLWIDTH LATIN SMALL LETTER A}pp.flora.test.evil.test/x",
        "https://xn--/x",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "https://app.flora.test/\r\nx: y",
        "https://app.flora.test:99999999/x",
        "https://[::1/x",
        "https://app.flora.test/" + "x" * 100_000,
        "\ud800",
    ],
)
def test_poll_urls_that_lead_away(poll_url: str) -> None:
    """A poll_url on any other origin, with a user in it, or that is no URL, is refused."""
    try:
        followed = FLORA.follow(poll_url)
    except PollUrlRefused:
        return
    assert (followed.scheme, followed.netloc) == ("https", b"app.flora.test")
    assert poll_url in ("///evil.test/x", "https:/evil.test/x", "\ud800"), "a path, not a host"
