"""The log: every line of every library goes to stderr in one format, with secrets redacted.

stdout is for the output of commands. Lines are for people (`console`) or machines (`json`, one
object a line). The last step redacts known secrets, and whatever has the shape of one, in the
finished line, including tracebacks.
"""

import logging
import os
import sys
from collections.abc import Iterable
from functools import cached_property
from typing import Final, Literal, TextIO

from tracker.core.log import redact_also

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
    handler.setFormatter(_LazyFormatter(format, colors=colors))
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


class _LazyFormatter(logging.Formatter):
    """Loads what makes the lines with the first one: most short commands log nothing."""

    def __init__(self, format: Literal["console", "json"], *, colors: bool) -> None:
        super().__init__()
        self._format = format
        self._colors = colors

    @cached_property
    def _lines(self) -> logging.Formatter:
        from tracker.operations.log_lines import line_formatter  # noqa: PLC0415 - see above

        return line_formatter(self._format, colors=self._colors)

    def format(self, record: logging.LogRecord) -> str:
        return self._lines.format(record)
