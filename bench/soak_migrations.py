"""Upgrades while real processes of older versions are at work, and upgrades that are killed.

    python -m bench.soak_migrations [--database sqlite|postgres|both] [--runs 20000] [--deaths 20]
        [--json FILE]

For each schema of the past of which the repository's history still has code that runs, it receives
callbacks, polls and sweeps over a database with `--runs` runs, while this version's migrations are
run, one after the other. Every callback has to be answered 2xx and be there afterwards. Then
`--deaths` upgrades are killed, each at another statement.
"""

import argparse
import asyncio
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from tests.e2e.processes import Process
from tests.store.test_migrations import on, schema
from tests.store.upgrading import fill, revisions
from tests.support.databases import Background, PostgresDatabases, sqlite_url_of
from tests.support.postgres import PostgresServer
from tests.support.waiting import free_port
from tracker.core.clock import utc_now
from tracker.flora.callback import sign
from tracker.simulator import Options, Simulator, running
from tracker.store import migrate
from tracker.store.engine import Database
from tracker.store.schema import deliveries

ROOT = Path(__file__).parents[1]
SENDERS = 8
BETWEEN = 1.0
"""Seconds of work between two migrations."""
TRIED = 5


class Senders:
    """Post unique callbacks to one address, each once, and note how each was answered."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/callbacks/flora"
        self._going = True
        self._count = 0
        self.acknowledged: set[str] = set()
        self.refused: list[str] = []
        self.slowest = 0.0

    async def run(self) -> None:
        """Until `stop`."""
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            await asyncio.gather(*(self._send(client) for _ in range(SENDERS)))

    def stop(self) -> None:
        """Let each finish what it is at."""
        self._going = False

    async def _send(self, client: httpx.AsyncClient) -> None:
        while self._going:
            self._count += 1
            name = f"{self._count}"
            data = {"run_id": f"run_{name}", "run_type": "technique", "status": "completed"}
            event = {"id": f"whd_{name}", "type": "run.completed", "data": data}
            body = json.dumps(event).encode()
            headers = {"flora-signature": sign(body, "whsec_simulator", at=utc_now())}
            began = time.monotonic()
            answer = await client.post(self._url, content=body, headers=headers)
            self.slowest = max(self.slowest, time.monotonic() - began)
            if answer.is_success:
                self.acknowledged.add(f"whd_{name}")
            else:
                self.refused.append(f"{answer.status_code} {answer.text[:200]}")


def versions() -> dict[str, list[str]]:
    """For each schema of the past the commits whose code knows it, newest first."""
    known = revisions()
    found: dict[str, list[str]] = {}
    for commit in _git("log", "--format=%H").decode().split():
        names = _git("ls-tree", "--name-only", commit, "migrations/versions/").decode().split()
        there = sorted(Path(name).name.partition("_")[0] for name in names if name.endswith(".py"))
        if there and there == known[: len(there)] and there != known:
            found.setdefault(there[-1], []).append(commit)
    return found


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


@contextmanager
def code_of(commits: list[str]) -> Iterator[Path | None]:
    """The newest of these that runs at all, in a folder of its own; `None` if none of the newest
    does: what is not installed any more, older ones need too."""
    for commit in commits[:TRIED]:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
                archive.extractall(folder, filter="data")
            runs = [
                sys.executable,
                "-c",
                "import tracker.cli, tracker.services, tracker.web.http.server",
            ]
            if not subprocess.run(runs, cwd=folder, capture_output=True, check=False).returncode:
                yield Path(folder)
                return
    yield None


async def upgraded_beside(
    code: Path, revision: str, url: str, flora: Simulator, runs: int
) -> dict[str, Any]:
    """All migrations after `revision` while the code of then is at work; the figures."""
    await migrate.upgrade(url, revision)
    await fill(url, runs)
    root = f"http://127.0.0.1:{free_port()}"
    log = code / "server.log"
    server = await Process.start(
        *("serve", "--port", root.rpartition(":")[2]),
        env={
            **flora.environment,
            "TRACKER_DATABASE_URL": url,
            "TRACKER_PUBLIC_URL": root,
            "TRACKER_LOG_FORMAT": "json",
        },
        log=log,
        cwd=code,
    )
    await server.answers(f"{root}/readyz")
    senders = Senders(root)
    sending = asyncio.create_task(senders.run())
    took = {}
    later = revisions()[revisions().index(revision) + 1 :]
    for step in later:
        await asyncio.sleep(BETWEEN)
        flora.start(callback_url=f"{root}/callbacks/flora")
        began = time.monotonic()
        await migrate.upgrade(url, step)
        took[step] = round(time.monotonic() - began, 2)
    await asyncio.sleep(BETWEEN)
    senders.stop()
    await sending
    faults = [line for line in server.log.splitlines() if '"level": "error"' in line]
    status = await server.stop()
    async with await Database.open(url) as db, db.read() as connection:
        kept = set((await connection.execute(sa.select(deliveries.c.delivery_id))).scalars())
    return {
        "migrations_seconds": took,
        "acknowledged": len(senders.acknowledged),
        "refused": senders.refused[:5],
        "lost": sorted(senders.acknowledged - kept)[:5],
        "slowest_answer_seconds": round(senders.slowest, 2),
        "logged": faults[:5],
        "exit_status": status,
    }


async def killed(urls: list[str]) -> dict[str, Any]:
    """Upgrades that die, the first of the databases being the whole one; the figures."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.store.dying_upgrades", *urls), cwd=ROOT
    )
    assert await process.wait() == 0
    newest = await on(urls[0], schema)
    half = []
    for number, url in enumerate(urls[1:], start=1):
        await migrate.upgrade(url)
        if await on(url, schema) != newest:
            half.append(number)
    return {"upgrades_killed": len(urls) - 1, "left_half": half}


async def soak(database: str, runs: int, deaths: int) -> dict[str, Any]:
    """All of it on one engine."""
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if database == "postgres":
            server = stack.enter_context(PostgresServer(fsync=True))
            background = Background()
            databases = PostgresDatabases(server.url(), background)
            stack.callback(background.close)
            stack.callback(databases.close)

        def empty(name: str) -> str:
            if database == "sqlite":
                return sqlite_url_of(folder / f"{name}.db")
            return stack.enter_context(databases.empty())

        async with running(Options(run_seconds=1)) as flora:
            for revision, commits in versions().items():
                with code_of(commits) as code:
                    if code is None:
                        figures.setdefault("without_code", []).append(revision)
                        continue
                    figures[f"beside_{revision}"] = await upgraded_beside(
                        code, revision, empty(revision), flora, runs
                    )
        figures |= await killed([empty(f"killed_{number}") for number in range(deaths + 1)])
    return figures


def broken(figures: dict[str, Any]) -> list[str]:
    """The promises that were not kept."""
    found = [f"an upgrade was left half: {number}" for number in figures["left_half"]]
    for name, each in figures.items():
        if name.startswith("beside_"):
            found += [f"{name}: {text}" for text in each["refused"]]
            found += [f"{name}: {delivery} is lost" for delivery in each["lost"]]
            found += [f"{name}: logged {line}" for line in each["logged"]]
            found += [f"{name}: exit status {each['exit_status']}"] if each["exit_status"] else []
    return found


def main() -> int:
    """The command line; 1 where a promise was broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    arguments.add_argument("--runs", type=int, default=20_000)
    arguments.add_argument("--deaths", type=int, default=20)
    arguments.add_argument("--json", type=Path, help="write the figures there")
    given = arguments.parse_args()
    chosen = ("sqlite", "postgres") if given.database == "both" else (given.database,)
    figures = {name: asyncio.run(soak(name, given.runs, given.deaths)) for name in chosen}
    faults = []
    for database, each in figures.items():
        print(database)
        for name, value in each.items():
            print(f"  {name:18} {value}")
        faults += [f"{database}: {fault}" for fault in broken(each)]
    for fault in faults:
        print(f"BROKEN: {fault}")
    if given.json:
        given.json.write_text(json.dumps({"soak": "migrations", "figures": figures}, indent=2))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
