"""SQLAlchemy's statements, Jinja's templates and Starlette's paths, compiled once in a process.

Each engine and each application would compile its own. Here both are opened by the thousand, each
for the little that one test needs, and to compile that takes far longer than to use it.
"""

from functools import cache
from typing import Any

from jinja2 import Environment
from sqlalchemy import Engine
from starlette import routing

_compile = Environment.compile


class _Statements(dict[Any, Any]):
    """Finds a statement by the kind of its dialect in place of the one object that is its
    engine's."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_of_kind(key), default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_of_kind(key), value)


def _of_kind(key: Any) -> Any:
    dialect, *others = key
    # All about a dialect that the statements of the tracker, or of a test, are compiled for.
    json = (dialect._json_serializer, dialect._json_deserializer)
    return (type(dialect), dialect.paramstyle, *json, *others)


_statements = _Statements()
_templates: dict[Any, Any] = {}


def _compiled(self: Environment, *template: Any, **options: Any) -> Any:
    # Of all environments that have a template of this name and text, the settings are the same.
    key = (*template, *options.items(), self.autoescape, self.trim_blocks, *self.filters)
    if key not in _templates:
        _templates[key] = _compile(self, *template, **options)
    return _templates[key]


def share_compiled() -> None:
    """Let all engines, templates and routes use them from now on."""
    shared = property(lambda _: _statements, lambda _, own: None)
    Engine._compiled_cache = shared  # type: ignore[assignment]
    Environment.compile = _compiled  # type: ignore[method-assign]
    routing.compile_path = cache(routing.compile_path)
