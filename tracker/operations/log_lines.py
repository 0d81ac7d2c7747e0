"""The lines of the log, made with structlog, which takes a tenth of a short command's time to load:
`tracker.operations.logs` imports this with the first line."""

import io
import logging
from typing import Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from tracker.core.formatting import plain, plain_lines
from tracker.core.log import LogEvent, log_fields, redact

_TIME: Final = structlog.processors.TimeStamper(fmt="iso", utc=True)


def line_formatter(format: Literal["console", "json"], *, colors: bool) -> logging.Formatter:
    """Formats records, our own and other libraries', and redacts the finished lines."""
    finish: list[Processor]
    if format == "json":
        finish = [
            # Tracebacks as text: structured ones would hold local variables, keys among them.
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        finish = [
            _escape_controls,
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_traceback),
        ]
    return _LineFormatter(
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
            lambda logger, method, line: redact(str(line)),
        ],
    )


class _LineFormatter(structlog.stdlib.ProcessorFormatter):
    """Formats our own events with their fields, and other libraries' records with what they say."""

    def format(self, record: logging.LogRecord) -> str:
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
