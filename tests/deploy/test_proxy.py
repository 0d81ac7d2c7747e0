"""Proxies in front of the tracker: the files and examples that we give, and the plainest one."""

import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tests.deploy.conftest import ROOT
from tests.deploy.proxies import Site, caddy, nginx, require_nginx
from tests.docs.pages import DOCS, blocks
from tests.e2e.processes import Process
from tests.support.waiting import free_port
from tests.web.serving import serving
from tracker.core.clock import utc_now
from tracker.flora.callback import sign

PUBLIC_URL = "https://tracker.example.com"
SECRET = "whsec_proxied"
TOKEN = "a-token-that-is-long-enough"
START = {"technique": "icon-pack", "inputs": [{"id": "prompt", "type": "text", "value": "a cat"}]}
CALLBACKS = 20
NOT_FOR_THE_OUTSIDE = (
    *("/", "/login", "/runs", "/static/base.css", "/metrics", "/openapi.json", "/api/runs"),
    *("/healthz", "/readyz", "/callbacks", "/callbacks/", "/callbacks/florae"),
    *("/callbacks/flora/../../api/runs", "/callbacks/flora/%2e%2e/%2e%2e/metrics"),
)
CADDY = shutil.which("caddy") if shutil.which("openssl") else None


def caddy_knows(*version: int) -> bool:
    """Whether the Caddy that is installed, if one is, is of that version or newer."""
    if CADDY is None:
        return False
    said = subprocess.run([CADDY, "version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"\d+", said)[:2])) >= version


def example(language: str, title: str) -> str:
    """The configuration of that title in docs/proxy.md."""
    (block,) = [one for one in blocks(DOCS / "proxy.md", language) if one.title == title]
    return block.text


@asynccontextmanager
async def tracker(directory: Path, *arguments: str, **env: str) -> AsyncIterator[Process]:
    """A real `tracker serve` without a worker and without a key, ready."""
    directory.mkdir(parents=True, exist_ok=True)
    process = Process.fork(
        *("serve", "--no-worker", *arguments),
        env={
            "TRACKER_DATABASE_URL": f"sqlite:///{directory}/tracker.db",
            "FLORA_WORKSPACE_ID": "ws_1",
            "FLORA_WEBHOOK_SECRET": SECRET,
            **env,
        },
        log=directory / "tracker.log",
    )
    try:
        port = arguments[arguments.index("--port") + 1]
        await process.answers(f"http://127.0.0.1:{port}/readyz")
        yield process
    finally:
        await process.end()


async def call_back(client: httpx.AsyncClient, path: str = "/callbacks/flora") -> httpx.Response:
    """Send what FLORA sends, signed. (It is not understood, and so kept in quarantine: 2xx.)"""
    body = b'{"type": "run.tested"}'
    headers = {"Flora-Signature": sign(body, SECRET, at=utc_now())}
    return await client.post(path, content=body, headers=headers)


def plain(port: int, upstream: int, extra: str = "") -> str:
    """The least that nginx can be told."""
    return (
        f"server {{ listen 127.0.0.1:{port}; {extra} "
        f"location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }}"
    )


def only_callbacks_pass(answers: dict[str, httpx.Response]) -> None:
    """Everything else was answered 404 by the proxy itself."""
    for path, answer in answers.items():
        assert answer.status_code == 404, path
        assert "X-Request-Id" not in answer.headers, f"{path} came to the tracker"


@pytest.mark.parametrize(
    ("public_url", "extra"),
    [
        pytest.param(PUBLIC_URL, "", id="a public URL"),
        pytest.param("", "proxy_set_header X-Forwarded-For $remote_addr;", id="a header"),
        pytest.param("", "proxy_set_header Host $server_name; server_name t.lan;", id="a Host"),
    ],
)
async def test_without_a_token_a_proxy_lets_nobody_in(
    public_url: str, extra: str, tmp_path: Path
) -> None:
    """A client without a token that comes through nginx, which connects from loopback and by
    default says so, too, is refused; callbacks and health are not."""
    require_nginx()
    port, own = free_port(), free_port()
    async with (
        tracker(tmp_path / "t", "--port", str(own), TRACKER_PUBLIC_URL=public_url) as process,
        nginx(tmp_path / "n", plain(port, own, extra), port),
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20
        ) as client,
    ):
        refused = [
            await client.get("/"),
            await client.get("/metrics"),
            await client.get("/api/runs"),
            await client.get("/openapi.json"),
            await client.post("/api/runs", json=START),
        ]
        for answer in refused:
            assert answer.status_code == 403, answer.url
            assert "TRACKER_API_TOKEN" in answer.text
        assert (await call_back(client)).is_success
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).json() == {"status": "ready"}
    (said,) = [line for line in process.log.splitlines() if "serving.without_token" in line]
    assert ("[warning" in said or '"warning"' in said) == bool(public_url)


async def test_a_proxy_that_adds_no_header_needs_a_token(tmp_path: Path) -> None:
    """docs/proxy.md warns of it: without a public URL, requests through the plainest nginx look
    like those of this machine. With a token they are refused all the same."""
    require_nginx()
    assert "No program can detect" in (DOCS / "proxy.md").read_text(encoding="utf-8")
    port, own, closed_port, closed = (free_port() for _ in range(4))
    async with (
        tracker(tmp_path / "t", "--port", str(own)),
        tracker(tmp_path / "c", "--port", str(closed), TRACKER_API_TOKEN=TOKEN),
        nginx(tmp_path / "n", plain(port, own) + plain(closed_port, closed), closed_port),
        httpx.AsyncClient(trust_env=False, timeout=20) as client,
    ):
        assert (await client.get(f"http://127.0.0.1:{port}/api/runs")).status_code == 200
        assert (await client.get(f"http://127.0.0.1:{closed_port}/api/runs")).status_code == 401


@asynccontextmanager
async def shown_proxy(
    kind: str, title: str, directory: Path, upstream: int
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an example of docs/proxy.md, with its upstream at that port."""
    directory.mkdir()
    site = Site(directory, free_port())
    if kind == "nginx":
        running = nginx(directory, site.nginx(example("nginx", title), upstream), site.port)
    else:
        assert CADDY is not None
        text = site.caddy(example("caddyfile", title), upstream)
        running = caddy(CADDY, directory, text, site.port)
    async with running, site.client() as client:
        yield client


@pytest.fixture(params=["nginx", "caddy"])
def kind(request: pytest.FixtureRequest) -> str:
    """Either proxy, as far as it is installed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    kind: str = request.param
    if kind == "nginx":
        require_nginx()
    elif CADDY is None:
        pytest.skip("Caddy is not installed")
    return kind


async def test_the_example_with_several_receivers_asks_the_next(tmp_path: Path) -> None:
    """A receiver that is away, or says 503, costs no callback: another one gets it whole."""
    require_nginx()

    async def stopping(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({}, 503)(scope, receive, send)

    for number, other in enumerate((None, stopping)):
        async with serving(echo) as live, AsyncExitStack() as stack:
            away = free_port()
            if other is not None:
                away = port_of(await stack.enter_async_context(serving(other)))
            site = Site(tmp_path, free_port())
            text = site.nginx(example("nginx", "several receivers"), away, port_of(live))
            await stack.enter_async_context(nginx(tmp_path / f"{number}", text, site.port))
            client = await stack.enter_async_context(site.client())
            for _ in range(CALLBACKS):
                answer = await client.post("/callbacks/flora/token", content=b"the body")
                assert answer.status_code == 200
                assert answer.json()["body"] == "the body"
            only_callbacks_pass({"/": await client.get("/")})


async def test_the_example_passes_callbacks_alone(kind: str, tmp_path: Path) -> None:
    """`/callbacks/flora`, and what is below it, comes to the port for callbacks; all else is 404,
    whoever shows whatever token."""
    private, callbacks = free_port(), free_port()
    arguments = ("--port", str(private), "--callbacks-port", str(callbacks))
    settings = {"TRACKER_PUBLIC_URL": PUBLIC_URL, "TRACKER_API_TOKEN": TOKEN}
    async with (
        tracker(tmp_path / "t", *arguments, **settings),
        shown_proxy(kind, "callbacks", tmp_path / "proxy", callbacks) as client,
    ):
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert (await call_back(client)).is_success
        unsigned = await client.post("/callbacks/flora", content=b"{}")
        assert (unsigned.status_code, "X-Request-Id" in unsigned.headers) == (401, True)
        for path in ("/callbacks/flora/0123abcd", "/callbacks/flora/"):
            assert "X-Request-Id" in (await call_back(client, path)).headers, path
        only_callbacks_pass({path: await client.get(path) for path in NOT_FOR_THE_OUTSIDE})
        only_callbacks_pass({"POST": await client.post("/api/runs", json=START)})


async def test_the_example_for_the_dashboard_keeps_it_behind_the_token(
    kind: str, tmp_path: Path
) -> None:
    """Published on purpose, it asks for a token, knows that the browser came by https, and streams;
    it takes no callbacks, which have a port of their own."""
    private, callbacks = free_port(), free_port()
    arguments = ("--port", str(private), "--callbacks-port", str(callbacks))
    settings = {"TRACKER_PUBLIC_URL": PUBLIC_URL, "TRACKER_API_TOKEN": TOKEN}
    async with (
        tracker(tmp_path / "t", *arguments, **settings),
        shown_proxy(kind, "dashboard and API", tmp_path / "proxy", private) as client,
    ):
        assert (await client.get("/api/runs")).status_code == 401
        assert (await client.get("/")).headers["Location"].startswith("/login")
        assert (await call_back(client)).status_code in (401, 404)
        origin = str(client.base_url).rstrip("/")
        answer = await client.post("/login", data={"token": TOKEN}, headers={"Origin": origin})
        assert answer.status_code == 303
        cookie = answer.headers["Set-Cookie"]
        assert cookie.startswith("__Host-tracker_session=")
        assert cookie.endswith("; Secure")
        assert (await client.get("/")).status_code == 200
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with client.stream("GET", "/api/stream", headers=bearer) as stream:
            assert stream.status_code == 200
            assert await anext(stream.aiter_raw())


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with what came."""
    body = (await Request(scope, receive).body()).decode()
    told = {"port": scope["server"][1], "path": scope["path"], "body": body}
    await JSONResponse(told)(scope, receive, send)


@asynccontextmanager
async def composed(
    directory: Path, callbacks: Sequence[int], private: Sequence[int]
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Clients of both sites of compose's Caddyfile, whose receivers are at these ports."""
    site, private_port = Site(directory, free_port()), free_port()
    text = (ROOT / "deploy/compose/Caddyfile").read_text(encoding="utf-8")
    for port, ours in (("8081", callbacks), ("8080", private)):
        addresses = " ".join(f"127.0.0.1:{one}" for one in ours)
        dynamic = rf"dynamic a \{{\s+name receiver\s+port {port}\s+refresh 5s\s+\}}"
        text, found = re.subn(dynamic, f"to {addresses}", text)
        assert found == 1
    if not caddy_knows(2, 7):  # it has no such directive, which no test but one depends on
        text = re.sub(r"^\s+request_buffers .*\n", "", text, flags=re.MULTILINE)
    address, private_address = "{$TRACKER_HOST} {", "http://:8080 {"
    assert address in text
    assert private_address in text
    text = text.replace(address, f"{address}\n\ttls {site.certificate} {site.key}")
    text = text.replace(private_address, f"http://127.0.0.1:{private_port} {{")
    assert CADDY is not None
    running = caddy(CADDY, directory, text, site.port, TRACKER_HOST=site.root)
    inside = httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{private_port}", trust_env=False, timeout=20
    )
    async with running, site.client() as public, inside:
        yield public, inside


def port_of(root: str) -> int:
    """The port in an address."""
    return int(root.rpartition(":")[2])


@pytest.mark.skipif(not caddy_knows(2, 7), reason="Caddy 2.7 or newer is not installed")
async def test_a_receiver_that_is_replaced_costs_no_callback(tmp_path: Path) -> None:
    """Callbacks whose turn it is at a receiver that takes no connection come to the other one,
    with their body."""
    async with serving(echo) as live, serving(echo) as private:
        receivers = [free_port(), port_of(live)]
        async with composed(tmp_path, receivers, [port_of(private)]) as (public, _):
            for number in range(CALLBACKS):
                answer = await public.post("/callbacks/flora", content=b"%d" % number)
                assert (answer.status_code, answer.json()["body"]) == (200, str(number))


@pytest.mark.skipif(CADDY is None, reason="Caddy is not installed")
async def test_compose_passes_callbacks_alone_to_the_outside(tmp_path: Path) -> None:
    """Its public site leads callbacks to their port and answers 404 to all else; its private site
    leads everything to the other port."""

    def from_port(answer: httpx.Response) -> Any:
        return answer.json()["port"]

    async with serving(echo) as callbacks, serving(echo) as private:
        ports = port_of(callbacks), port_of(private)
        async with composed(tmp_path, [ports[0]], [ports[1]]) as (public, inside):
            for path in ("/callbacks/flora", "/callbacks/flora/0123abcd"):
                assert from_port(await public.post(path)) == ports[0]
            for path in NOT_FOR_THE_OUTSIDE:
                assert (await public.get(path)).status_code == 404, path
            for path in ("/", "/api/runs", "/metrics", "/login"):
                assert from_port(await inside.get(path)) == ports[1]
