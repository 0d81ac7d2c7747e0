"""What one process tells the others through PostgreSQL: the channels and the form of the payloads.

Every payload names its origin, because a process has been told by its own writer already.
"""

from collections.abc import Sequence
from typing import Any, Final

from tracker.store.text import dump_json, load_json

DUE: Final = "tracker_due"
"""A look at some run was brought forward. The payload is the origin."""
RUNS: Final = "tracker_runs"
"""Runs changed. The payload is a JSON list: the origin, then the runs' ids."""
INBOX: Final = "tracker_inbox"
"""Deliveries wait that the origin has no time to apply. The payload is the origin."""
PAYLOAD_BYTES: Final = 7500
"""PostgreSQL takes 7999 bytes in one notification; some are left for the origin."""


def due_notice(origin: str) -> tuple[str, str]:
    """Channel and payload that say: look when the next run is due."""
    return DUE, origin


def inbox_notice(origin: str) -> tuple[str, str]:
    """Channel and payload that say: apply what waits, whoever has the time."""
    return INBOX, origin


def run_notices(origin: str, run_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Channels and payloads that name all these runs, in as few notifications as hold them.

    A run with an absurdly long id is not named.
    """
    made: list[list[str]] = []
    room = 0
    for run_id in run_ids:
        size = len(dump_json(run_id).encode()) + 1
        if size > PAYLOAD_BYTES:
            continue
        if size > room:
            made.append([origin])
            room = PAYLOAD_BYTES
        made[-1].append(run_id)
        room -= size
    return [(RUNS, dump_json(each)) for each in made]


def read_origin(payload: str) -> str:
    """The origin of a `DUE` or `INBOX` notification."""
    return payload


def read_runs(payload: str) -> tuple[str, list[str]]:
    """Origin and runs of a `RUNS` notification; neither where somebody else used the channel."""
    try:
        said: Any = load_json(payload)
    except ValueError:
        return "", []
    if not isinstance(said, list) or not all(isinstance(each, str) for each in said):
        return "", []
    return ("", []) if not said else (said[0], said[1:])
