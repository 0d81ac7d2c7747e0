"""The log: every line of every library goes to stderr in one format, with secrets redacted.

stdout is for the output of commands. Lines are for people (`console`) or machines (`json`, one
object a line). The last step redacts known secrets, and whatever has the shape of one, in the
finished line, including tracebacks.
"""

import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from tracker.core.log import LogEvent, Redactor, log_fields
from tracker.core.plain import plain, plain_lines

_TIME: Final = structlog.processors.TimeStamper(fmt="iso", utc=True)
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
    """Send our own and other libraries' logs to `stream` (default: stderr).

    The default `format` is `console` on a terminal, else `json`. `secrets` are redacted in every
    line. Another call replaces the configuration.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    if format is None:
        format = "console" if terminal else "json"
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
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        _Formatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                _TIME,
                _add_context,
                structlog.stdlib.ExtraAdder(),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *finish,
                _RedactLine(secrets),
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
                if isinstance(step, _RedactLine):
                    step.redact.add(secrets)


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Formats our own events with their fields, and other libraries' records with what they say."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        event = record.msg
        if isinstance(event, LogEvent):
            level, logger = record.levelname.lower(), logging.getLogger(record.name)
            line: EventDict = {
                **event.fields,
                "event": event.name,
                "level": level,
                "logger": record.name,
            }
            if record.exc_info:
                line["exc_info"] = record.exc_info
            record = logging.makeLogRecord(record.__dict__)
            record.msg = _TIME(logger, level, line)
            record._logger, record._name = logger, level
        return super().format(record)


def _add_context(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """What another library logs while a request is served has the request's id, too."""
    return {**log_fields(), **event}


class _RedactLine:
    """The last step: redacts secrets in the finished line."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self.redact = Redactor(secrets)

    def __call__(self, logger: WrappedLogger, method: str, line: Any) -> str:
        """The rendered line without secrets."""
        return self.redact(str(line))


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
