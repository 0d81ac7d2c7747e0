"""No page in a browser makes the simulator call this machine, or changes its faults."""

import asyncio
import socket
from itertools import chain, repeat
from typing import Any

import httpx
import pytest

from tests.simulator.conftest import Flora
from tests.support.waiting import eventually
from tracker.simulator import Options, running
from tracker.simulator.serve import is_own_host

PUBLIC = "93.184.215.14"
NAME = "rebinding.test"
ANSWER = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 443))]


async def test_a_name_that_resolves_to_this_machine_later_is_not_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is public when the run starts, and loopback when the callback is due: nothing connects."""
    connected: list[object] = []

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(await reader.read(100))
        writer.close()

    means = chain([PUBLIC], repeat("127.0.0.1"))
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        named = next(means) if host in (NAME, NAME.encode()) else host
        return real(named, port, *more, **options) if named != PUBLIC else ANSWER

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    async with server, running(Options(run_seconds=0.1, speed=100)) as simulator:
        url = f"https://{NAME}:{server.sockets[0].getsockname()[1]}/anything"
        async with httpx.AsyncClient(base_url=simulator.base_url) as client:
            client.headers["authorization"] = f"Bearer {simulator.world.options.api_key}"
            started = await client.post(
                "/techniques/icon-pack/runs",
                json={
                    "inputs": [{"id": "prompt", "type": "text", "value": "tools"}],
                    "mode": "async",
                    "callback_url": url,
                },
            )
        assert started.status_code == 200
        first = (await eventually(lambda: simulator.world.deliveries))[0]
    assert connected == []
    assert (first.status, first.error) == (None, "ConnectError")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example.com"},
        {"Host": "evil.example.com:8750"},
        {"Origin": "https://evil.example.com"},
        {"Origin": "null"},
    ],
)
@pytest.mark.parametrize("path", ["/simulator/faults", "/api/v1/techniques/icon-pack/runs"])
async def test_pages_of_other_sites_are_refused(
    flora: Flora, path: str, headers: dict[str, str]
) -> None:
    """By the `Host` of the request, and by its `Origin`."""
    answer = await flora.post(flora.world.root + path, json={"drop": 1}, headers=headers)
    assert answer.status_code == 403
    assert (await flora.path("/simulator/faults"))["drop"] == 0


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((one, True) for one in ("127.0.0.1:8750", "[::1]:8750", "localhost", "10.0.0.7")),
        *((one, True) for one in ("simulator:8750", "simulator.flora.svc.cluster.local")),
        *((one, True) for one in ("host.docker.internal", "http://127.0.0.1:8080", "flora.test")),
        *((one, False) for one in ("evil.com", "127.0.0.1.evil.com", "evil.com.", "", "null://")),
    ],
)
def test_own_hosts(host: str, own: bool) -> None:
    """Addresses, and names that cannot be registered."""
    assert is_own_host(host) is own
