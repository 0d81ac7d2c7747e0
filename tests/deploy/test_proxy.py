"""The Caddyfile of compose.yaml, in the Caddy that is installed, if one is."""

import asyncio
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.deploy.conftest import ROOT
from tests.deploy.tls import certificate_for_localhost
from tests.support.waiting import eventually, free_port
from tests.web.serving import serving

CALLBACKS = 20


def caddy() -> str | None:
    """Where a Caddy is that knows every directive of the file: from 2.7 on."""
    path = shutil.which("caddy")
    if path is None or shutil.which("openssl") is None:
        return None
    said = subprocess.run([path, "version"], capture_output=True, text=True, check=True).stdout
    major, minor = map(int, re.findall(r"\d+", said)[:2])
    return path if (major, minor) >= (2, 7) else None


CADDY = caddy()


@asynccontextmanager
async def proxied(directory: Path, receivers: Sequence[int]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the file's proxy: its receivers are at these ports, its certificate is ours."""
    certificate, key = certificate_for_localhost(directory)
    text = (ROOT / "deploy/compose/Caddyfile").read_text(encoding="utf-8")
    addresses = " ".join(f"127.0.0.1:{port}" for port in receivers)
    text, found = re.subn(r"dynamic a \{.*?\}", f"to {addresses}", text, flags=re.DOTALL)
    assert found == 1
    site = "{$TRACKER_HOST} {"
    assert site in text
    ours = f"{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{site}\n\ttls {certificate} {key}"
    (directory / "Caddyfile").write_text(text.replace(site, ours))
    root = f"https://localhost:{free_port()}"
    assert CADDY is not None
    with (directory / "caddy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(CADDY, "run", "--adapter", "caddyfile", "--config", directory / "Caddyfile"),
            env={
                "PATH": os.environ["PATH"],
                "TRACKER_HOST": root,
                **dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(directory)),
            },
            stdout=log,
            stderr=log,
        )
    trusting = ssl.create_default_context(cafile=certificate)
    try:
        async with httpx.AsyncClient(base_url=root, verify=trusting, trust_env=False) as client:

            async def answers() -> bool:
                assert process.returncode is None, (directory / "caddy.log").read_text()
                try:
                    return (await client.get("/")).is_success
                except httpx.TransportError:
                    return False

            await eventually(answers)
            yield client
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.skipif(CADDY is None, reason="Caddy 2.7 or newer is not installed")
async def test_a_receiver_that_is_replaced_costs_no_callback(tmp_path: Path) -> None:
    """Callbacks whose turn it is at a receiver that takes no connection come to the other one,
    with their body."""

    async def receiver(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        await PlainTextResponse(body)(scope, receive, send)

    async with serving(receiver) as root:
        live = int(root.rpartition(":")[2])
        async with proxied(tmp_path, [free_port(), live]) as client:
            for number in range(CALLBACKS):
                answer = await client.post("/callbacks/flora", content=b"%d" % number)
                assert (answer.status_code, answer.content) == (200, b"%d" % number)
