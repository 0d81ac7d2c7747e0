"""`tracker.asgi()` and `tracker.lifespan`: the tracker as a part of another application."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from tests.library.conftest import INPUTS, MakeTracker
from tests.support.forked import ForkedPython
from tests.support.waiting import NO_SWEEPS, eventually, free_port
from tests.web.callbacks import event, signed
from tests.web.mounting import plain_uvicorn
from tracker import Tracker
from tracker.errors import TrackerNotOpen
from tracker.simulator import Simulator

HTML = {"Accept": "text/html"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """SQLite, except where several processes are served."""
    return sqlite_url


def host(*mounts: Mount, lifespan: Any = None, **more: Any) -> Starlette:
    """An application with a page and an error handler of its own."""

    async def home(request: Request) -> Response:
        return PlainTextResponse("the host")

    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("the host's error", 418)

    return Starlette(
        routes=[Route("/", home), *mounts],
        lifespan=lifespan,
        exception_handlers={ValueError: handle, 404: handle},
        **more,
    )


@asynccontextmanager
async def client_of(app: Any, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that uvicorn serves."""
    async with (
        plain_uvicorn(app, **options) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        yield client


async def test_a_tracker_lives_in_another_application(
    make_tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lifespan opens and closes it, with the worker; routes, errors and middleware of the host
    stay the host's, and errors inside stay inside."""
    tracker = make_tracker()
    app = host(
        Mount("/deep", routes=[Mount("/flora", tracker.asgi())]),
        lifespan=tracker.lifespan,
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=lambda request, go: go(request))],
    )
    async with client_of(app) as client:
        assert (await client.get("/")).text == "the host"
        assert (await client.get("/none")).text == "the host's error"
        assert (await client.get("/deep/flora/readyz")).status_code == 200
        answer = await client.get("/deep/flora/none")
        assert answer.json()["error"]["code"] == "not_found"
        assert (await client.get("/deep/flora/", headers=HTML)).status_code == 200

        async def broken(*_: Any, **__: Any) -> None:
            raise ValueError("inside")

        with monkeypatch.context() as patch:
            patch.setattr("tracker.store.queries.runs.list_runs", broken)
            answer = await client.get("/deep/flora/api/runs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        run = await tracker.start("icon-pack", INPUTS)
        assert (await run.wait(timeout=30)).succeeded
    with pytest.raises(TrackerNotOpen):
        await tracker.get(run.run_id)


async def test_it_answers_before_and_after_it_is_open(
    make_tracker: MakeTracker,
) -> None:
    """503, when to ask again, and what to write; a callback as well, which FLORA repeats."""
    tracker = make_tracker()
    with pytest.raises(TrackerNotOpen, match="asgi"):
        async with make_tracker() as opened:
            opened.asgi()
    async with client_of(host(Mount("/flora", tracker.asgi()))) as client:
        for _ in range(2):
            for answer in (
                await client.get("/flora/", headers=HTML),
                await client.post("/flora/callbacks/flora", content=b"{}"),
            ):
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
                assert "lifespan=tracker.lifespan" in answer.json()["error"]["message"]
            async with tracker:
                assert (await client.get("/flora/readyz")).status_code == 200


async def test_closing_waits_for_a_request_that_is_under_way(
    make_tracker: MakeTracker, flora: Simulator
) -> None:
    """A callback whose end comes late is stored before the database is closed."""
    body, begun, closing = event("run_1"), asyncio.Event(), asyncio.Event()

    async def in_parts() -> AsyncIterator[bytes]:
        yield body[:10]
        begun.set()
        await closing.wait()
        yield body[10:]

    tracker = make_tracker(worker=False)
    transport = httpx.ASGITransport(tracker.asgi())
    headers = signed(body, flora.world.options.webhook_secret)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        async with tracker:
            posting = client.post("/callbacks/flora", content=in_parts(), headers=headers)
            answering = asyncio.create_task(posting)
            await begun.wait()
            asyncio.get_running_loop().call_later(0.05, closing.set)
        answer = await answering
    assert (answer.status_code, answer.json()["repeated"]) == (200, False)


async def test_two_trackers_in_one_application_are_two(
    tmp_path: Path, make_tracker: MakeTracker
) -> None:
    """Each with its database, its sign-in and its metrics."""
    one, other = (
        make_tracker(tracker_database_url=f"sqlite:///{tmp_path}/{name}.db", worker=False, **more)
        for name, more in (("one", {"tracker_api_token": "t" * 20}), ("other", {}))
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with one, other:
            yield

    app = host(Mount("/a", one.asgi()), Mount("/a/b", other.asgi()), lifespan=lifespan)
    app.router.routes.reverse()
    body = event("run_1")
    secret = one.settings.all_workspaces[0].webhook_secrets[0].get_secret_value()
    async with client_of(app) as client:
        posted = await client.post("/a/callbacks/flora", content=body, headers=signed(body, secret))
        assert posted.status_code == 200
        assert (await client.post("/a/login", data={"token": "t" * 20})).status_code == 303
        assert len((await client.get("/a/api/deliveries")).json()["deliveries"]) == 1
        assert (await client.get("/a/b/api/deliveries")).json()["deliveries"] == []
        total = "\ntracker_callbacks_total{"
        assert total in (await client.get("/a/metrics")).text
        assert total not in (await client.get("/a/b/metrics")).text


async def test_behind_a_proxy_that_strips_the_path_links_have_it(make_tracker: MakeTracker) -> None:
    """As with `uvicorn --root-path /flora`; it may be all that the server serves."""
    tracker = make_tracker(worker=False)
    async with client_of(tracker.asgi(), root_path="/flora") as client:
        page = await client.get("/", headers=HTML)
        assert 'href="/flora/runs"' in page.text
        assert (await client.get("/openapi.json")).json()["servers"] == [{"url": "/flora"}]


async def test_a_path_that_anyone_chooses_leads_to_no_other_host(
    make_tracker: MakeTracker,
) -> None:
    """Where the mount's path has parameters, they are part of the prefix, and quoted."""
    tracker = make_tracker(worker=False, tracker_api_token="t" * 20)
    app = host(Mount("/{any:path}/flora", tracker.asgi()), lifespan=tracker.lifespan)
    async with client_of(app) as client:
        for path in ("//evil.example/flora/runs", '/"><script>/flora/runs'):
            answer = await client.get(f"{client.base_url}{path}", headers=HTML)
            location = answer.headers.get("location", "/")
            assert urlsplit(location).netloc == ""
            assert not set('"<>') & set(location + answer.text.partition("<!doctype")[0])


class Links(HTMLParser):
    """Every address in a page, also those that scripts use."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the addresses of an element; those of forms that post are not followed."""
        values = dict(attrs)
        for name in ("href", "src", "action", "data-stream"):
            if (value := values.get(name)) and values.get("method") != "post":
                self.found.add(value)


async def test_every_address_of_every_page_is_below_the_prefix(make_tracker: MakeTracker) -> None:
    """A crawl: all that pages, styles and scripts lead to answers 200, and nothing is outside."""
    tracker = make_tracker(worker=False)
    app = host(Mount("/flora", tracker.asgi()), lifespan=tracker.lifespan)
    async with client_of(app) as client:
        run = await tracker.start("icon-pack", INPUTS, tags={"for": "crawl"})
        await run.wait(timeout=30)
        seen: set[str] = set()
        waiting = {"/flora/", "/flora/runbook.html"}  # alerts lead to the second
        while waiting:
            address = waiting.pop()
            seen.add(address.partition("#")[0])
            async with client.stream("GET", address, headers=HTML) as answer:
                assert answer.status_code in (200, 301), address
                kind = answer.headers.get("content-type", "").partition(";")[0]
                text = "" if kind == "text/event-stream" else (await answer.aread()).decode()
            found = {answer.headers["location"]} if answer.is_redirect else set[str]()
            if kind == "text/html":
                links = Links()
                links.feed(text)
                found |= links.found
            elif kind == "text/javascript" and "/vendor/" not in address:
                found |= set(re.findall(r'^import "([^"]+)"', text, re.M))
                assert not re.search(r'["`]/[a-z]', text), address
            elif kind == "text/css":
                found |= set(re.findall(r"url\(['\"]?([^'\")]+)", text))
            for one in found:
                to = urljoin(f"{client.base_url}{address}", one)
                if urlsplit(to).netloc != urlsplit(str(client.base_url)).netloc:
                    continue
                path = to.removeprefix(str(client.base_url).rstrip("/")).partition("#")[0]
                assert path.startswith("/flora/"), (address, one)
                if path not in seen and len(re.findall(r"[?&]", path)) < 2:
                    waiting.add(path)
    pages = {urlsplit(one).path.removeprefix("/flora") for one in seen}
    assert {"/runs", "/batches", "/deliveries", "/health", "/audit", "/api/stream"} <= pages
    assert f"/runs/{run.run_id}" in pages


PROGRAM = """
from starlette.applications import Starlette
from starlette.routing import Mount
from tracker import Tracker

tracker = Tracker.from_env()
app = Starlette(routes=[Mount("/flora", tracker.asgi())], lifespan=tracker.lifespan)
"""
OWN_STREAM = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from tracker import Tracker

tracker = Tracker.from_env(worker=True)

async def lines():
    yield "begun\\n"
    async for change in tracker.events():
        yield f"{change.run.run_id}\\n"

async def changes(request):
    return StreamingResponse(lines())

async def ready(request):
    return PlainTextResponse("")

routes = [Route("/changes", changes), Route("/flora/readyz", ready)]
app = Starlette(routes=routes, lifespan=tracker.lifespan)
"""


def _lead_session() -> None:
    os.setsid()


def _has_members(group: int) -> bool:
    """Whether a process of that group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def run_uvicorn(tmp_path: Path, flora: Simulator) -> Callable[..., ForkedPython]:
    """Runs the program with uvicorn's command, as people do."""

    def run(port: int, url: str, *arguments: str, program: str = PROGRAM) -> ForkedPython:
        (tmp_path / "program.py").write_text(program)
        options = flora.world.options
        return ForkedPython(
            *("-m", "uvicorn", "program:app", f"--port={port}", *arguments),
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "FLORA_BASE_URL": flora.base_url,
                "FLORA_API_KEY": options.api_key,
                "TRACKER_DATABASE_URL": url,
                "TRACKER_RECONCILE_CRON": NO_SWEEPS,
            },
            together=True,
            prepare=_lead_session,
        )

    return run


async def until_ready(client: httpx.AsyncClient) -> None:
    async def ready() -> bool:
        try:
            return (await client.get("/flora/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    await eventually(ready, timeout=40)


@pytest.mark.parametrize(
    ("number", "program", "path", "first"),
    [
        (signal.SIGTERM, PROGRAM, "/flora/api/stream", "retry:"),
        (signal.SIGINT, PROGRAM, "/flora/api/stream", "retry:"),
        (signal.SIGTERM, OWN_STREAM, "/changes", "begun"),
    ],
)
async def test_uvicorn_stops_within_seconds_though_a_stream_is_open(
    run_uvicorn: Callable[..., ForkedPython],
    sqlite_url: str,
    number: signal.Signals,
    program: str,
    path: str,
    first: str,
) -> None:
    """It waits for open responses, without limit by default; the stream ends when it stops, and so
    does one that the application makes of the changes itself."""
    port = free_port()
    with run_uvicorn(port, sqlite_url, program=program) as process:
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                await until_ready(client)
                async with client.stream("GET", path) as stream:
                    lines = stream.aiter_lines()
                    assert (await anext(lines)).startswith(first)
                    process.send_signal(number)
                    async with asyncio.timeout(10):
                        _ = [line async for line in lines]
            output, _ = await asyncio.to_thread(process.communicate, timeout=15)
        finally:
            process.kill()
    assert "Application shutdown complete" in output
    assert "Traceback" not in output


@pytest.mark.thorough
async def test_several_processes_of_uvicorn_share_a_database(
    run_uvicorn: Callable[..., ForkedPython], postgres_url: str
) -> None:
    """Each with its worker; a run started by either ends once, and all of them stop. (Processes of
    `tracker` that share one: tests/e2e/test_many.py.)"""
    port = free_port()
    with run_uvicorn(port, postgres_url, "--workers=2") as process:
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                await until_ready(client)
                inputs = [{"id": "prompt", "type": "text", "value": "tools"}]
                body = {"technique": "icon-pack", "inputs": inputs}
                run = (await client.post("/flora/api/runs", json=body)).json()

                async def settled() -> bool:
                    answer = await client.get(f"/flora/api/runs/{run['run_id']}")
                    return bool(answer.json()["tracking"] == "settled")

                await eventually(settled, timeout=30)
            process.send_signal(signal.SIGTERM)
            output, _ = await asyncio.to_thread(process.communicate, timeout=20)
            await eventually(lambda: not _has_members(process.pid))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in output


async def test_a_token_that_is_taken_out_of_its_file_opens_nothing(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `tracker serve`: nobody has to send a wrong token first."""
    token, config = tmp_path / "token", tmp_path / "tracker.toml"
    token.write_text("the-token-that-leaked")
    config.write_text(f'tracker_api_token = "file:token"\ntracker_database_url = "{sqlite_url}"\n')
    monkeypatch.setenv("TRACKER_CONFIG", str(config))
    tracker = Tracker.from_env(worker=False)
    app = host(Mount("/flora", tracker.asgi()), lifespan=tracker.lifespan)
    async with client_of(app) as client:
        path, leaked = "/flora/api/runs", {"Authorization": "Bearer the-token-that-leaked"}
        assert (await client.get(path, headers=leaked)).status_code == 200
        token.write_text("the-one-that-follows-it")

        async def is_refused() -> bool:
            return (await client.get(path, headers=leaked)).status_code == 401

        await eventually(is_refused)
        follows = {"Authorization": "Bearer the-one-that-follows-it"}
        assert (await client.get(path, headers=follows)).status_code == 200
