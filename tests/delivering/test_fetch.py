"""Fetching against a server that misbehaves: whole, checked, resumed, or refused."""

import asyncio
import gzip
import hashlib
import json
import os
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.delivering.far_end import Asked, FarEnd, Reply, answer, far_end, ranged
from tests.delivering.test_addresses import fixed
from tests.deploy.tls import certificate_for_localhost
from tests.support.waiting import close_server, eventually, free_port, let_pass
from tracker.delivering.addresses import LinkRefused, MediaError, MediaUnavailable
from tracker.delivering.fetch import ATTEMPTS, Fetcher, OnBytes

BODY = bytes(range(256)) * 400
SHA = hashlib.sha256(BODY).hexdigest()

Fetch = Callable[..., Awaitable[Any]]


@pytest.fixture
async def waits() -> list[float]:
    """How long was waited between attempts; none of it really."""
    return []


@pytest.fixture
async def fetch(tmp_path: Path, waits: list[float]) -> Fetch:
    """Fetches a link into the test's folder, as `file`."""

    async def no_wait(seconds: float) -> None:
        waits.append(seconds)

    async def fetch_one(link: str, *, on_bytes: OnBytes | None = None, **options: Any) -> Any:
        given: dict[str, Any] = {"allow_private": True, "stall": 30.0, "sleep": no_wait}
        fetcher = Fetcher(**(given | options))
        return await fetcher.fetch(
            link, tmp_path, "file", output_type="imageUrl", on_bytes=on_bytes
        )

    return fetch_one


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_file_is_there_whole_under_its_name(fetch: Fetch, tmp_path: Path) -> None:
    """Named by its type, with size and digest, and nothing is left beside it."""
    async with far_end(answer(BODY, content_type="image/webp")) as end:
        fetched = await fetch(end.url())
    assert (fetched.path, fetched.size, fetched.sha256) == (tmp_path / "file.webp", len(BODY), SHA)
    assert fetched.path.read_bytes() == BODY
    assert names(tmp_path) == ["file.webp"]
    assert "authorization" not in end.asked[0]


async def test_a_short_body_is_resumed(fetch: Fetch, tmp_path: Path) -> None:
    """Where the server knows ranges, only the rest is asked for, under the state's validator."""
    async with far_end(ranged(BODY, tag='"one"', first=30_000)) as end:
        fetched = await fetch(end.url())
    assert ("range" in end.asked[-1], fetched.sha256) == (True, SHA)
    assert fetched.path.read_bytes() == BODY
    assert "range" not in end.asked[0]
    assert [asked["range"] for asked in end.asked[1:]] == ["bytes=30000-"]
    assert end.asked[1]["if-range"] == '"one"'
    assert names(tmp_path) == ["file.png"]


async def test_another_process_goes_on_with_a_part(fetch: Fetch, tmp_path: Path) -> None:
    """What is left after all attempts have failed is of use to the next command, although the link
    was signed anew."""
    cut = answer(BODY[:20_000], length=len(BODY), etag='"one"')
    async with far_end(cut) as end:
        with pytest.raises(MediaUnavailable, match="cut after 20000 bytes"):
            await fetch(end.url("/file?signature=1"))
        assert names(tmp_path) == ["file.part", "file.part.json"]
        end._replies[:] = [ranged(BODY, tag='"one"')]
        fetched = await fetch(end.url("/file?signature=2"))
    assert ("range" in end.asked[-1], fetched.sha256) == (True, SHA)
    assert end.asked[-1]["range"] == "bytes=20000-"
    assert names(tmp_path) == ["file.png"]


@pytest.mark.parametrize(
    "replies",
    [
        pytest.param(
            (answer(BODY[:999], length=len(BODY)), answer(BODY)), id="no validator, no range"
        ),
        pytest.param(
            (answer(BODY[:999], length=len(BODY), etag='"one"'), answer(BODY, etag='"two"')),
            id="the file has changed",
        ),
        pytest.param(
            (answer(BODY[:999], length=len(BODY), etag='W/"one"'), ranged(BODY, tag='W/"one"')),
            id="a weak tag names no bytes",
        ),
        pytest.param(
            (
                answer(BODY[:999], length=len(BODY), etag='"one"'),
                answer(status="416 Range Not Satisfiable"),
                answer(BODY, etag='"one"'),
            ),
            id="the range is refused",
        ),
        pytest.param(
            (
                answer(BODY[:999], length=len(BODY), etag='"one"'),
                answer(BODY[5:], "206 Partial Content", content_range="bytes 5-102399/102400"),
                answer(BODY, etag='"one"'),
            ),
            id="another range is given",
        ),
        pytest.param(
            (
                answer(BODY[:999], length=len(BODY), etag='"one"'),
                answer(
                    BODY[999:],
                    "206 Partial Content",
                    etag='"two"',
                    content_range="bytes 999-102399/102400",
                ),
                answer(BODY, etag='"two"'),
            ),
            id="a range of another state is given",
        ),
    ],
)
async def test_what_cannot_be_resumed_begins_anew(
    fetch: Fetch, tmp_path: Path, replies: tuple[Reply, ...]
) -> None:
    """Nothing of two states of a file is ever put together."""
    async with far_end(*replies) as end:
        fetched = await fetch(end.url())
    assert fetched.sha256 == SHA
    assert names(tmp_path) == ["file.png"]


async def test_a_part_of_another_file_is_not_resumed(fetch: Fetch, tmp_path: Path) -> None:
    """A part is of its own link, whatever validator two links may share."""
    (tmp_path / "file.part").write_bytes(b"something else")
    mark = {"link": "http://elsewhere.example/file", "validator": '"one"'}
    (tmp_path / "file.part.json").write_text(json.dumps(mark))
    async with far_end(ranged(BODY, tag='"one"')) as end:
        fetched = await fetch(end.url())
    assert ("range" in end.asked[0], fetched.sha256) == (False, SHA)


async def test_a_last_modified_that_is_old_enough_will_do(fetch: Fetch) -> None:
    """Without a tag the time of the last change names the state, once it is a minute old."""
    when = "Wed, 01 Jul 2026 12:00:00 GMT"
    for date, ranges in (("Wed, 01 Jul 2026 12:02:00 GMT", 1), (when, 0)):
        cut = answer(BODY[:500], length=len(BODY), last_modified=when, date=date)
        async with far_end(cut, ranged(BODY, tag=when)) as end:
            assert (await fetch(end.url())).sha256 == SHA
        assert sum("range" in asked for asked in end.asked) == ranges


async def test_a_server_that_never_gives_all_is_given_up(
    fetch: Fetch, waits: list[float], tmp_path: Path
) -> None:
    """After some attempts that bring nothing more it is an error, with growing waits between."""
    async with far_end(answer(BODY[:100], length=len(BODY))) as end:
        with pytest.raises(MediaUnavailable, match="cut after 100 bytes"):
            await fetch(end.url())
    assert len(end.asked) == ATTEMPTS
    assert waits == sorted(waits)
    assert not (tmp_path / "file.png").exists()


@pytest.mark.parametrize("status", ["401 U", "403 F", "404 N", "410 G"])
async def test_an_expired_link_is_told_as_such(fetch: Fetch, tmp_path: Path, status: str) -> None:
    """It is not tried again, and nothing is left of it."""
    async with far_end(answer(b"<html>gone</html>", status)) as end:
        with pytest.raises(MediaError, match=f"has expired.*HTTP {status[:3]}"):
            await fetch(end.url())
    assert len(end.asked) == 1
    assert names(tmp_path) == []


async def test_a_busy_server_is_asked_again(fetch: Fetch, waits: list[float]) -> None:
    """After what it asks for, at most a minute; its own faults pass too."""
    busy = answer(b"", "429 Too Many Requests", retry_after="7")
    later = answer(b"", "503 Unavailable", retry_after="86400")
    async with far_end(busy, later, answer(b"", "500 Oops"), answer(BODY)) as end:
        assert (await fetch(end.url())).sha256 == SHA
    assert waits[:2] == [7.0, 60.0]
    assert len(end.asked) == 4


@pytest.mark.parametrize("status", ["400 Bad", "304 Not Modified", "204 Nothing"])
async def test_any_other_answer_is_an_error(fetch: Fetch, status: str) -> None:
    """What is no file is not taken for one."""
    async with far_end(answer(b"", status)) as end:
        with pytest.raises(MediaError, match=f"HTTP {status[:3]}"):
            await fetch(end.url())


async def test_redirects_are_followed_and_each_is_checked(fetch: Fetch, tmp_path: Path) -> None:
    """A public name that redirects to this machine is not followed there."""
    async with far_end(answer(b"secret")) as inside:
        there = answer(b"", "302 Found", location=inside.url())
        async with far_end(there) as outside:
            assert (await fetch(outside.url())).size == len(b"secret")

            async def pretend(host: str, port: int) -> list[Any]:
                raise AssertionError("no name is to be resolved")

            with pytest.raises(LinkRefused, match="not a public address"):
                await fetch(outside.url(), allow_private=False, resolver=pretend)
    assert len(inside.asked) == 1


async def test_cookies_are_not_kept(fetch: Fetch) -> None:
    """Neither from a redirect to where it leads, nor from one attempt to the next."""
    cookie = {"set_cookie": "id=1; Path=/"}
    replies = (
        answer(b"", "302 Found", location="/file.png", **cookie),
        answer(b"", "503 Busy", **cookie),
        answer(BODY),
    )
    async with far_end(*replies) as end:
        await fetch(end.url())
    assert [one for one in end.asked if "cookie" in one] == []
    assert len(end.asked) == 3


async def test_a_hop_to_a_private_address_is_refused(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server is taken for a public one; where it leads is not."""
    from tracker.delivering import addresses

    real = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda one: str(one) == "127.0.0.1" or real(one))
    port = free_port()
    for where in (f"http://10.0.0.1:{port}/", f"//[::1]:{port}/", "http://192.168.1.1/latest"):
        async with far_end(answer(b"", "302 Found", location=where)) as end:
            with pytest.raises(LinkRefused, match="not a public address"):
                await fetch(end.url(), allow_private=False)
            assert len(end.asked) == 1


async def test_a_redirect_to_no_web_page_is_refused(fetch: Fetch) -> None:
    """Neither files nor anything else that is not http(s) is reached by a hop."""
    for where in ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/"):
        async with far_end(answer(b"", "301 Moved", location=where)) as end:
            with pytest.raises((LinkRefused, MediaUnavailable)):
                await fetch(end.url())


async def test_redirects_end(fetch: Fetch) -> None:
    """Five hops are followed, a circle is not."""
    async with far_end(answer(b"", "302 Found", location="/on")) as end:
        with pytest.raises(LinkRefused, match="more than 5 redirects"):
            await fetch(end.url())
    assert len(end.asked) == 6


async def test_the_rest_is_asked_for_behind_a_redirect(fetch: Fetch) -> None:
    """A link that redirects to the file is resumed there."""
    replies = [answer(b"", "302 Found", location="/real"), ranged(BODY, tag='"t"', first=30_000)]

    async def alternately(asked: Asked, writer: asyncio.StreamWriter) -> None:
        reply = replies[1 if asked[""].startswith("GET /real ") else 0]
        if isinstance(reply, bytes):
            writer.write(reply)
        else:
            await reply(asked, writer)

    async with far_end(alternately) as end:
        fetched = await fetch(end.url())
    assert ("range" in end.asked[-1], fetched.sha256) == (True, SHA)


@pytest.mark.parametrize("length", [-1, None])
async def test_a_huge_file_is_not_taken(fetch: Fetch, tmp_path: Path, length: int | None) -> None:
    """More than is allowed is refused by its announcement, or as soon as it has come."""
    async with far_end(answer(BODY, length=length)) as end:
        with pytest.raises(MediaError, match="larger than the 5000 bytes"):
            await fetch(end.url(), max_bytes=5000)
    assert len(end.asked) == 1
    assert names(tmp_path) == []


async def test_a_packed_file_is_measured_unpacked(fetch: Fetch, tmp_path: Path) -> None:
    """An encoding that nobody asked for is undone, and cannot hide a size."""
    packed = answer(gzip.compress(BODY), content_encoding="gzip", etag='"one"')
    async with far_end(packed) as end:
        fetched = await fetch(end.url())
        assert (fetched.size, fetched.sha256) == (len(BODY), SHA)
        assert end.asked[0]["accept-encoding"] == "identity"
        with pytest.raises(MediaError, match="larger than"):
            await fetch(end.url(), max_bytes=50_000)


@pytest.mark.parametrize("encoding", ["gzip, gzip", "deflate,gzip", "br", "zstd", "made-up"])
async def test_what_is_packed_twice_or_anew_is_not_unpacked(
    fetch: Fetch, tmp_path: Path, encoding: str
) -> None:
    """A few kilobytes could stand for gigabytes, which would be in memory before they are counted;
    and what nobody can unpack is not put down as the file."""
    bomb = gzip.compress(gzip.compress(bytes(20_000_000)))
    async with far_end(answer(bomb, content_encoding=encoding)) as end:
        with pytest.raises(MediaError, match="packed the file in a way"):
            await fetch(end.url())
    assert len(end.asked) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "odd",
    [
        {"date": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"},
        {"date": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"},
        {"date": "", "last_modified": ","},
        {
            "etag": '"\xff',
            "content_type": "\xff/\xfe",
            "set_cookie": "\xff=; max-age=" + "9" * 5000,
        },
    ],
)
async def test_odd_headers_cost_no_file(fetch: Fetch, tmp_path: Path, odd: dict[str, str]) -> None:
    """Times beyond all calendars and letters that are none are passed over."""
    headers = {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT", **odd}
    async with far_end(answer(BODY, **headers)) as end:
        assert (await fetch(end.url())).sha256 == SHA
    assert names(tmp_path) == ["file.png"]


@pytest.mark.parametrize("shape", ["{n}-1/2", "100-{n}/*", "100-{n}/{n}", "100-1/*", "-1-2/3"])
async def test_an_odd_range_is_not_resumed(fetch: Fetch, shape: str) -> None:
    """Numbers of thousands of digits are none, and the next attempt begins anew."""
    part = shape.format(n="9" * 5000)
    first = answer(BODY[:100], length=len(BODY), etag='"one"')
    odd = answer(BODY[100:], "206 Partial Content", etag='"one"', content_range=f"bytes {part}")
    async with far_end(first, odd, answer(BODY)) as end:
        assert (await fetch(end.url())).sha256 == SHA
    assert [("range" in one) for one in end.asked] == [False, True, False]


@pytest.mark.parametrize("trickle", [b"", b"x"])
async def test_standing_still_is_not_progress(fetch: Fetch, trickle: bytes) -> None:
    """A server that says nothing any more, or a byte now and then, does not hold a place for
    ever."""
    gone = asyncio.Event()

    async def slow(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", length=len(BODY), etag='"one"') + BODY[:10])
        while not gone.is_set() and not writer.is_closing():
            await writer.drain()
            await asyncio.wait([asyncio.create_task(gone.wait())], timeout=0.02)
            writer.write(trickle)

    def time_passes(size: int, _: int | None) -> None:
        let_pass(31)

    async with far_end(slow) as end:
        with pytest.raises(MediaUnavailable, match="stalled"):
            await fetch(end.url(), on_bytes=time_passes)
        gone.set()
    assert len(end.asked) == ATTEMPTS


async def test_a_slow_file_that_comes_on_is_whole_in_the_end(fetch: Fetch) -> None:
    """There is no limit on the whole time: what comes on takes as long as it takes."""
    big = BODY * 4
    came, passed = 0, 0

    def on_bytes(size: int, _: int | None) -> None:
        nonlocal came
        came = size

    async def steady(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal passed
        writer.write(answer(b"", length=len(big)))
        for end in range(40_000, len(big) + 40_000, 40_000):
            writer.write(big[end - 40_000 : end])
            await writer.drain()
            await eventually(partial(lambda size: came == size, min(end, len(big))), interval=0.001)
            let_pass(40)
            passed += 40

    async with far_end(steady) as end:
        assert (await fetch(end.url(), stall=60.0, on_bytes=on_bytes)).size == len(big)
    assert passed > 2 * 60
    assert len(end.asked) == 1


async def test_a_damaged_record_is_a_cut(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the machines between damage is no fault of the file or the disk: it is fetched on."""
    certificate, key = certificate_for_localhost(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def damaged(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(BODY[:30_000], length=len(BODY), etag='"one"'))
        await writer.drain()
        record = b"\x17\x03\x03\x00\x20" + bytes(32)
        os.write(writer.get_extra_info("socket").fileno(), record)
        await asyncio.sleep(60)

    async with far_end(damaged, ranged(BODY, tag='"one"'), tls=tls) as end:
        fetched = await fetch(end.url(host="localhost"))
    assert ("range" in end.asked[-1], fetched.sha256) == (True, SHA)


async def test_the_address_that_was_reached_comes_first_from_then_on(tmp_path: Path) -> None:
    """Each file has a connection of its own, and the host's other address may be silent: that
    costs one of them a moment."""
    resolver = fixed("127.0.0.2", "127.0.0.1")
    fetcher = Fetcher(allow_private=True, resolver=resolver)
    async with far_end(answer(b"a")) as end:
        url, other = end.url(host="two.example"), FarEnd(end.port, answer(b"b"))
        await fetcher.fetch(url, tmp_path, "first")
        server = await asyncio.start_server(other.connected, "127.0.0.2", end.port)
        await fetcher.fetch(url, tmp_path, "second")
        await close_server(server)
    assert (len(end.asked), len(other.asked)) == (2, 0)


async def test_a_server_that_is_away_is_tried_again(fetch: Fetch, waits: list[float]) -> None:
    """Its words do not hold the link, which may be signed."""
    with pytest.raises(MediaUnavailable, match="cannot be reached") as caught:
        await fetch(f"http://127.0.0.1:{free_port()}/file?signature=secret")
    assert len(waits) == ATTEMPTS - 1
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("link", ["", "no link", "https://", "https://[broken", "data:,x", "h\0:"])
async def test_what_is_no_link_is_refused(fetch: Fetch, tmp_path: Path, link: str) -> None:
    """Nothing is sent, nothing is left."""
    with pytest.raises((LinkRefused, MediaUnavailable)):
        await fetch(link)
    assert names(tmp_path) == []


async def test_a_folder_that_is_gone_is_an_error_of_its_own(fetch: Fetch, tmp_path: Path) -> None:
    """A file that cannot be written is not the server's fault."""
    tmp_path.rmdir()
    async with far_end(answer(BODY)) as end:
        with pytest.raises(OSError, match="No such file"):
            await fetch(end.url())
