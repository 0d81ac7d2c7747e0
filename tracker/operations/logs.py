"""The log: every line of every library goes to stderr in one format, with secrets redacted.

stdout is for the output of commands. Lines are for people (`console`) or machines (`json`, one
object a line). The last step redacts known secrets, and whatever has the shape of one, in the
finished line, including tracebacks.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from tracker.core.formatting import iso_time, plain, plain_lines
from tracker.core.log import LogEvent, log_fields, redact, redact_also, shown

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
    line from now on. Another call replaces the rest of the configuration.
    """
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    if format is None:
        format = "console" if terminal else "json"
    colors = terminal and not os.environ.get("NO_COLOR")
    redact_also(secrets)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_LineFormatter(format, colors=colors))
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


_ATTRIBUTES: Final = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime"))
"""What every record has; all else is a field that its library has added."""
_BOLD, _DIM, _RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN = (
    f"\x1b[{code}m" for code in (1, 2, 31, 32, 33, 34, 35, 36)
)
_LEVELS: Final = {"debug": _GREEN, "info": _GREEN, "warning": _YELLOW}


class _LineFormatter(logging.Formatter):
    """Formats our own events with their fields, and other libraries' records with what they say."""

    def __init__(self, format: Literal["console", "json"], *, colors: bool) -> None:
        super().__init__()
        self._is_json = format == "json"
        self._colors = colors

    def format(self, record: logging.LogRecord) -> str:
        event: object = record.msg
        if isinstance(event, LogEvent):
            line = {**event.fields, "event": event.name}
        else:
            # What another library logs while a request is served has the request's id, too.
            added = {name: one for name, one in vars(record).items() if name not in _ATTRIBUTES}
            line = {**log_fields(), **added, "event": record.getMessage()}
        line |= {
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": iso_time(datetime.fromtimestamp(record.created, UTC)),
        }
        if record.stack_info:
            line["stack_info"] = record.stack_info
        if record.exc_info:  # without local variables, keys among them
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=repr) if self._is_json else self._for_people(line))

    def _for_people(self, line: dict[str, Any]) -> str:
        """A line, and a traceback below it. Quoted text moves no cursor and begins no line."""
        at, level, name, logger = map(line.pop, ("timestamp", "level", "event", "logger"))
        traceback = line.pop("exception", "")
        head = (
            self._in(_DIM, at),
            f"[{self._in(_LEVELS.get(level, _RED) + _BOLD, f'{level:<9}')}]",
            self._in(_BOLD, f"{plain(name):<30}"),
            f"[{self._in(_BOLD + _BLUE, logger)}]",
        )
        fields = (
            f"{self._in(_CYAN, name)}={self._in(_MAGENTA, shown(value))}"
            for name, value in sorted(line.items())
        )
        below = f"\n{plain_lines(traceback)}" if traceback else ""
        return " ".join((*head, *fields)) + below

    def _in(self, color: str, text: str) -> str:
        return f"{color}{text}\x1b[0m" if self._colors else text
