"""Real `tracker` processes: started, awaited, stopped, killed."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from tests.support.forked import TRACKER, Forked
from tests.support.waiting import NO_SWEEPS, START_SECONDS, eventually, free_port


class Process:
    """One `tracker` process of the test's own. What it logs goes to a file, shown if it fails."""

    def __init__(self, process: asyncio.subprocess.Process | Forked, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(
        cls,
        *arguments: str,
        env: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
    ) -> "Process":
        """Start `tracker ARGUMENTS…` with the given variables alone, of the code in `cwd`."""
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env}
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *TRACKER,
                *arguments,
                env=environment,
                cwd=cwd,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return cls(process, log)

    @classmethod
    def fork(
        cls,
        *arguments: str,
        env: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
        prepare: Callable[[], None] | None = None,
        program: Sequence[str] = TRACKER,
    ) -> "Process":
        """The same, but with the code of this process, and there sooner; it calls `prepare`.

        Another `program` is what `python` takes.
        """
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env}
        process = Forked.begin(
            *arguments, env=environment, output=log, folder=cwd, prepare=prepare, program=program
        )
        return cls(process, log)

    async def answers(self, url: str) -> None:
        """Wait until the process answers 200 there."""

        async def asked() -> bool:
            assert self._process.returncode is None, f"it ended early:\n{self.log}"
            try:
                return (await client.get(url)).status_code == 200
            except httpx.TransportError:
                return False

        async with httpx.AsyncClient(trust_env=False) as client:
            await eventually(asked, timeout=START_SECONDS, interval=0.05)

    async def kill(self) -> int:
        """SIGKILL: no handler runs, nothing is flushed. The exit status, which is another one where
        the process ended by itself before."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        return await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM, as a deploy does; the exit status."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            return await self._process.wait()

    async def wait(self) -> int:
        """The exit status of one that ends by itself."""
        return await self._process.wait()

    async def end(self) -> None:
        """Make sure that it is gone."""
        if self._process.returncode is None:
            await self.kill()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def peak_memory(self) -> int:
        """The most memory that it has held so far, in bytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1])

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""


class Sandbox:
    """The processes of one test, on ports and in a directory of its own."""

    def __init__(
        self,
        directory: Path,
        database_url: str,
        *,
        forks: bool = True,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._prepare = prepare
        self.directory = directory
        self.database_url = database_url
        self._forks = forks
        self.simulator_port = free_port()
        self.port = free_port()
        self._processes: list[Process] = []

    @property
    def simulator(self) -> str:
        """The simulator's root."""
        return f"http://127.0.0.1:{self.simulator_port}"

    @property
    def tracker(self) -> str:
        """The tracker's root."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """How a tracker is told of the simulator, with waits made short."""
        return {
            "FLORA_API_KEY": "sk_test_simulator",
            "FLORA_BASE_URL": f"{self.simulator}/api/v1",
            "FLORA_WEBHOOK_SECRET": "whsec_simulator",
            "TRACKER_DATABASE_URL": self.database_url,
            "TRACKER_PUBLIC_URL": self.tracker,
            "TRACKER_CALLBACK_GRACE": "3",
            "TRACKER_POLL_INTERVAL": "1",
            "TRACKER_POLL_INTERVAL_MAX": "4",
            "TRACKER_API_CONCURRENCY": "8",
            "TRACKER_LOG_FORMAT": "json",
            "TRACKER_RECONCILE_CRON": NO_SWEEPS,
        }

    async def simulate(self, *options: str) -> Process:
        """Start the simulator."""
        process = await self._start("simulate", "--port", str(self.simulator_port), *options)
        await process.answers(f"{self.simulator}/simulator/runs")
        return process

    async def serve(self, *options: str, **env: str) -> Process:
        """Start `tracker serve` on this sandbox's port, and wait until it is ready."""
        process = await self._start("serve", "--port", str(self.port), *options, **env)
        await process.answers(f"{self.tracker}/readyz")
        return process

    async def work(self, **env: str) -> Process:
        """Start `tracker worker`, and wait until it is healthy."""
        port = free_port()
        process = await self._start("worker", "--port", str(port), **env)
        await process.answers(f"http://127.0.0.1:{port}/healthz")
        return process

    async def _start(self, *arguments: str, **env: str) -> Process:
        log = self.directory / f"{len(self._processes)}-{arguments[0]}.log"
        env = self.environment | env
        if self._forks:
            process = Process.fork(*arguments, env=env, log=log, prepare=self._prepare)
        else:
            process = await Process.start(*arguments, env=env, log=log)
        self._processes.append(process)
        return process

    async def run(self, *command: str, **env: str) -> Process:
        """Start a program of Python, `COMMAND…` as `python` takes it, in the test's directory."""
        log = self.directory / f"{len(self._processes)}-{Path(command[0]).stem}.log"
        env = self.environment | env
        process = Process.fork(env=env, log=log, cwd=self.directory, program=command)
        self._processes.append(process)
        return process

    async def close(self) -> None:
        """End every process that is left."""
        for process in self._processes:
            await process.end()


@asynccontextmanager
async def open_sandbox(
    directory: Path,
    database_url: str,
    *,
    forks: bool = True,
    prepare: Callable[[], None] | None = None,
) -> AsyncIterator[Sandbox]:
    """A sandbox whose processes are gone afterwards. Forked ones hold memory that is not theirs,
    and call `prepare` first."""
    sandbox = Sandbox(directory, database_url, forks=forks, prepare=prepare)
    try:
        yield sandbox
    finally:
        await sandbox.close()
