"""The events that are sent to endpoints, and which of them a change of a run causes; the states of
a message, which is an event for one endpoint."""

from collections.abc import Mapping
from enum import StrEnum

from tracker.core.fast_dataclass import fast_dataclass
from tracker.core.record import Record
from tracker.core.run import Tracking


class EventType(StrEnum):
    """What happened to a run."""

    SETTLED = "run.settled"
    """Its end, outputs and details are stored. Sent again if it is settled anew after FLORA's list
    contradicted its end."""
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
    if tracking is Tracking.SETTLED and _bill(before) != _bill(after):
        return [EventType.COST_CHANGED]
    return []


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


@fast_dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs an endpoint gets: those that match all fields that are set."""

    workspace_id: str | None = None
    technique_id: str | None = None
    status: str | None = None
    tag: tuple[str, str] | None = None

    def matches(self, record: Record) -> bool:
        """Whether the run matches."""
        run, tags = record.run, record.tags or {}
        return (
            self.workspace_id in (None, run.workspace_id)
            and self.technique_id in (None, run.technique_id)
            and self.status in (None, str(run.status))
            and (self.tag is None or tags.get(self.tag[0]) == self.tag[1])
        )

    def to_json(self) -> dict[str, str]:
        """The fields that are set, for the database."""
        fields = {name: getattr(self, name) for name in ("workspace_id", "technique_id", "status")}
        fields["tag"] = self.tag and "=".join(self.tag)
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, str]) -> "RunFilter":
        """The inverse of `to_json`."""
        key, equals, value = fields.get("tag", "").partition("=")
        return cls(
            workspace_id=fields.get("workspace_id"),
            technique_id=fields.get("technique_id"),
            status=fields.get("status"),
            tag=(key, value) if equals else None,
        )
