"""The events that are sent to endpoints: which of them a change of a run causes, which endpoint
wants them, the states of a message (an event for one endpoint), how it is signed, and when an
attempt is repeated."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import accumulate
from math import ceil
from operator import add
from typing import Final
from uuid import uuid4

from tracker.core.record import Record
from tracker.core.run import RunState, Tracking, fast_dataclass
from tracker.core.schedule import jitter_share

WAITS: Final = tuple(
    timedelta(seconds=seconds)
    for seconds in (5, 300, 1800, *(3600 * hours for hours in (2, 5, 10, 14, 20, 24)))
)
"""The waits between the attempts to deliver a message, three days in all."""
JITTER: Final = 0.1
"""The share of a wait that is added at most, so that messages that failed together spread out."""
MOST_OPEN: Final = 20
"""Requests to one endpoint at the same time, over all processes, unless its handler has another
limit."""
HANDLER_SECONDS: Final = 60.0
"""How long a call of a handler may take, unless the handler says otherwise."""
LONGEST_RETRY_AFTER: Final = timedelta(hours=1)
"""How long an endpoint may put off an attempt beyond the schedule."""
_KEY_PREFIX: Final = "whsec_"


class EventType(StrEnum):
    """What happened to a run."""

    SETTLED = "run.settled"
    """Its end, outputs and details are stored. Sent again if FLORA then shows another end, outputs
    that were missing, or that the run is open once more until it is settled anew."""
    LOST = "run.lost"
    """FLORA has repeatedly answered that it does not exist."""
    COST_CHANGED = "run.cost_changed"
    """The bill of a settled run changed, or became known after the run was settled."""


class MessageState(StrEnum):
    """The state of a message."""

    PENDING = "pending"
    """Waits for its first or next attempt. Ends as one of the others."""
    DELIVERED = "delivered"
    """The endpoint answered 2xx. Left only if it is resent."""
    FAILED = "failed"
    """Given up after the last attempt of the schedule. Left only if it is resent."""


def events_between(before: Record | None, after: Record) -> list[EventType]:
    """The events that one write of a run causes; `before` is `None` for a new run."""
    tracking = after.tracking
    if before is None or before.tracking is not tracking:
        return [event for event in (EventType.SETTLED, EventType.LOST) if still_holds(event, after)]
    events = []
    if tracking is Tracking.SETTLED:
        if settles_anew(before.run, after.run) or _filtered(before) != _filtered(after):
            events.append(EventType.SETTLED)
        if _bill(before) != _bill(after):
            events.append(EventType.COST_CHANGED)
    return events


def event_id(event: EventType, after: Record) -> str:
    """The identity of an event that this record causes: no endpoint gets one twice.

    That a run is settled is one event for as long as it reports the same, so that a run whose tags
    or technique become known later is sent to the endpoints that want these, and to no other again.
    """
    if event is not EventType.SETTLED:
        return uuid4().hex
    run = after.run
    told = repr((run.run_id, after.settled_at, *_reported(run)))
    return hashlib.sha256(told.encode(errors="replace")).hexdigest()[:32]


def settles_anew(before: RunState, after: RunState) -> bool:
    """Whether a settled run shows another end, or outputs that were missing."""
    (*end, outputs), (*new_end, new_outputs) = _reported(before), _reported(after)
    return new_end != end or new_outputs > outputs


def _reported(run: RunState) -> tuple[str, str, int]:
    """The end, and how many outputs there are (their links may be new with each read)."""
    return str(run.status), run.error.code if run.error else "", len(run.outputs or ())


def _filtered(record: Record) -> tuple[object, ...]:
    """What decides, besides `_reported`, which endpoints want the run."""
    return record.run.workspace_id, record.run.technique_id, record.tags


def still_holds(event: EventType, run: Record) -> bool:
    """Whether the run is still in the state that the event reports.

    If not, a change back to that state causes an event of its own.
    """
    reported = Tracking.LOST if event is EventType.LOST else Tracking.SETTLED
    return run.tracking is reported


def _bill(record: Record) -> float | None:
    """What was charged, as SQLite stores it: rounding is no change."""
    charged = record.run.charged_cost
    return None if charged is None else float(charged)


@fast_dataclass
class RunFilter:
    """Which runs an endpoint gets, or a reader of changes follows: those that match all fields that
    are set."""

    run_id: str | None = None
    workspace_id: str | None = None
    technique_id: str | None = None
    status: str | None = None
    tag: tuple[str, str] | None = None

    def matches(self, record: Record) -> bool:
        run, tags = record.run, record.tags or {}
        return (
            self.run_id in (None, run.run_id)
            and self.workspace_id in (None, run.workspace_id)
            and self.technique_id in (None, run.technique_id)
            and self.status in (None, str(run.status))
            and (self.tag is None or tags.get(self.tag[0]) == self.tag[1])
        )

    def to_json(self) -> dict[str, str]:
        """The fields that are set, for the database."""
        fields = {name: getattr(self, name) for name in ("workspace_id", "technique_id", "status")}
        fields["tag"] = self.tag and "=".join(self.tag)
        return {name: value for name, value in fields.items() if value is not None}

    @staticmethod
    def knows(fields: Mapping[str, str]) -> bool:
        """Whether this version can tell which runs match, of what a newer one may have stored."""
        return fields.keys() <= {"workspace_id", "technique_id", "status", "tag"}

    @classmethod
    def from_json(cls, fields: Mapping[str, str]) -> "RunFilter":
        """The inverse of `to_json`, without the fields that this version does not know."""
        key, equals, value = fields.get("tag", "").partition("=")
        return cls(
            workspace_id=fields.get("workspace_id"),
            technique_id=fields.get("technique_id"),
            status=fields.get("status"),
            tag=(key, value) if equals else None,
        )


def next_attempt(
    message_id: str,
    *,
    since: datetime,
    now: datetime,
    retry_after: float | None = None,
    waits: tuple[timedelta, ...] = WAITS,
) -> datetime | None:
    """When to repeat an attempt that failed `now`; `None` to give up.

    The schedule is a list of times after the first failure (`since`), so that attempts outside of
    it, after an outage of the endpoint, use none of them up. `retry_after` is the wait in seconds
    that the endpoint asked for. The jitter is derived from the id: the function stays pure.
    """
    earliest = now + waits[0]
    times: Iterable[datetime] = accumulate(waits, add, initial=since)
    planned = next((at for at in times if at >= earliest), None)
    if planned is None:
        return None
    jitter = JITTER * jitter_share(message_id, int(planned.timestamp())) * (planned - now)
    # Rounded up: a timedelta of seconds may be a fraction of a microsecond too short.
    asked = min(timedelta(microseconds=ceil(1e6 * (retry_after or 0))), LONGEST_RETRY_AFTER)
    return max(planned + jitter, now + asked)


# Signatures are those of Standard Webhooks (v1): the key is the base64 after `whsec_`.


def new_secret() -> str:
    """A signing secret of 24 random bytes."""
    return _KEY_PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def check_secret(secret: str) -> str:
    """`secret`, if it is `whsec_` and the base64 of at least 16 bytes. Raises `ValueError`."""
    try:
        long_enough = len(_key(secret)) >= 16
    except ValueError:
        long_enough = False
    if not long_enough or not secret.startswith(_KEY_PREFIX):
        raise ValueError(
            "must be whsec_ and the base64 of a key of at least 16 bytes, as "
            '`echo "whsec_$(openssl rand -base64 24)"` prints'
        )
    return secret


def signed_headers(
    message_id: str, body: bytes, secret_values: Sequence[str], *, at: datetime
) -> dict[str, str]:
    """The headers that identify and sign an attempt, with a signature for each secret."""
    timestamp = str(int(at.timestamp()))
    signed = f"{message_id}.{timestamp}.".encode() + body
    digests = (hmac.digest(_key(secret), signed, hashlib.sha256) for secret in secret_values)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{base64.b64encode(one).decode()}" for one in digests),
    }


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(_KEY_PREFIX), validate=True)
