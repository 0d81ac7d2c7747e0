"""What the pages show works.

`console` blocks (with what they print), `python` blocks and titled `toml` blocks are worked through
page by page, in order, with real processes. Of what would change a machine (`sh` blocks), the
tracker's commands are parsed and the files are looked up. (Those of testing.md have a test of their
own.)
"""

import re
import shlex
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from sqlalchemy import text

from tests.deploy.commands import assert_taken, command_line
from tests.deploy.conftest import Promtool, promtool  # noqa: F401 - the fixture
from tests.docs.pages import DOCS, PAGES, ROOT, Block, blocks, shown
from tests.docs.session import SECRETS, Session
from tests.support.databases import PostgresDatabases
from tests.support.shares import shared
from tools.site import commands
from tracker.settings import load_settings
from tracker.store.engine import Database

EXECUTED = ("console", "python", "toml")
FOLDERS = "deploy|docs|tracker|tests|bench|requirements"
WITH_FLORA = {"api.md", "connect.md", "excel.md", "python.md", "scaling.md"}
"""Pages that speak of a FLORA which is there: a simulator. (Another begins with one of its own.)"""
BEFORE = {
    "python.md": "tracker serve",  # wait is quicker then
    "scaling.md": "tracker runs start icon-pack --input prompt=tools --wait",
}
"""What has been done already when someone comes to a page."""
ONE_PROGRAM = {"python.md"}
"""Pages whose Python blocks go on from each other."""


def named(page: Path) -> str:
    """A page's name, for the test's."""
    return page.name


def with_blocks(*languages: str) -> list[Path]:
    """The pages that have blocks in these languages."""
    return [page for page in PAGES if blocks(page, *languages)]


@pytest.fixture
def postgres(postgres_databases: PostgresDatabases) -> Iterator[dict[str, str]]:
    """The databases that the pages name: `tracker`, with its schema, and two empty ones."""
    with (
        postgres_databases.migrated() as tracker,
        postgres_databases.empty() as restored,
        postgres_databases.empty() as dumped,
    ):
        yield {
            "postgresql://tracker@db.example.com/tracker": tracker,
            "postgresql://tracker@db.example.com/restored": restored,
            "postgresql://tracker@db.example.com/dumped": dumped,
        }


@pytest.fixture
async def session(
    request: pytest.FixtureRequest, tmp_path: Path, sqlite_url: str
) -> AsyncIterator[Session]:
    """A session in a directory of its own, where `tracker.db` is a file with the schema."""
    page: Path = request.node.callspec.params["page"]
    text = "".join(block.text for block in blocks(page, "console"))
    postgres = request.getfixturevalue("postgres") if "postgresql://" in text else {}
    session = Session(tmp_path, postgres=postgres, callbacks_apart="--callbacks-port" in text)
    yield session
    await session.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "page",
    shared([page for page in with_blocks("console", "python") if page.name != "testing.md"], of=4),
    ids=named,
)
async def test_what_a_page_shows_happens(page: Path, session: Session) -> None:
    """Every command of a page succeeds, in order, and prints what the page says it prints."""
    if page.name in WITH_FLORA:
        await session.simulate()
    if page.name in BEFORE:
        await session.type(BEFORE[page.name])
    given = blocks(page, *EXECUTED)
    if page.name in ONE_PROGRAM:
        given = [replace(given[0], text="\n".join(block.text for block in given))]
    for block in given:
        if block.language != "toml" or block.title:
            await session.work_through(block)


@pytest.mark.parametrize("page", with_blocks("toml"), ids=named)
def test_settings_that_are_shown_load(page: Path, tmp_path: Path) -> None:
    """Every settings file on a page is valid, once its secrets are there."""
    others = dict.fromkeys(("other_api_key", "other_webhook_secret"), "another_value")
    for name, value in (SECRETS | others).items():
        (tmp_path / name).write_text(value)
    for block in blocks(page, "toml"):
        config = tmp_path / "tracker.toml"
        config.write_text(block.text.replace("/etc/tracker", str(tmp_path)))
        load_settings({"TRACKER_CONFIG": str(config)})


@pytest.mark.parametrize(
    "page", [page for page in with_blocks("sql") if page.name != "views.md"], ids=named
)
async def test_queries_that_are_shown_run(page: Path, database_url: str) -> None:
    """A `sql` block runs on both databases, one that is titled PostgreSQL there alone.

    (Those of views.md have tests beside the views.)
    """
    queries = [block for block in blocks(page, "sql") if not block.title]
    async with await Database.open(database_url) as database:
        for block in queries:
            async with database.read() as connection:
                await connection.execute(text(block.text))
    if database_url.startswith("postgresql"):
        own = [block for block in blocks(page, "sql") if block.title]
        assert {block.title for block in own} <= {"PostgreSQL"}
        await run_on_postgres(database_url, own)


async def run_on_postgres(url: str, given: list[Block]) -> None:
    """Run blocks as the owner of the database; the role `tracker` is one that goes again."""
    connection = await asyncpg.connect(url)
    role = "docs_" + urlsplit(url).path.strip("/")
    await connection.execute(f'CREATE ROLE "{role}"')
    try:
        for block in given:
            await connection.execute(block.text.replace("ROLE tracker ", f'ROLE "{role}" '))
    finally:
        await connection.execute(f'DROP ROLE "{role}"')
        await connection.close()


def lines_of(page: Path) -> Iterator[str]:
    """The command lines of a page's `sh` blocks, continued ones joined, remarks left out."""
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip():
                yield line.partition("  #")[0].strip()


def trackers(page: Path) -> Iterator[list[str]]:
    """What a page gives to the tracker to do, in blocks that are not executed and in its text."""
    started = re.compile(r"^(?:.* )?(?:\S*/)?tracker (?=\w)|^docker compose run --rm \w+ ")
    for line in lines_of(page):
        if (found := started.match(line)) and not line.startswith(("kubectl", "useradd")):
            yield shlex.split(line[found.end() :])
    for command in re.findall(r"`tracker ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        yield command.translate(str.maketrans("", "", "[]")).split()  # optional parts, too


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_that_are_not_executed_are_taken(page: Path) -> None:
    """The command line has every command that a page names, and takes what it is given there."""
    for words in trackers(page):
        command: Any = command_line()
        rest = list(words)
        while hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, f"there is no `tracker {' '.join(words)}`"
            command = command.commands[rest.pop(0)]
        if rest:
            assert_taken(words)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_targets_that_are_named_exist(page: Path) -> None:
    """A path into the repository leads to something, and a `make` target is one."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\w)", text):
        no_file = path.startswith(("deploy/compose/secrets", "deploy/receiver"))
        assert no_file or (ROOT / path).exists(), f"{page.name}: {path}"
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = [line.split()[1] for line in lines_of(page) if line.startswith("make ")]
    assert set(asked + re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)


def test_files_that_name_a_page_name_one() -> None:
    """What a deployment file, the image or the code calls a page of docs is one."""
    places = [ROOT / "compose.yaml", ROOT / "Dockerfile", ROOT / "README.md", ROOT / "SECURITY.md"]
    for folder in ("deploy", "tracker", "migrations", "tests", "bench", "tools", ".github"):
        places += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in {"", ".py", ".yml", ".yaml", ".toml", ".service", ".sh"}
            and path.is_file()
            and not {"node_modules", "secrets", "__pycache__"} & set(path.parts)
        ]
    named_pages = {
        name: path
        for path in places
        for name in re.findall(r"\bdocs/([\w-]+\.md)", path.read_text("utf-8", errors="replace"))
    }
    assert {"metrics.md", "views.md", "production.md"} <= named_pages.keys()
    missing = {name: str(path) for name, path in named_pages.items() if not (DOCS / name).exists()}
    assert missing == {}


def test_prometheus_takes_the_configuration_that_is_shown(
    promtool: Promtool,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Every `yaml` block on a page is a configuration in which promtool finds no fault."""
    token, config = tmp_path / "token", tmp_path / "prometheus.yml"
    token.write_text("a-token-for-tests")
    shown_blocks = [block for page in PAGES for block in blocks(page, "yaml")]
    assert shown_blocks
    for block in shown_blocks:
        config.write_text(block.text.replace("/run/secrets/metrics_token", str(token)))
        promtool("check", "config", config)


def test_the_command_page_names_every_command() -> None:
    """docs/cli.md says of each command when it is used."""
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert [words for words, _ in commands() if f"`{words}" not in text] == []


def test_what_is_shown_of_an_output_is_compared() -> None:
    """`…` stands for a part of a line or for lines; anything else has to be there."""
    pattern = shown(["a  b", "…", "run_… ok"])
    assert pattern.fullmatch("a b\nrun_1 ok\n")
    assert pattern.fullmatch("a b\nx\ny\nrun_1   is bad\n") is None
    assert pattern.fullmatch("a b\nx\ny\nrun_1   ok\n")
    assert pattern.fullmatch("a c\nrun_1 ok\n") is None
