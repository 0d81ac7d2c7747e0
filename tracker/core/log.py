"""Structured logging over the standard library's loggers `tracker.*`.

An event is a name and fields: `log.info("run.started", run_id=run_id)`. Nothing is configured here.
The commands configure handlers and formats (`tracker.operations.telemetry`). In another application
the handlers and levels are its own: they see an ordinary record whose message is one line,
`run.started run_id=run_…`, and whose `msg` is the `LogEvent`, for formatters that want the fields.
Neither the message nor the traceback contains a known secret, or anything of the shape of one.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote

from tracker.core.formatting import plain, plain_lines

REDACTED: Final = "[redacted]"
_SHORTEST_SECRET: Final = 4
"""Shorter ones are not redacted: they occur in ordinary words, and the gaps would reveal them."""
_SHAPES: Final = (
    (re.compile(r"\b(sk_(?:live|test)_|whsec_)[A-Za-z0-9+/=_-]+"), rf"\1{REDACTED}"),
    (re.compile(r"""(://[^\s:/@"']*:)[^\s/@"']+(?=@)"""), rf"\1{REDACTED}"),
    (re.compile(r"\b(v1=)[0-9A-Fa-f]{64}"), rf"\1{REDACTED}"),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"), rf"\1{REDACTED}"),
)
"""FLORA's keys and signing secrets, passwords in URLs, signatures, bearer tokens."""

Fields = Mapping[str, Any]
_context: ContextVar[Fields] = ContextVar("tracker.log", default=MappingProxyType({}))


class Redactor:
    """Redacts known secrets, and whatever has the shape of one."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: set[str] = set()
        self._known: re.Pattern[str] | None = None
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        self._secrets.update(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
        written = [form for secret in self._secrets for form in (secret, repr(secret)[1:-1])]
        forms = {
            *written,
            *(json.dumps(form)[1:-1] for form in written),
            *(quote(secret, safe="") for secret in self._secrets),
        }
        longest_first = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def __call__(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        for shape, replacement in _SHAPES:
            text = shape.sub(replacement, text)
        return text


redact: Final = Redactor()
redact_also: Final = redact.add
"""Redact these secrets in every message and traceback of `tracker.*`, from now on."""


class LogEvent:
    """The message of a log record: `str` is its line, without secrets."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Fields) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        fields = (f"{name}={shown(value)}" for name, value in self.fields.items())
        return redact(" ".join((plain(self.name), *fields)))


class Logger:
    """Logs events to the standard library's logger of that name."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._logger.addFilter(_redact_traceback)

    def debug(self, event: str, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(
        self, event: str, *, exc_info: BaseException | bool = True, **fields: Any
    ) -> None:
        """An error, with the traceback of `exc_info` or of the exception that is being handled."""
        self._log(logging.ERROR, event, fields, exc_info)

    def critical(self, event: str, **fields: Any) -> None:
        self._log(logging.CRITICAL, event, fields)

    def is_enabled(self, level: int) -> bool:
        return self._logger.isEnabledFor(level)

    def _log(
        self, level: int, event: str, fields: Fields, exc_info: BaseException | bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            message = LogEvent(event, {**_context.get(), **fields})
            self._logger.log(level, message, exc_info=exc_info, stacklevel=3)


def get_logger(name: str) -> Logger:
    """The logger of a module."""
    return Logger(name)


@contextmanager
def log_context(**fields: Any) -> Iterator[None]:
    """Adds fields to every event that is logged in the block, and in tasks started there."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def add_log_context(**fields: Any) -> None:
    """Add fields to every event until the surrounding `log_context` ends."""
    _context.set({**_context.get(), **fields})


def log_fields() -> Fields:
    """The fields of the surrounding `log_context`."""
    return _context.get()


def shown(value: Any) -> str:
    """A value in a line: a text with blanks or quotes in it is quoted."""
    if isinstance(value, str) and value and not re.search(r"""[\s"'=]""", value):
        return plain(value)
    return plain(repr(value))


def _redact_traceback(record: logging.LogRecord) -> bool:
    """Render the traceback, which formatters of the standard library take as it is."""
    if record.exc_info and not record.exc_text:
        text = logging.Formatter().formatException(record.exc_info)
        record.exc_text = redact(plain_lines(text))
    return True


# Rate-limited logging: one line per interval, with a count.

LOG_INTERVAL: Final = 10.0
"""Default seconds between two lines of one kind."""


class LogRateLimit:
    """Counts events by kind (few, fixed kinds). Times are seconds of any monotonic clock."""

    def __init__(self, seconds: float = LOG_INTERVAL) -> None:
        self._seconds = seconds
        self._counts: dict[str, int] = {}
        self._logged_at: dict[str, float] = {}

    def count(self, kind: str, *, now: float) -> int:
        """Count one event; the number since the last line if a line is due now, else 0."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        logged_at = self._logged_at.get(kind)
        if logged_at is not None and now - logged_at < self._seconds:
            return 0
        self._logged_at[kind] = now
        return self._counts.pop(kind)

    def rest(self, kind: str, *, now: float) -> int:
        """The number since the last line, for a line now; 0 if there were none."""
        if kind in self._counts:
            self._logged_at[kind] = now
        return self._counts.pop(kind, 0)
