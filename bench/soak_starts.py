"""Starts against a gateway, slow and lost answers, kills and freezes, on both databases.

    python -m bench.soak_starts [--seconds 60] [--json FILE]

FLORA's own record shows whether anything was paid twice, or a run was given to a key that did not
start it.

In the first four FLORA forgets keys within seconds, so that much is left to a person. In the last
two everything takes a 36th of its time, and has the proportions of the defaults: how much is left
to a person there is what a deployment with such a FLORA and such colleagues would see.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import asyncpg

from tests.e2e.starting import Figures, endure
from tests.support.databases import migrate, sqlite_url_of
from tests.support.postgres import PostgresServer


async def soak(seconds: float) -> dict[str, Figures]:
    """Each database with each of the two accounts of idempotency; in proportion with one."""
    found = {}
    forgetful = itertools.product(("sqlite", "postgres"), ("replay", "conflict"), (False,))
    in_proportion = (("sqlite", "replay", True), ("postgres", "conflict", True))
    with PostgresServer() as server:
        for number, (name, idempotency, keeps_proportion) in enumerate(
            (*forgetful, *in_proportion)
        ):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)
                if name == "sqlite":
                    url = sqlite_url_of(path / "tracker.db")
                else:
                    url = server.url(f"soak{number}")
                    await server_database(server, f"soak{number}")
                await migrate(url)
                title = f"{name}, {idempotency}" + ", in proportion" * keeps_proportion
                found[title] = await endure(
                    url,
                    path,
                    seconds=seconds,
                    receivers=1 if name == "sqlite" else 3,
                    seed=number,
                    idempotency=idempotency,
                    in_proportion=keeps_proportion,
                )
    return found


async def server_database(server: PostgresServer, name: str) -> None:
    """A database of that name on the server."""
    connection = await asyncpg.connect(server.url())
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()


def told(figures: Figures) -> dict[str, Any]:
    """The figures by name."""
    return {
        "keys": figures.keys,
        "runs_at_flora": figures.runs,
        "processes_killed": figures.killed,
        "processes_frozen": figures.frozen,
        "states": dict(figures.states),
        "unresolved_without_run": figures.unresolved_without_run,
        "paid_twice": len(figures.paid_twice),
        "runs_under_a_wrong_key": len(figures.wrong) + len(figures.told_wrong),
        "slowest_answer_seconds": round(figures.slowest_answer, 1),
    }


def main() -> int:
    """The command line; 1 where a promise was broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=60, help="for each of the six")
    arguments.add_argument("--json", type=Path, help="write the figures there")
    given = arguments.parse_args()
    figures = {name: told(one) for name, one in asyncio.run(soak(given.seconds)).items()}
    print(json.dumps(figures, indent=2))
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    broken = [
        name for name, one in figures.items() if one["paid_twice"] or one["runs_under_a_wrong_key"]
    ]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
