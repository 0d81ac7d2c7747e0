"""What goes over the wire: frames of server-sent events, made once however many readers there are.

`event: run` carries `{"event", "run"}`: the line of the timeline and the run as it is now, or
`null` in place of the line where the run changed without one (it was lost, or came back). `event:
reset` says that a reader cannot go on from where it was and has to load anew what it shows.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from tracker.core.record import Record
from tracker.store.queries.changes import Line
from tracker.views import number_json, run_json, time_json
from tracker.web.http.answers import to_json

_LINE_ENDS: Final = re.compile(b"\xc2\x85|\xe2\x80[\xa8\xa9]")
"""NEXT LINE, LINE SEPARATOR and PARAGRAPH SEPARATOR, in UTF-8."""
RETRY_MILLISECONDS: Final = 2000
"""How long a browser waits before it connects again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which runs a reader wants to hear of; what is `None` does not matter."""

    run_id: str | None = None
    technique_id: str | None = None
    workspace_id: str | None = None
    status: str | None = None

    def takes(self, record: Record) -> bool:
        """Whether the run, as it is now, is wanted."""
        run = record.run
        return (
            self.run_id in (None, run.run_id)
            and self.technique_id in (None, run.technique_id)
            and self.workspace_id in (None, run.workspace_id)
            and self.status in (None, str(run.status))
        )


@dataclass(frozen=True)
class Change:
    """A change of a run; `line` is `None` for one that the timeline does not hold."""

    record: Record
    line: Line | None

    @cached_property
    def frame(self) -> bytes:
        """The event as it is sent."""
        line = self.line
        number = b"" if line is None else b"id: %d\n" % line.id
        shown = {"event": None if line is None else _line(line), "run": run_json(self.record)}
        return b"%bevent: run\ndata: %b\n\n" % (number, _in_one_line(to_json(shown)))


def greeting(number: int) -> bytes:
    """The first frame. Its id is kept by a browser although there is no event with it."""
    return b"retry: %d\nid: %d\n\n" % (RETRY_MILLISECONDS, number)


def heartbeat(number: int) -> bytes:
    """A comment that keeps the connection open, and how far the reader has come."""
    return b": still here\nid: %d\n\n" % number


def reset(number: int) -> bytes:
    """Load anew; the stream goes on from that number."""
    return b"id: %d\nevent: reset\ndata: {}\n\n" % number


def _in_one_line(data: bytes) -> bytes:
    """JSON without the line ends that some clients know beside CR and LF: their escapes instead."""
    return _LINE_ENDS.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), data)


def _line(line: Line) -> dict[str, Any]:
    return {
        "id": line.id,
        "run_id": line.run_id,
        "at": time_json(line.at),
        "source": line.source.value,
        "status": str(line.status),
        "progress": number_json(line.progress),
    }
