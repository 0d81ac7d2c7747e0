"""Keys, signing secrets and tokens are rotated while the tracker is at work, without a restart."""

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx

from tests.e2e.processes import Process
from tests.support.waiting import eventually, free_port
from tests.web.callbacks import PATH, event, signed
from tests.web.flora import START
from tracker.simulator import Options, running

CONFIG = """
flora_api_key = "file:key"
flora_webhook_secret = "file:secret"
tracker_api_token = "file:token"
"""


class _Secrets:
    """What is in force, in the files that the tracker reads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.number = 0
        (folder / "tracker.toml").write_text(CONFIG)
        self.write(key=self.key, secret=self.signing, token=self.token)

    @property
    def key(self) -> str:
        return f"sk_test_number_{self.number}"

    @property
    def signing(self) -> str:
        return f"whsec_number_{self.number}"

    @property
    def token(self) -> str:
        return f"the-token-number-{self.number}"

    def write(self, **texts: str) -> None:
        for name, text in texts.items():
            new = self._folder / f"{name}.new"
            new.write_text(f"{text}\n")
            new.rename(self._folder / name)


async def test_a_rotation_under_load_refuses_nothing(
    tmp_path: Path, database_url: str, thorough: bool
) -> None:
    """Callbacks that the new secret signs, programs with the new token and starts with the new key
    are taken from the first one on; what is old is refused afterwards."""
    rounds = 5 if thorough else 2
    secrets = _Secrets(tmp_path)
    port = free_port()
    root = f"http://127.0.0.1:{port}"
    taken: list[int] = []
    async with (
        running(Options(api_key=secrets.key, failures=0)) as flora,
        httpx.AsyncClient(base_url=root, trust_env=False, timeout=30) as client,
    ):
        process = Process.fork(
            *("serve", "--port", str(port), "--no-worker"),
            env={
                "TRACKER_CONFIG": str(tmp_path / "tracker.toml"),
                "TRACKER_DATABASE_URL": database_url,
                "FLORA_BASE_URL": flora.base_url,
                "FLORA_WORKSPACE_ID": "ws_simulator",
                "TRACKER_LOG_FORMAT": "json",
            },
            log=tmp_path / "serve.log",
        )

        async def post_callbacks(sender: int) -> None:
            while not done.is_set():
                body = event(f"run_{sender}_{len(taken)}")
                answer = await client.post(
                    PATH, content=body, headers=signed(body, secrets.signing)
                )
                taken.append(answer.status_code)

        async def start() -> httpx.Response:
            shown = {"Authorization": f"Bearer {secrets.token}"}
            return await client.post("/api/runs", json=START, headers=shown)

        done = asyncio.Event()
        try:
            await process.answers(f"{root}/readyz")
            senders = [asyncio.create_task(post_callbacks(number)) for number in range(8)]
            for _ in range(rounds):
                before = len(taken)
                await eventually(lambda before=before: len(taken) > before + 50)
                old = secrets.token
                # All at once, and those who use them at the same moment. What the old secret signed
                # may still be on its way, so both count until the next rotation.
                signing = secrets.signing
                secrets.number += 1
                secrets.write(
                    key=secrets.key, secret=f"{secrets.signing} {signing}", token=secrets.token
                )
                flora.world.options = replace(flora.world.options, api_key=secrets.key)
                assert (await start()).status_code == 201
                refused = await client.get("/api/runs", headers={"Authorization": f"Bearer {old}"})
                assert refused.status_code == 401
            assert set(taken) == {200}
            # Without the old one, what it signed is refused: at most what was on its way.
            secrets.number += 1
            secrets.write(secret=secrets.signing)
            before = len(taken)
            await eventually(lambda: len(taken) > before + 50)
            done.set()
            await asyncio.gather(*senders)
            assert taken[before:].count(401) <= len(senders)
            assert set(taken) <= {200, 401}
            assert process.log.count('"settings.reloaded"') >= rounds + 1
            assert "flora.key_refused" not in process.log
            assert "-number-" not in process.log
            assert await process.stop() == 0
        finally:
            await process.end()
