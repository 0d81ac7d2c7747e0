"""Fixtures for every test: databases of its own on both engines, and a network guard.

`TRACKER_TEST_DATABASE_URL` (a `postgresql://` URL whose user may create databases) names a server
to use in place of the one that the suite starts.
"""

import asyncio
import functools
import gc
import hashlib
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import uvicorn.server

from tests.support import network_guard
from tests.support.compiled import share_compiled
from tests.support.contexts import share_context
from tests.support.databases import (
    Background,
    PostgresDatabases,
    migrate,
    sqlite_url_of,
)
from tests.support.postgres import PostgresServer
from tests.support.sharing import made_once
from tracker.core.log import redact

# A developer's own key, deployment and proxy are nobody's business here, nor a child process's.
_FOR_TESTS = ("TRACKER_TEST_", "TRACKER_REQUIRE_")
for _name in list(os.environ):
    _is_ours = _name.startswith(("FLORA_", "TRACKER_", "OTEL_"))
    _is_ours = _is_ours and not _name.startswith(_FOR_TESTS)
    if _is_ours or _name.lower().endswith("_proxy"):
        del os.environ[_name]

# What starts the tests in the background may have SIGINT ignored, and processes inherit that: the
# tests that interrupt one want it as a terminal has it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Slow machines are not failures; on CI every run tries the same examples, and four times as many.
_on_ci = bool(os.environ.get("CI"))
hypothesis.settings.register_profile(
    "suite",
    max_examples=100 if _on_ci else 25,
    deadline=None,
    derandomize=_on_ci,
    print_blob=True,
)
hypothesis.settings.load_profile("suite")

network_guard.install()

# Files of tests stay in memory where there is room: thousands of commits wait for a disk elsewhere,
# and no test asks what survives the machine.
_MEMORY = "/dev/shm"  # noqa: S108
if os.access(_MEMORY, os.W_OK | os.X_OK) and "TMPDIR" not in os.environ:
    _volume = os.statvfs(_MEMORY)
    if _volume.f_bavail * _volume.f_frsize > 4 << 30 and not _volume.f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"] = _MEMORY
        tempfile.tempdir = None

# Bytecode is kept, although the one who starts the tests may not want it: some hundred processes
# would compile the same modules, and each process of the suite all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


class _Hasty:
    """asyncio for uvicorn, which pauses a tenth of a second whenever a server is stopped: here one
    is stopped thousands of times."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


uvicorn.server.asyncio = _Hasty()  # type: ignore[assignment]


share_context()
share_compiled()

# httpcore tries to import it in every request, and searches the whole path where it is not
# installed: that takes a twentieth of the time of tests with many requests.
if importlib.util.find_spec("sniffio") is None:
    sys.modules["sniffio"] = None  # type: ignore[assignment]

# The digest of a token is slow on purpose, and each server computes it anew: here, for the same
# few tokens.
hashlib.scrypt = functools.cache(hashlib.scrypt)

# The garbage collector looks at what is young a fiftieth as often, which takes little of the time.
gc.set_threshold(100_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Fork the processes of the suite."""
    from tests.support.workers import fork_workers

    fork_workers(config, len(specs))


ONE_DATABASE = ("cli", "delivering", "e2e", "hostile", "library", "stateful", "web", "worker")
"""Folders of code that has no SQL of its own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--every-database` is for CI: every test of both databases runs on both, every test of HTTP
    with the application alone and mounted, and the thorough cases too."""
    parser.addoption("--every-database", action="store_true", help="run every test in every way")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what has no SQL of its own on one of the two databases, chosen by the test's name; on
    both with `--every-database`. PostgreSQL has every eighth, as a test takes half as long again
    there.

    The SQL has its tests in tests/store, on both; `one_database("sqlite")` names the one for a
    test that takes long. `both_databases` marks the few others whose subject depends on the
    database.
    """
    test = metafunc.definition
    if metafunc.config.getoption("every_database"):
        return
    parametrized = {
        argument
        for mark in test.iter_markers("parametrize")
        for argument in str(mark.args[0]).replace(" ", "").split(",")
    }
    if "database_url" not in set(metafunc.fixturenames) - parametrized:
        return
    if named := test.get_closest_marker("one_database"):
        chosen = named.args[0]
    elif (
        test.path.relative_to(Path(__file__).parent).parts[0] in ONE_DATABASE
        and test.get_closest_marker("both_databases") is None
    ):
        chosen = "sqlite" if zlib.crc32(metafunc.function.__name__.encode()) % 8 else "postgres"
    else:
        return
    test.add_marker(pytest.mark.parametrize("database_url", [chosen], indirect=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave thorough cases to `--every-database`. Let every process of the suite begin with its
    part of the longest tests, so that none is left with one when all the others are done; what is
    long says so with its `timeout`. Those in the browser stay together, as each process would start
    one."""
    if not config.getoption("every_database"):
        thorough = [item for item in items if item.get_closest_marker("thorough")]
        if thorough:
            config.hook.pytest_deselected(items=thorough)
            items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if _is_long(item)]
    rest = [item for item in items if not _is_long(item)]
    share = len(items) / processes
    items.clear()
    for number in range(processes):
        items += long[number::processes]
        wanted = round(share * (number + 1)) - len(items)
        items += rest[:wanted]
        del rest[:wanted]
    items += rest


def _is_long(item: pytest.Item) -> bool:
    return item.get_closest_marker("timeout") is not None and item.path.parent.name != "browser"


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules: it finds nothing in them, and looks for long."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Look for garbage once, whose warnings count as ever. pytest does so five times when it ends,
    which takes each process half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A test that configures the log leaves it as it was found, and its secrets redacted in no
    other's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    secrets, known = set(redact._secrets), redact._known
    yield
    root.handlers[:], root.level = handlers, level
    redact._secrets, redact._known = secrets, known


@pytest.fixture(autouse=True)
def _network_guard() -> Iterator[None]:
    """A test that tried to leave 127.0.0.1 fails, even where its code swallowed the error."""
    network_guard.refused.clear()
    yield
    tried, network_guard.refused[:] = list(network_guard.refused), []
    assert not tried, f"tests reach only 127.0.0.1, and this one tried {tried}"


@pytest.fixture
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether thorough cases run: a test that loops over many goes through all of them then, and
    else through those in which a fault shows."""
    return bool(pytestconfig.getoption("every_database"))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the time limits of databases opened from now on. Tests of those limits do not use this
    fixture."""
    from tests.support.patience import wait_longer_for_the_database

    wait_longer_for_the_database(monkeypatch)


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    """An event loop for fixtures."""
    background = Background()
    yield background
    background.close()


@pytest.fixture(scope="session")
def _postgres_data(background: Background, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a PostgreSQL server whose database `tracker` has the tracker's schema: made once
    for all processes of the suite."""

    def make(data: Path) -> None:
        with PostgresServer() as server:
            databases = PostgresDatabases(server.url(), background)
            databases.create("tracker")
            databases.close()
            background.run(migrate(server.url("tracker")))
            server.keep(data)

    return made_once(tmp_path_factory, "postgresql", make)


@pytest.fixture(scope="session")
def postgres_databases(
    background: Background, request: pytest.FixtureRequest
) -> Iterator[PostgresDatabases]:
    """Makes databases on the one PostgreSQL server of this process."""
    given = os.environ.get("TRACKER_TEST_DATABASE_URL")
    if given:
        databases = PostgresDatabases(given, background)
        yield databases
        databases.close()
        return
    with PostgresServer(data=request.getfixturevalue("_postgres_data")) as server:
        databases = PostgresDatabases(server.url(), background, template="tracker")
        yield databases
        databases.close()


@pytest.fixture
def postgres_url(postgres_databases: PostgresDatabases) -> Iterator[str]:
    """A PostgreSQL database with the tracker's schema, for this test alone."""
    with postgres_databases.migrated() as url:
        yield url


@pytest.fixture
def empty_postgres_url(postgres_databases: PostgresDatabases) -> Iterator[str]:
    """A PostgreSQL database with nothing in it, for this test alone."""
    with postgres_databases.empty() as url:
        yield url


@pytest.fixture
def own_postgres(_postgres_data: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server for this test alone, to be stopped, started and crashed at will.

    Its database `tracker` (`own_postgres.url("tracker")`) has the tracker's schema.
    """
    with PostgresServer(data=_postgres_data) as server:
        yield server


@pytest.fixture(scope="session")
def _sqlite_template(background: Background, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the tracker's schema: made once for all processes of the suite."""

    def make(path: Path) -> None:
        background.run(migrate(sqlite_url_of(path)))
        assert not Path(f"{path}-wal").exists(), "all of it has to be in the one file"

    return made_once(tmp_path_factory, "tracker.db", make)


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """A SQLite file with the tracker's schema, for this test alone."""
    path = tmp_path / "tracker.db"
    shutil.copyfile(_sqlite_template, path)
    return sqlite_url_of(path)


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """A SQLite file that does not exist yet, for this test alone."""
    return sqlite_url_of(tmp_path / "empty.db")


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A database with the tracker's schema: the test runs once on each engine."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest) -> str:
    """A database with nothing in it: the test runs once on each engine."""
    url: str = request.getfixturevalue(f"empty_{request.param}_url")
    return url
