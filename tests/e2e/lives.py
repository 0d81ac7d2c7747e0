"""Lives of `tracker` processes that are cut short: made to die, killed, frozen; and their key."""

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from tests.support.forked import Forked
from tests.support.waiting import START_SECONDS, eventually
from tracker.simulator import Simulator


class FloraKey:
    """The workspace's API key, which processes read from a file, and which FLORA exchanges."""

    def __init__(self, flora: Simulator, folder: Path, *, more: str = "") -> None:
        self._flora = flora
        self._file = folder / "flora.key"
        self._config = folder / "tracker.toml"
        self._config.write_text(f'flora_api_key = "file:flora.key"\n{more}')
        self._file.write_text(flora.world.options.api_key)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process uses FLORA."""
        given = self._flora.environment
        del given["FLORA_API_KEY"]
        return given | {"TRACKER_CONFIG": str(self._config)}

    async def exchange(self) -> None:
        """FLORA refuses the old key, and a moment later the processes can know the new one."""
        key = f"sk_test_{secrets.token_hex(8)}"
        self._flora.world.change({"api_key": key})
        await asyncio.sleep(0.2)
        new = self._file.with_suffix(".new")
        new.write_text(key)
        new.rename(self._file)


class Life:
    """One `tracker` process, from its start to its end. What it says goes to `log`."""

    def __init__(self, process: Forked, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    def begin(
        cls,
        *arguments: str,
        env: Mapping[str, str],
        log: Path,
        prepare: Callable[[], None] | None = None,
    ) -> "Life":
        """Start `tracker ARGUMENTS…` with these variables alone; it calls `prepare` before."""
        env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env}
        return cls(Forked.begin(*arguments, env=env, output=log, prepare=prepare), log)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, a signal being negative; `None` while it lives."""
        return self._process.returncode

    @property
    def killed(self) -> bool:
        """Whether SIGKILL has ended it."""
        return self.status == -signal.SIGKILL

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def ready(self, url: str) -> bool:
        """Wait until it answers 200 there, or ends; whether it lives."""

        async def settled() -> bool:
            if self.status is not None:
                return True
            try:
                return (await client.get(url)).status_code == 200
            except httpx.TransportError:
                return False

        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            await eventually(settled, timeout=START_SECONDS)
        return self.status is None

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)

    def tell(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: connections are taken, and nothing is ever answered."""
        self._process.send_signal(signal.SIGSTOP)

    async def end(self, timeout: float = 30) -> int:
        """Wait for its end; the exit status."""
        try:
            await eventually(lambda: self.status is not None, timeout=timeout, interval=0.005)
        finally:
            if self.status is None:
                self.kill()
                await self._process.wait()
        assert self.status is not None
        return self.status
