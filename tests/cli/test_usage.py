"""Help, wrong usage, and what is missing: exit statuses and the one line on stderr."""

import io
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.cli.conftest import Commands, simulate
from tests.support.waiting import free_port

COMMANDS = {
    "serve": [
        *("--host", "--port", "--no-worker", "--simulate"),
        *("--callbacks-only", "--callbacks-port", "--callbacks-host"),
    ],
    "worker": ["--port"],
    "reconcile": ["--since", "--json"],
    "poll": ["--json"],
    "runs start": ["--input", "--workspace", "--idempotency-key", "--wait", "--json"],
    "starts list": ["--state", "--workspace", "--limit", "--cursor", "--json"],
    "starts show": ["--workspace", "--json"],
    "starts resolve": ["--run", "--none", "--workspace", "--json"],
    "starts exclude": ["--json"],
    "batch": [
        *("--map", "--workspace", "--dry-run", "--max-cost", "--concurrency", "--again"),
        "--accept-changes",
        *("--retry-failed", "--skip-bad-rows", "--wait", "--format", "--delimiter"),
        *("--results", "--output", "--json"),
    ],
    "batches list": ["--limit", "--cursor", "--json"],
    "batches show": ["--results", "--output", "--json"],
    "runs track": ["--technique", "--force", "--json"],
    "runs forget": ["--force", "--json"],
    "runs list": ["--status", "--tracking", "--json"],
    "runs show": ["--json"],
    "runs watch": ["--json", "--json-lines"],
    "runs explain": ["--json"],
    "runs download": [
        *("--batch", "--all-settled", "--technique", "--to", "--watch", "--allow-private"),
        *("--max-bytes", "--concurrency", "--json"),
    ],
    "techniques sync": ["--json"],
    "techniques list": ["--gone", "--limit", "--cursor", "--json"],
    "techniques show": ["--json"],
    "deliveries list": ["--outcome", "--run", "--limit", "--cursor", "--json"],
    "deliveries show": ["--json"],
    "deliveries replay": ["--all", "--json"],
    "endpoints list": ["--json"],
    "endpoints test": ["--json"],
    "endpoints enable": ["--json"],
    "messages list": [
        *("--endpoint", "--state", "--event", "--run", "--limit", "--cursor", "--json"),
    ],
    "messages show": ["--json"],
    "messages resend": ["--json"],
    "messages recover": ["--endpoint", "--since", "--json"],
    "listen": [
        *("--forward-to", "--event", "--print", "--url", "--token", "--secret", "--json-lines"),
    ],
    "doctor": ["--json"],
    "db upgrade": ["--json"],
    "db current": ["--json"],
    "db copy": ["--to", "--json"],
    "db recount": ["--json"],
    "simulate": [
        *("--port", "--seed", "--speed", "--run-seconds", "--drop", "--duplicate", "--early"),
        *("--late", "--reorder", "--bad-signature", "--rate-limit", "--errors", "--cut"),
        "--no-history-outputs",
    ],
    "demo": ["--json"],
}


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    """The error of a command: one line on stderr, nothing on stdout, no traceback."""
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(tracker: Commands, command: str) -> None:
    """`--help` shows the documented options and is status 0."""
    done = tracker(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "[str]" not in done.stdout
    for option in COMMANDS[command]:
        assert f"{option} " in done.stdout


def test_help_names_every_command(tracker: Commands) -> None:
    """Help and the bare command list the commands; only the first was asked for."""
    asked, bare = tracker("--help"), tracker()
    assert asked.returncode == 0
    assert bare.returncode == 2
    assert bare.stderr == asked.stdout
    for command in COMMANDS:
        assert f"\n  {command.split()[0]} " in asked.stdout


def test_version_is_shown(tracker: Commands) -> None:
    """`--version` shows the installed version."""
    from tracker import __version__

    assert tracker("--version").stdout == f"tracker {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("frobnicate", "No such command"),
        ("runs strat", "Did you mean 'start'"),
        ("runs start", "Missing argument 'TECHNIQUE'"),
        ("runs start cctv-cam --input face", "'face' is not ID=VALUE"),
        ("runs start cctv-cam --input face:=x", "is not ID=VALUE"),
        ("runs list --tracking done", "--tracking"),
        ("runs list --limit 0", "--limit"),
        ("runs track ''", "RUN_ID"),
        ("reconcile --since yesterday", "'--since': must be a duration"),
        ("simulate --drop 3", "'--drop': 3 is not a share"),
        ("simulate --speed 0", "speed"),
        ("serve --port 70000", "--port"),
        ("serve --callbacks-only --callbacks-port 8081", "exclude each other"),
        ("serve --callbacks-host 0.0.0.0", "--callbacks-host needs --callbacks-port"),
        ("serve --port 8081 --callbacks-port 8081", "must differ"),
        ("serve --simulate --port 0", "--simulate needs a --port"),
        ("serve --simulate --callbacks-only", "excludes --callbacks-only"),
        ("serve --simulate --host 192.0.2.1", "--simulate serves this machine"),
        ("poll now", "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_status_2(tracker: Commands, arguments: str, said: str) -> None:
    """What is wrong with the command is one line on stderr that says where usage is told."""
    done = tracker(*(word.strip("'") for word in arguments.split()))
    assert done.returncode == 2
    line = one_line(done)
    assert said in line
    assert "--help" in line


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        ("poll", {}, "FLORA_API_KEY is not set"),
        ("reconcile", {}, "FLORA_API_KEY is not set"),
        ("techniques sync", {}, "FLORA_API_KEY is not set"),
        ("runs start cctv-cam --input face:text=x", {}, "FLORA_API_KEY is not set"),
        ("runs list", {"FLORA_BASE_URL": "http://example.org"}, "FLORA_BASE_URL must begin with"),
        ("db current", {"TRACKER_CONFIG": "gone.toml"}, "TRACKER_CONFIG names gone.toml"),
        ("serve --host 0.0.0.0 --port 0", {}, "TRACKER_API_TOKEN is not set"),
        (
            "serve --host 0.0.0.0 --port 0 --callbacks-port 0 --callbacks-host 127.0.0.1",
            {},
            "TRACKER_API_TOKEN is not set",
        ),
        ("serve --port 0", {"TRACKER_API_TOKEN": "a"}, "TRACKER_API_TOKEN is shorter than 16"),
    ],
)
def test_missing_and_wrong_settings_are_status_2(
    tracker: Commands, arguments: str, environ: dict[str, str], said: str
) -> None:
    """The line names the variable."""
    done = tracker(*arguments.split(), **environ)
    assert done.returncode == 2
    assert said in one_line(done)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("postgresql://somebody:hidden@127.0.0.1:9/x", "cannot be reached"),
        ("sqlite:////nowhere/at/all/tracker.db", "there is no directory /nowhere/at/all"),
    ],
)
def test_a_database_that_is_not_there_is_status_1(tracker: Commands, place: str, said: str) -> None:
    """The line says what is wrong and which variable names the database, once, and no password."""
    done = tracker("runs", "list", TRACKER_DATABASE_URL=place)
    assert done.returncode == 1
    line = one_line(done)
    assert said in line
    assert line.count("TRACKER_DATABASE_URL") == 1
    assert "hidden" not in line


def test_a_taken_port_is_status_1(tracker: Commands) -> None:
    """A port that another process listens on is told, with what to do."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in ("serve", "simulate"):
            done = tracker(command, "--port", port)
            assert done.returncode == 1
            assert f"port {port}" in one_line(done)


def test_a_database_that_does_not_answer_is_status_1(tracker: Commands) -> None:
    """The line says that it is the database, and holds no password."""
    url = f"postgresql://me:hunter2@127.0.0.1:{free_port()}/tracker"
    done = tracker("runs", "list", TRACKER_DATABASE_URL=url)
    assert done.returncode == 1
    assert "database" in one_line(done).lower()
    assert "hunter2" not in done.stderr


def test_a_database_file_may_have_any_name(tracker: Commands) -> None:
    """Its bytes may be no UTF-8, as an older system's or another locale's are not."""
    url = f"sqlite:///{tracker.folder}/\udcff.db"
    assert tracker("runs", "list", TRACKER_DATABASE_URL=url).returncode == 0
    assert "accepts writes" in tracker("doctor", "--json", TRACKER_DATABASE_URL=url).stdout
    assert Path(tracker.folder, "\udcff.db").exists()


def _hide_temporary_folders() -> None:
    tempfile.tempdir = "/nonexistent"


def test_without_a_temporary_folder_is_status_1(tracker: Commands) -> None:
    """As in a container whose file system is read-only: the line says what to set."""
    for command in (["demo"], ["serve", "--simulate", "--port", str(free_port())]):
        done = tracker(*command, prepare=_hide_temporary_folders)
        assert done.returncode == 1
        assert "set TMPDIR" in done.stderr.splitlines()[-1]


def test_an_unknown_run_is_status_1(tracker: Commands) -> None:
    """`runs show` of a run that nobody heard of fails, and says how to track it."""
    done = tracker("runs", "show", "run_unknown", "--json")
    assert done.returncode == 1
    assert "tracker runs track run_unknown" in one_line(done)


UNWRITABLE = "tracker: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    "arguments", ["runs list --json", "db current", "spending --csv", "--help"]
)
@pytest.mark.parametrize("unbuffered", [False, True])
def test_an_output_that_cannot_be_written_is_status_1(
    tracker: Commands, arguments: str, unbuffered: bool
) -> None:
    """One line, where the disk is full; a command whose stdout is closed prints nothing."""
    command = arguments.split()
    full = tracker(*command, prepare=partial(_fill_stdout, unbuffered))
    assert (full.returncode, one_line(full)) == (1, UNWRITABLE)
    closed = tracker(*command, prepare=_close_stdout)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_what_the_encoding_of_stdout_lacks_is_escaped(tmp_path: Path) -> None:
    """In place of a traceback, which would hide the results of a batch that was paid."""
    shown = _in_shell("doctor", tmp_path, "PYTHONIOENCODING=latin-1 ")
    assert "Nothing is set" in shown.stdout
    assert "\\u2192 Run the doctor with" in shown.stdout
    assert shown.stderr == ""


def test_arguments_are_utf8_whatever_the_locale(tracker: Commands, stack: ExitStack) -> None:
    """Also where Python is told to read them as ASCII: FLORA gets the prompt that was typed, and a
    file may have any name."""
    simulate(tracker, stack)
    (tracker.folder / "Zoë.csv").write_text("prompt\nZoë\n")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (
        ("runs", "start", "icon-pack", "--input", "prompt=Zoë", "--tag", "name=Zoë"),
        ("batch", "icon-pack", "Zoë.csv", "--no-wait", "--tag-column", "name=prompt"),
    ):
        command = [sys.executable, "-m", "tracker", *arguments]
        environ = tracker.essential | tracker.environ | ascii_only
        subprocess.run(command, check=True, cwd=tracker.folder, env=environ, capture_output=True)
    for run in tracker.json("runs", "list")["runs"]:
        assert run["tags"] == {"name": "Zoë"}
        assert [one["value"] for one in run["inputs"]] == ["Zoë"]


def _fill_stdout(unbuffered: bool) -> None:
    """Give the process the stdout that Python makes as it starts where the disk is full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    raw = io.FileIO(1, "w", closefd=False)
    written = raw if unbuffered else io.BufferedWriter(raw)
    sys.stdout = io.TextIOWrapper(written, write_through=unbuffered)  # type: ignore[type-var]


def _close_stdout() -> None:
    os.close(1)
    sys.stdout = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "unbuffered", ["", pytest.param("PYTHONUNBUFFERED=1 ", marks=pytest.mark.thorough)]
)
def test_python_says_no_more_about_an_output_that_cannot_be_written(
    tmp_path: Path, unbuffered: str
) -> None:
    """The same holds for a process of its own, to its very end."""
    full = _in_shell("runs list >/dev/full", tmp_path, unbuffered)
    assert (full.returncode, one_line(full)) == (1, UNWRITABLE)
    closed = _in_shell("runs list >&-", tmp_path, unbuffered)
    assert (closed.returncode, closed.stderr) == (0, "")


def _in_shell(arguments: str, folder: Path, variables: str) -> "subprocess.CompletedProcess[str]":
    command = ["/bin/sh", "-c", f"{variables}exec {sys.executable} -m tracker {arguments}"]
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, check=False)


def test_an_interrupted_start_is_status_130(tmp_path: Path) -> None:
    """Ctrl-C while the command's modules are loaded ends it without a traceback."""
    interrupted = """
import sys
from tracker.cli import main
class Interrupt:
    def find_spec(self, name, *_):
        if name == "tracker.cli.operations":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", interrupted],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
