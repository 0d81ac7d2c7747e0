"""Real proxies: nginx and Caddy, each in a directory of its own, ended by its process.

Where nginx is not installed its tests are left out, unless TRACKER_REQUIRE_NGINX is set.
"""

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

from tests.deploy.tls import certificate_for_localhost
from tests.support.waiting import eventually

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
_NGINX_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def require_nginx() -> str:
    """Where nginx is; the test is left out, or fails, where it is not installed."""
    if NGINX is None:
        if os.environ.get("TRACKER_REQUIRE_NGINX"):
            pytest.fail("nginx is not installed, and TRACKER_REQUIRE_NGINX is set")
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    return NGINX


@asynccontextmanager
async def nginx(directory: Path, http: str, port: int) -> AsyncIterator[None]:
    """nginx in the foreground, with `http` as what its `http` block holds; it serves on `port`."""
    program = require_nginx()
    directory.mkdir(parents=True, exist_ok=True)
    # Started as root, its workers are someone else, whom pytest's directories are closed to.
    user = "user root;" if os.geteuid() == 0 else ""
    folders = "".join(f"{one}_temp_path {directory}/{one};\n" for one in _NGINX_TEMPORARY)
    (directory / "nginx.conf").write_text(
        f"{user}\ndaemon off;\nworker_processes 1;\npid {directory}/nginx.pid;\n"
        f"error_log {directory}/proxy.log;\nevents {{ worker_connections 128; }}\n"
        f"http {{\naccess_log off;\n{folders}{http}\n}}\n"
    )
    command = [program, "-e", "stderr", "-p", str(directory), "-c", f"{directory}/nginx.conf"]
    async with _running(command, directory, port):
        yield


@asynccontextmanager
async def caddy(
    program: str, directory: Path, caddyfile: str, port: int, **environment: str
) -> AsyncIterator[None]:
    """Caddy with that file, which serves on `port`; it fetches no certificate."""
    directory.mkdir(parents=True, exist_ok=True)
    options = "{\n\tadmin off\n\tauto_https disable_redirects\n}\n"
    (directory / "Caddyfile").write_text(options + caddyfile)
    command = [program, "run", "--adapter", "caddyfile", "--config", f"{directory}/Caddyfile"]
    folders = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(directory))
    async with _running(command, directory, port, **folders, **environment):
        yield


@asynccontextmanager
async def _running(
    command: Sequence[str], directory: Path, port: int, **environment: str
) -> AsyncIterator[None]:
    log = directory / "proxy.log"
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={"PATH": os.environ["PATH"], **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )

    async def listens() -> bool:
        assert process.returncode is None, log.read_text()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(listens)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


class Site:
    """A site that a page or a file shows, brought to this machine: our ports and certificates."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.certificate, self.key = certificate_for_localhost(directory)

    @property
    def root(self) -> str:
        """Where it is reached."""
        return f"https://localhost:{self.port}"

    def nginx(self, text: str, *upstreams: int) -> str:
        """An example for nginx."""
        text = _replaced(
            text,
            (r"listen \S*\b443 ssl;.*", f"listen 127.0.0.1:{self.port} ssl;"),
            (r"server_name \S+;", "server_name localhost;"),
            (r"ssl_certificate +\S+;", f"ssl_certificate {self.certificate};"),
            (r"ssl_certificate_key +\S+;", f"ssl_certificate_key {self.key};"),
        )
        ports = iter(upstreams)
        text, found = re.subn(
            r"(?<= server )[\d.]+:\d+", lambda _: f"127.0.0.1:{next(ports)}", text
        )
        assert found == len(upstreams)
        return text

    def caddy(self, text: str, upstream: int) -> str:
        """An example for Caddy."""
        text = re.sub(r"^\tbind .*\n", "", text, flags=re.MULTILINE)
        return _replaced(
            text,
            (r"^\S+\.example\.com \{", f"{self.root} {{\n\ttls {self.certificate} {self.key}"),
            (r"127\.0\.0\.1:808\d", f"127.0.0.1:{upstream}"),
        )

    def client(self, **headers: str) -> httpx.AsyncClient:
        """A client that trusts its certificate."""
        trusting = ssl.create_default_context(cafile=self.certificate)
        return httpx.AsyncClient(
            base_url=self.root, verify=trusting, trust_env=False, headers=headers, timeout=20
        )


def _replaced(text: str, *changes: tuple[str, str]) -> str:
    for theirs, ours in changes:
        text, found = re.subn(theirs, lambda _, ours=ours: ours, text, flags=re.MULTILINE)
        assert found == 1, theirs
    return text
