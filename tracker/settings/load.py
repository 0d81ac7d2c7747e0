"""Where settings come from: the environment first, then the TOML file that `TRACKER_CONFIG` names.

In the file a text `"env:NAME"` or `"file:PATH"` stands for what is there, so that no secret has to
stand in it. What the environment overrides is not looked up. Every error says which variable, or
which key of which file, it is about.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tracker.core.errors import SettingsError
from tracker.settings.model import (
    BudgetSettings,
    Settings,
    TokenSettings,
    WorkspaceSettings,
)

_TABLES: Final[dict[str, type[BaseModel]]] = {
    "workspaces": WorkspaceSettings,
    "tokens": TokenSettings,
    "budgets": BudgetSettings,
}
"""What can stand in the file alone, as `[[workspaces]]`, `[[tokens]]` and `[[budgets]]`."""


FileState = tuple[int, ...] | None
"""What tells whether a file is still the same; `None` for one that is not there."""


class Loaded(NamedTuple):
    """The settings, where each variable is set, and the files that they were read from.

    `sources` holds "the environment" or the path of the file for each variable that is set; `files`
    says how each file was just before it was read.
    """

    settings: Settings
    sources: dict[str, str]
    files: dict[Path, FileState]


def file_state(path: Path) -> FileState:
    """How a file is now."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from `environ` (by default the process's) and the file that it names.

    What is set to nothing counts as not set. Raises `SettingsError`, which names each variable or
    key that is wrong, says what it must be, and never holds a secret's value.
    """
    return read_settings(environ)[0]


def read_settings(environ: Mapping[str, str] | None = None) -> Loaded:
    """As `load_settings`, and where the values come from."""
    environ = os.environ if environ is None else environ
    names = [name for name in Settings.model_fields if name not in _TABLES]
    values: dict[str, Any] = {
        name: text for name in names if (text := environ.get(name.upper(), "").strip())
    }
    file: _File | None = None
    if config := environ.get("TRACKER_CONFIG", "").strip():
        file = _File(Path(os.path.expanduser(config)), environ)
        for key, value in file.read().items():
            if key not in values and (found := file.resolve(value, key)) is not None:
                values[key] = found
                file.keys.add(key)
    sources = {
        name.upper(): str(file.path) if file and name in file.keys else "the environment"
        for name in values
    }
    try:
        return Loaded(Settings.model_validate(values), sources, file.states if file else {})
    except ValidationError as fault:
        faults = "; ".join(_in_words(error, file) for error in fault.errors())
    # Raised out here, because a validation error that hung on would carry the values themselves.
    raise SettingsError(faults)


class _File:
    """The configuration file."""

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self.path = path
        self.keys: set[str] = set()
        """The keys whose values were taken from here."""
        self.states: dict[Path, FileState] = {}
        """How this file, and those that its values stand in, were before they were read."""
        self._environ = environ

    def read(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._read_text(self.path))
        except _UnreadableError as error:
            fault = f"which cannot be read: {error}"
        except tomllib.TOMLDecodeError as error:
            fault = f"which is not valid TOML: {error}"
        raise SettingsError(f"TRACKER_CONFIG names {self.path}, {fault}")

    def resolve(self, value: Any, key: str) -> Any:
        """`value` with what its texts stand for. `None` for an empty text, which sets nothing."""
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
            text = self._environ.get(name, "").strip()
            if not text:
                raise SettingsError(f"{where}: the environment variable {name} is not set")
            return text
        if kind == "file":
            # An absolute path stays as it is.
            path = self.path.parent / os.path.expanduser(name)
            try:
                text = self._read_text(path).strip()
            except _UnreadableError as error:
                raise SettingsError(f"{where}: {path} cannot be read: {error}") from error
            if not text:
                raise SettingsError(f"{where}: {path} is empty")
            return text
        return value

    def _read_text(self, path: Path) -> str:
        self.states[path] = file_state(path)
        return _read_text(path)


class _UnreadableError(Exception):
    """A file that is not there, not ours to read, or not text."""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _UnreadableError(error.strerror or type(error).__name__) from error
    except ValueError as error:  # not UTF-8, or a path with a NUL in it; both show the bytes
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeError) else "no such path"
    raise _UnreadableError(reason)


def _in_words(error: ErrorDetails, file: _File | None) -> str:
    """One fault in words: where the value stands, and what it must be."""
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not error["loc"]:
        return said
    key, *rest = error["loc"]
    if file is not None and key in file.keys:
        inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
        where = f"{key}{inner} in {file.path}"
    else:
        where = str(key).upper()
    if error["type"] != "extra_forbidden":
        return f"{where} {said}"
    model = _TABLES.get(str(key), Settings) if rest else Settings
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(error["loc"][-1]).lower(), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{where}: unknown key; {hint}"
