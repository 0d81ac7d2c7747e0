"""Tables on a terminal: whole ids, names of techniques, and fewer columns where it is narrow."""

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import insert

from tests.cli.conftest import Commands
from tests.store.every_value import every_value
from tracker.store.engine import migration_engine
from tracker.store.schema import metadata
from tracker.store.url import DatabaseUrl

DIGEST = "24dc8f7ab12a4c239040039bc7715aaa"
RUN, BATCH, DELIVERY = f"run_{DIGEST}", f"bat_{DIGEST}", f"whd_{DIGEST}"
NAME = "Art Director's Critique"
LISTS = {
    "runs list": RUN,
    "starts list": "order-17",
    "batches list": BATCH,
    "deliveries list": DELIVERY,
    "techniques list": "tech_critique",
    "audit list": "cli:ada",
}
TEXT = {
    "run_id": RUN,
    "batch_id": BATCH,
    "delivery_id": DELIVERY,
    "technique_id": "tech_critique",
    "idempotency_key": "order-17",
    "actor": "cli:ada",
    "event_type": "run.completed",
    "reason": f"the body names another workspace than the secret that signed it, for {RUN}",
    "description": "Tells what an art director would say about a picture, in five sentences",
    "detail": {"technique": "tech_critique", "outcome": "it became a run", "run_id": RUN},
    "error": {"message": f"FLORA answered 409 idempotency_duplicate, which is {RUN}"},
    "outputs": [],
    "inputs": [],
    "tags": None,
    "address": "203.0.113.77",
}


@pytest.fixture
def full(tracker: Commands, sqlite_url: str) -> Iterator[Commands]:
    """A database with a row in each list."""

    async def fill() -> None:
        engine = migration_engine(DatabaseUrl.parse(sqlite_url))
        async with engine.begin() as connection:
            for name, number in (
                *(("runs", 1), ("starts", 2), ("batches", 0), ("deliveries", 1)),
                *(("techniques", 2), ("audit", 0)),
            ):
                row = every_value()[name][number] | {
                    key: value for key, value in TEXT.items() if key in metadata.tables[name].c
                }
                if name != "batches":
                    row |= {"name": NAME} if "name" in row else {}
                if name == "starts":
                    row["run_id"] = None
                await connection.execute(insert(metadata.tables[name]), [row])
        await engine.dispose()

    asyncio.run(fill())
    return tracker


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal_hides_columns_and_cuts_no_id(full: Commands, columns: int) -> None:
    """Every id that a list shows is whole, no line is wider than the terminal, and the last line
    names the hidden columns."""
    for command, first in LISTS.items():
        done = full.on_terminal(*command.split(), columns=columns)
        assert done.returncode == 0
        *lines, last = done.stdout.splitlines()
        assert max(map(len, lines)) <= columns, done.stdout
        assert any(first in line.split() for line in lines), done.stdout
        assert all(line.count(DIGEST[:8]) == line.count(DIGEST) for line in lines), done.stdout
        if (command, columns) != ("techniques list", 80):  # which fits
            assert last.startswith("Hidden: "), done.stdout
            assert "--json" in last


def test_a_terminal_shows_the_names_of_techniques(full: Commands) -> None:
    """Where there is room, each column is shown and no line says that one is hidden; runs, starts
    and batches name their technique. A program still gets ids and every column."""
    for command in ("runs list", "starts list", "batches list"):
        wide = full.on_terminal(*command.split(), columns=250).stdout
        assert NAME in wide
        assert "tech_critique" not in wide.replace("tech_critique: ", "")
        assert "Hidden" not in wide
        piped = full(*command.split())
        assert "tech_critique" in piped.stdout
        assert len(piped.stdout.splitlines()) == 3, piped.stdout
        assert piped.stderr == ""
