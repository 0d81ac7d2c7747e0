"""Read the settings, at the start and again when a file with secrets has changed.

They come from the environment, then from the TOML file that `TRACKER_CONFIG` names.

In the file, `"env:NAME"` and `"file:PATH"` are replaced by the value there, so that the file needs
no secrets. Values that the environment overrides are not resolved. Each error names the variable,
or the key and the file.

Access tokens, API keys and signing secrets that come from files (`"file:PATH"`, or the file of
`TRACKER_CONFIG` itself) are rotated without a restart. All other settings need one.
"""

import asyncio
import difflib
import os
import re
import signal
import tomllib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tracker.core.errors import SettingsError
from tracker.core.formatting import requirement
from tracker.core.log import get_logger
from tracker.core.waiting import cancel, repeat
from tracker.settings.model import (
    BudgetSettings,
    EndpointSettings,
    Settings,
    TokenSettings,
    WorkspaceSettings,
)

CHECK_SECONDS: Final = 1.0
"""How often a service checks its files. A refused secret triggers a check at once."""
_TABLES: Final[dict[str, type[BaseModel]]] = {
    "workspaces": WorkspaceSettings,
    "tokens": TokenSettings,
    "budgets": BudgetSettings,
    "endpoints": EndpointSettings,
}
"""The tables `[[workspaces]]`, `[[tokens]]`, …, which only the file can hold."""
_PREFIXES: Final = ("TRACKER_", "FLORA_")
_OF_OTHERS: Final = re.compile(
    "TRACKER_(CONFIG|HOST|COPY_TO|PROMETHEUS_URL|(POSTGRES|TEST|REQUIRE)_.+)"  # deploy/, tests/
    "|.+_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_[0-9]+_(TCP|UDP)(_.+)?)"  # Kubernetes, of services
)
"""Variables with these prefixes that are no settings and no mistakes."""

FileState = tuple[int, ...] | None
"""The identity of a file's content, from `stat`; `None` for a missing file."""

log = get_logger(__name__)


class Loaded(NamedTuple):
    """The settings and their sources.

    `sources` has "the environment" or the file's path for each variable that is set; `files` the
    state of each file just before it was read; `unknown` a sentence for each variable that looks
    like a setting and is none.
    """

    settings: Settings
    sources: dict[str, str]
    files: dict[Path, FileState]
    unknown: tuple[str, ...] = ()


def _file_state(path: Path) -> FileState:
    """The present state of a file."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from `environ` (by default the process's) and the file that it names.

    An empty value counts as not set. Raises `SettingsError`, which names each invalid variable or
    key and what it must be, and never holds a secret.
    """
    return read_settings(environ)[0]


def read_settings(environ: Mapping[str, str] | None = None) -> Loaded:
    """As `load_settings`, with the sources of the values."""
    environ = os.environ if environ is None else environ
    names = [name for name in Settings.model_fields if name not in _TABLES]
    values: dict[str, Any] = {
        name: text for name in names if (text := environ.get(name.upper(), "").strip())
    }
    sources = dict.fromkeys(map(str.upper, values), "the environment")
    states: dict[Path, FileState] = {}
    variables: set[str] = set()
    if config := environ.get("TRACKER_CONFIG", "").strip():
        file = _File(Path(os.path.expanduser(config)), environ)
        states, variables = file.states, file.variables
        for key, value in file.read().items():
            if key not in values and (found := file.resolve(value, key)) is not None:
                values[key], sources[key.upper()] = found, str(file.path)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as invalid:
        message = faults(invalid, sources)
    else:
        unknown = _unknown(environ, [name.upper() for name in names], variables)
        return Loaded(settings, sources, states, unknown)
    # Raised outside of `except`: a chained validation error would carry the values.
    raise SettingsError(message)


def _unknown(
    environ: Mapping[str, str], known: Collection[str], referred: Collection[str]
) -> tuple[str, ...]:
    """What is said of each unknown setting. Values are left out, since they may be secrets."""
    found = []
    for name, value in sorted(environ.items()):
        if not name.startswith(_PREFIXES) or name in known or name in referred:
            continue
        if _OF_OTHERS.fullmatch(name) or (name.endswith("_PORT") and value.startswith("tcp://")):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else "README.md lists the settings."
        found.append(f"unknown setting {name}: {hint}")
    return tuple(found)


class _File:
    """The configuration file."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self.path = path
        self.states: dict[Path, FileState] = {}
        """The state of this file, and of those with its values, before they were read."""
        self.variables: set[str] = set()
        """The environment variables that it refers to."""
        self._environ = environ

    def read(self) -> dict[str, Any]:
        named = f"TRACKER_CONFIG names {self.path}, which"
        text = self._read_text(self.path, named)
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            fault = f"{named} is not valid TOML: {error}"
        raise SettingsError(fault)

    def resolve(self, value: Any, key: str) -> Any:
        """`value` with references replaced; `None` for an empty text, which sets nothing."""
        match value:
            case dict():
                inner = {name: self.resolve(v, f"{key}.{name}") for name, v in value.items()}
                return {name: v for name, v in inner.items() if v is not None}
            case list():
                return [self.resolve(v, f"{key}[{i}]") for i, v in enumerate(value)]
            case str():
                return self._text(value.strip(), f"{key} in {self.path}") or None
            case _:
                return value

    def _text(self, value: str, where: str) -> str:
        kind, _, name = value.partition(":")
        if kind == "env":
            self.variables.add(name)
            text = self._environ.get(name, "").strip()
            if not text:
                raise SettingsError(f"{where}: the environment variable {name} is not set")
            return text
        if kind == "file":
            # An absolute path stays as it is.
            path = self.path.parent / os.path.expanduser(name)
            text = self._read_text(path, f"{where}: {path}").strip()
            if not text:
                raise SettingsError(f"{where}: {path} is empty")
            return text
        return value

    def _read_text(self, path: Path, named: str) -> str:
        self.states[path] = _file_state(path)
        try:
            return path.read_text(encoding="utf-8-sig")
        except OSError as error:
            reason = error.strerror or type(error).__name__
        except ValueError as error:  # not UTF-8, or a NUL in the path; it would show the bytes
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeError) else "no such path"
        raise SettingsError(f"{named} cannot be read: {reason}")


def faults(invalid: ValidationError, sources: Mapping[str, str]) -> str:
    """What is wrong with each setting; `sources` as in `Loaded`."""
    errors = invalid.errors()
    # A list whose only entries are invalid counts as empty, too.
    within = {error["loc"][:-1] for error in errors}
    return "; ".join(
        _message(error, sources)
        for error in errors
        if error["type"] != "too_short" or error["loc"] not in within
    )


def _message(error: ErrorDetails, sources: Mapping[str, str]) -> str:
    """A validation error as a sentence: the variable or key, and what it must be."""
    message = requirement(error["type"], error["msg"])
    if not error["loc"]:
        return message
    key, *rest = error["loc"]
    source = sources.get(str(key).upper(), "the environment")
    if source != "the environment" and key in _TABLES and not rest:
        message = f"must be tables: begin each with [[{key}]]"
    inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    if source != "the environment":
        where = f"{key}{inner} in {source}"
    elif key in _TABLES:
        where = f"{key}{inner}"
    else:
        where = str(key).upper()
    if error["type"] != "extra_forbidden":
        return f"{where} {message}"
    model = _TABLES.get(str(key), Settings) if rest else Settings
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(error["loc"][-1]).lower(), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{where}: unknown key; {hint}"


class Rotation:
    """The `settings` with the current secrets; `tokens` are the access tokens among them, `unknown`
    what was said of unknown settings at the start.

    Where settings come from files, `loaded` has the files and `read` reads them again. A check
    costs a `stat` for each file.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: Loaded | None = None,
        read: Callable[[], Loaded] | None = None,
    ) -> None:
        self.settings = settings
        self.tokens = settings.access_tokens
        self.unknown = loaded.unknown if loaded else ()
        self._read = read
        self._files: dict[Path, FileState] = loaded.files if loaded else {}
        self._failure: str | None = None
        """Why the last reload failed."""
        self.stale: str | None = None
        """Why settings in files are not in force in this process, if any are not."""
        self._followers: list[Callable[[Settings], None]] = []

    def follow(self, follower: Callable[[Settings], None]) -> None:
        """Call `follower` with the settings now and after each change."""
        self._followers.append(follower)
        follower(self.settings)

    def check(self) -> bool:
        """Reload if a file has changed; return whether a secret is new."""
        changed = any(_file_state(path) != state for path, state in self._files.items())
        return changed and self.reload()

    def check_or_retry(self) -> bool:
        """As `check`, and reload also if the last reload failed; return whether a secret is new.

        The fix of a failure may be in a file that was never read, such as one that the settings
        named before it was there. Then each call reads all files, until they can be used.
        """
        return self.check() if self._failure is None else self.reload()

    def reload(self) -> bool:
        """Read all files again; return whether a secret is new.

        Unreadable files and invalid settings are logged and change nothing.
        """
        if self._read is None:
            return False
        now = {path: _file_state(path) for path in self._files}
        try:
            for path in self._files:
                if path.exists() and not path.is_file():
                    raise SettingsError(f"{path} is a pipe or a device, which cannot be read again")
            loaded = self._read()
            rotated = _with_secrets_of(self.settings, loaded.settings)
        except SettingsError as error:
            self._files = now
            if str(error) != self._failure:
                self._failure = self.stale = str(error)
                log.error("settings.not_reloaded", reason=self._failure)
            return False
        self._files, self._failure, self.stale = loaded.files, None, None
        names = Settings.model_fields
        if left := [one for one in names if getattr(rotated, one) != getattr(loaded.settings, one)]:
            log.warning("settings.restart_needed", settings=left)
            self.stale = f"a restart is needed for {', '.join(left)}"
        new = [one for one in names if getattr(rotated, one) != getattr(self.settings, one)]
        if not new:
            return False
        self.settings = rotated
        self.tokens = rotated.access_tokens
        for follower in self._followers:
            try:
                follower(rotated)
            except SettingsError as error:  # one unusable secret must not block the others
                self.stale = str(error)
                log.error("settings.not_reloaded", reason=str(error))
        log.info(
            "settings.reloaded",
            settings=new,
            tokens=len(rotated.access_tokens),
            signing_secrets=sum(len(one.clear_secrets) for one in rotated.all_workspaces),
        )
        return True

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Check once a second until the block ends, if there are files."""
        if not self._files:
            yield
            return
        task = asyncio.create_task(repeat("settings", self._check_next), name="rotation")
        try:
            yield
        finally:
            await cancel(task)

    @contextmanager
    def reloaded_on_hangup(self) -> Iterator[None]:
        """Reload on SIGHUP until the block ends; for a process that is the tracker's own."""
        if not hasattr(signal, "SIGHUP"):
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # no reload while the process ends

    async def _check_next(self) -> None:
        await asyncio.sleep(CHECK_SECONDS)
        self.check_or_retry()


def _with_secrets_of(old: Settings, new: Settings) -> Settings:
    """`old` with the tokens, keys and signing secrets of `new`; workspaces and endpoints match by
    id.

    A new workspace, a first key, and the removal of a workspace's last signing secret need a
    restart: the latter also happens where a file is read while it is written. Raises
    `SettingsError` where no token is left: the service would be open to everyone, or to no one.
    """
    if len(old.access_tokens) and not len(new.access_tokens):
        raise SettingsError(
            "no token is set any more (TRACKER_API_TOKEN, [[tokens]]): the old ones stay valid"
        )

    def rotated(before: WorkspaceSettings, after: WorkspaceSettings) -> WorkspaceSettings:
        has_client = before.api_key is not None and after.api_key is not None
        return before.model_copy(
            update={
                "api_key": after.api_key if has_client else before.api_key,
                "webhook_secrets": after.webhook_secrets or before.webhook_secrets,
            }
        )

    now = {workspace.id: workspace for workspace in new.workspaces}
    signing = {endpoint.id: endpoint.secrets for endpoint in new.endpoints}
    top = rotated(old.top_workspace, new.top_workspace)
    return old.model_copy(
        update={
            "flora_api_key": top.api_key,
            "flora_webhook_secret": top.webhook_secrets,
            "tracker_api_token": new.tracker_api_token,
            "tokens": new.tokens,
            "workspaces": tuple(
                rotated(workspace, now.get(workspace.id, workspace)) for workspace in old.workspaces
            ),
            "endpoints": tuple(
                one.model_copy(update={"secrets": signing.get(one.id, one.secrets)})
                for one in old.endpoints
            ),
        }
    )
