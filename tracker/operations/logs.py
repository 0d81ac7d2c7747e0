"""The log: every line of every library goes to stderr in one format, with secrets redacted.

stdout is for the output of commands. Lines are for people (`console`) or machines (`json`, one
object a line). The last step redacts known secrets, and whatever has the shape of one, in the
finished line, including tracebacks.
"""

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, Final, Literal, TextIO
from urllib.parse import quote

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from tracker.core.plain import plain, plain_lines

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

_QUIET: Final = {
    "httpx": logging.WARNING,  # a line per request, which our callers log themselves
    "httpcore": logging.WARNING,
    "apscheduler": logging.WARNING,  # a line per job run, every few seconds
    "alembic": logging.WARNING,  # several lines per schema check
    "asyncio": logging.WARNING,
    "aiosqlite": logging.WARNING,
}


def configure_logs(
    *,
    format: Literal["console", "json"] | None = None,
    level: str = "info",
    secrets: Iterable[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Send structlog's and the standard library's logs to `stream` (default: stderr).

    The default `format` is `console` on a terminal, else `json`. `secrets` are redacted in every
    line. Another call replaces the configuration.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    if format is None:
        format = "console" if terminal else "json"
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    finish: list[Processor]
    if format == "json":
        finish = [
            # Tracebacks as text: structured ones would hold local variables, keys among them.
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        colors = terminal and not os.environ.get("NO_COLOR")
        finish = [
            _escape_controls,
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_traceback),
        ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *common,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *finish,
                Redactor(secrets),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name, lowest in _QUIET.items():
        logging.getLogger(name).setLevel(max(lowest, root.level))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def redact_also(secrets: Iterable[str]) -> None:
    """Redact these secrets too, from now on: they came while the process ran."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, structlog.stdlib.ProcessorFormatter):
            for step in handler.formatter.processors:
                if isinstance(step, Redactor):
                    step.add(secrets)


class Redactor:
    """The last step of the log: redacts secrets in the finished line."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets: set[str] = set()
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Redact these too."""
        self._secrets.update(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
        written = [form for secret in self._secrets for form in (secret, repr(secret)[1:-1])]
        forms = {
            *written,
            *(json.dumps(form)[1:-1] for form in written),
            *(quote(secret, safe="") for secret in self._secrets),
        }
        longest_first = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def __call__(self, logger: WrappedLogger, method: str, line: Any) -> str:
        """The rendered line without secrets."""
        clean = str(line)
        if self._known is not None:
            clean = self._known.sub(REDACTED, clean)
        for shape, replacement in _SHAPES:
            clean = shape.sub(replacement, clean)
        return clean


def _traceback(stream: TextIO, exception: ExcInfo) -> None:
    """A traceback without colours and local variables, with control characters escaped."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exception)
    stream.write(plain_lines(text.getvalue()))


def _escape_controls(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Quoted text must not move a terminal's cursor or begin a new line."""
    for key, value in event.items():
        if isinstance(value, str) and key not in ("exception", "stack"):
            event[key] = plain(value)
    return event
