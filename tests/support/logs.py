"""What the tracker logs while a test looks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tracker.core.log import LogEvent


class _Capture(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, LogEvent):
            level = record.levelname.lower()
            self.lines.append({**record.msg.fields, "event": record.msg.name, "log_level": level})


@contextmanager
def capture_logs(level: int = logging.INFO) -> Iterator[list[dict[str, Any]]]:
    """The events from `level` on that are logged in the block, with `event` and `log_level`."""
    logger, capture = logging.getLogger("tracker"), _Capture()
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(capture)
    try:
        yield capture.lines
    finally:
        logger.removeHandler(capture)
        logger.setLevel(before)
