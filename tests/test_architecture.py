"""Rules of the code base that no linter checks."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
SOURCES = sorted((ROOT / "tracker").rglob("*.py"))

# Written in pieces, so that this file passes its own test.
REGISTRIES = (
    "pypi" + ".org",
    "python" + "hosted",
    "npm" + "js.",
    "deb." + "debian",
    "ghcr" + ".io",
)
MACHINES = ("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/")


@functools.cache
def _text_files() -> list[tuple[Path, str]]:
    """Every file that is, or would be, committed and is text."""
    files = []
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            try:
                files.append((path, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return files


def _holding(words: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {word}"
        for path, text in _text_files()
        for word in words
        # not the middle of a longer path or an address
        if re.search(r"(?<![\w.-])" + re.escape(word), text)
    ]


def test_no_file_names_a_registry() -> None:
    """Where packages come from is the machine's business."""
    assert _holding(REGISTRIES) == []


def test_no_file_holds_a_path_of_one_machine() -> None:
    """The project works wherever it is cloned."""
    assert _holding(MACHINES) == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_requirement_has_its_hash(lock: Path) -> None:
    """A lock holds exact versions with hashes, and no source of its own."""
    requirements = lock.read_text().replace("\\\n", " ").splitlines()
    requirements = [line for line in requirements if not line.startswith("#")]
    assert requirements
    for line in requirements:
        assert re.match(r"[a-z0-9-]+(\[[a-z,-]+\])?==\S+ ", line), line
        assert "--hash=sha256:" in line, line


def test_the_locks_agree_and_hold_what_is_asked_for() -> None:
    """Tests run with the very releases that a deployment gets, and nothing asked for is missing."""
    locked = {
        lock.stem: dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock.read_text(), re.MULTILINE))
        for lock in LOCKS
    }
    assert locked["runtime"].items() <= locked["dev"].items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    extras = [
        one for extra in project["project"]["optional-dependencies"].values() for one in extra
    ]
    for lock, asked in (
        ("runtime", project["project"]["dependencies"]),
        ("dev", groups["dev"] + project["build-system"]["requires"] + extras),
        ("uv", groups["bootstrap"]),
    ):
        names = {re.split(r"[^a-z0-9-]", one.lower())[0] for one in asked}
        assert names <= locked[lock].keys()


def test_documented_targets_exist() -> None:
    """Every `make X` in the documentation is a target that `make help` lists."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        code = re.findall(r"^```.*?^```|`[^`\n]+`", (ROOT / page).read_text(), re.M | re.S)
        asked = {name for part in code for name in re.findall(r"\bmake ([a-z-]+)", part)}
        assert asked, page
        assert asked <= targets, page


def test_the_core_imports_only_the_standard_library() -> None:
    """The core runs wherever Python does."""
    foreign = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "tracker" / "core")
        for module in _imported(path)
        if module.split(".")[0] not in sys.stdlib_module_names
        and not module.startswith("tracker.core")
    }
    assert foreign == set()


def test_no_http_client_keeps_cookies() -> None:
    """httpx keeps those of any server without limit, unless it is told otherwise."""
    made = {
        (path.relative_to(ROOT).as_posix(), "NoCookies" in ast.unparse(node))
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tracker" / "simulator")
        and "httpx.AsyncClient(" in (text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "httpx.AsyncClient"
    }
    assert len(made) >= 6
    assert {path for path, keeps_none in made if not keeps_none} == {"tracker/cli/simulate.py"}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


STATE = {"runs", "run_outputs", "run_events", "deliveries"}
WRITERS = {
    *("store/writing/writer.py", "store/writing/statements.py"),
    "store/queries/deliveries.py",
}


def test_run_state_is_written_by_the_writers_alone() -> None:
    """Beside the writers, claims move when a run is polled, and retention deletes and empties; the
    doctor rolls back its test insert, and removes its test deliveries."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in SOURCES:
        if writes := set(_writes(ast.parse(path.read_text()))):
            found[path.relative_to(ROOT / "tracker").as_posix()] = writes
    written = set().union(*(found.get(name, set()) for name in WRITERS))
    assert {("insert", table) for table in STATE} <= written
    beside = {name: what for name, what in found.items() if name not in WRITERS}
    assert beside.pop("store/coordination.py") == {("update", "runs")}
    assert beside.pop("store/inspection.py") == {("insert", "deliveries"), ("delete", "deliveries")}
    empties = {what for what in beside["store/writing/retention.py"] if what[0] != "delete"}
    assert empties == {("update", "deliveries")}
    beside["store/writing/retention.py"] -= empties
    assert {verb for writes in beside.values() for verb, _ in writes} <= {"delete"}, beside


def test_only_the_receiver_changes_deliveries() -> None:
    """Pages, commands and the API read them. `receiving` and the writer store, apply, quarantine
    and requeue them, with functions in whose module the reads are, too."""
    module = "tracker.store.queries.deliveries"
    writes = {"store_deliveries", "take_waiting", "finish", "quarantine"}
    writes |= {"requeue", "requeue_runs", "acknowledge"}
    own = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert writes <= {getattr(node, "name", "") for node in own.body}
    for path in SOURCES:
        if path.relative_to(ROOT / "tracker").parts[0] in {"receiving", "store"}:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {
            f"{node.module}.{alias.name}": alias.asname or alias.name
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        used = {
            f"{module}.{node.attr}"
            for node in nodes
            if isinstance(node, ast.Attribute) and _last_name(node.value) == imported.get(module)
        }
        assert not (used | imported.keys()) & {f"{module}.{name}" for name in writes}, path


def test_claims_move_only_the_times_and_the_lease() -> None:
    """A claim says who looks at a run and until when, never what the run is."""
    moved = _set_by("tracker/store/coordination.py")
    assert moved
    assert moved <= {
        *("next_check_at", "next_check_reason", "recheck_at"),
        *("lease_until", "lease_holder"),
    }


def test_retention_empties_only_what_need_not_be_kept() -> None:
    """A delivery loses its body, a start what it asked for; that they were there stays."""
    emptied = _set_by("tracker/store/writing/retention.py")
    assert emptied == {"body", "body_removed_at", "inputs"}


def _set_by(file: str) -> set[str | None]:
    """The columns that the updates in a file set."""
    return {
        keyword.arg
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "values"
        and any(isinstance(one, ast.Call) and _called(one)[0] == "update" for one in ast.walk(node))
        for keyword in node.keywords
    }


def _writes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The writes of run state in `tree`, as SQLAlchemy or as SQL: the verb and the table."""
    tables = "|".join(sorted(STATE))
    sql = re.compile(
        rf"\b(insert\s+into|update|delete\s+from)\s+\"?({tables})\b\"?\s*(\(|set\b|where\b|$)"
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            verb, table = _called(node)
            verb = "insert" if verb in {"RowInsert", "_insert_incoming"} else verb
            if verb in {"insert", "update", "delete"} and table in STATE:
                yield verb, table
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for verb, table, _ in sql.findall(node.value.lower()):
                yield verb.split()[0], table


def _called(call: ast.Call) -> tuple[str, str]:
    """The verb and the table of `insert(tables.runs)`, `sa.insert(runs)` and `runs.insert()`."""
    first = _last_name(call.args[0]) if call.args else ""
    if isinstance(call.func, ast.Attribute):
        owner = _last_name(call.func.value)
        return call.func.attr, first if owner in {"sa", "sqlalchemy"} else owner
    return _last_name(call.func), first


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def test_every_test_says_what_holds() -> None:
    """A test's docstring is its statement, and a failure is read by it."""
    silent = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []
