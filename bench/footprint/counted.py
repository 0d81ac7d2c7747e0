"""`tracker` that counts the statements it sends, and writes them down at SIGUSR1.

What goes past SQLAlchemy (PostgreSQL's LISTEN, a ping) is not among them.
"""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, event

from tracker.cli import main

COUNTS: Final = "BENCH_STATEMENTS"
"""Names the file that they are written to: each statement, and how often it was sent."""
_sent: Counter[str] = Counter()


def _count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    _sent[" ".join(statement.split())] += 1


def _write(*_: object) -> None:
    path = Path(os.environ[COUNTS])
    half = path.with_suffix(".half")
    half.write_text(json.dumps(_sent), encoding="utf-8")
    half.replace(path)


if __name__ == "__main__":
    event.listen(Engine, "before_cursor_execute", _count)
    signal.signal(signal.SIGUSR1, _write)
    main()
