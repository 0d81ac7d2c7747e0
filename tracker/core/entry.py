"""What goes through the door: one entry for each thing that happened to a run.

Sources make observations; the use cases wrap them into entries that also say what the sight was: a
callback's delivery, a read made for this run alone, an item of a list, the answer to a start.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from tracker.core.observation import Observation
from tracker.core.quick import quick_dataclass

TRIAL: Final = "tracker.doctor"
"""The type of the deliveries with which `tracker doctor` tries the way that callbacks take. They
are signed, stored and answered like any other, speak of no run, and count in no statistics."""
TRIAL_IDS: Final = "whd_doctor_"
"""How their ids begin; hexadecimal digits follow."""


class DeliveryOutcome(StrEnum):
    """What became of a callback whose signature was right."""

    APPLIED = "applied"
    QUARANTINED = "quarantined"


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An authentic callback as it came. `body` is the raw bytes; `created_at` is FLORA's time."""

    delivery_id: str
    received_at: datetime
    body: bytes
    outcome: DeliveryOutcome
    run_id: str | None = None
    event_type: str | None = None
    api_version: str | None = None
    workspace_id: str | None = None
    created_at: datetime | None = None
    reason: str | None = None
    """Why it was quarantined, for a person; `None` where it was applied."""


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A callback came. `observation` is `None` where it is quarantined, and for a trial.

    The delivery and its effect on the run are committed together. A repeated one only counts.
    """

    delivery: Delivery
    observation: Observation | None = None


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run was seen.

    `reads` counts the API reads made for this run alone (none for an item of a list that was read
    for many). `claim` names the claim under which it was made, which is given back. `inputs`,
    `callback_expected`, `slot` and `idempotency_key` come with the answer to our own start; its row
    in the ledger of starts, (`slot`, `idempotency_key`), is closed in the same transaction.
    """

    observation: Observation
    reads: int = 0
    claim: str | None = None
    inputs: list[dict[str, Any]] | None = None
    callback_expected: bool = False
    slot: str | None = None
    idempotency_key: str | None = None


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """A read made for this run alone showed nothing.

    `missing` is true where FLORA answered that the run does not exist; else `error` says what went
    wrong, in words fit for a person. `reads` counts the reads made.
    """

    run_id: str
    at: datetime
    error: str
    missing: bool = False
    reads: int = 1
    claim: str | None = None


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A quarantined callback was read again, and this time it is understood.

    `delivery` is the stored one as it reads now, with the time at which it came; `observation` was
    made at the time of the replay. The delivery becomes applied and its effect on the run is
    committed with it. One that is not quarantined any more has been replayed already: nothing
    happens.
    """

    delivery: Delivery
    observation: Observation


Entry = Delivered | Seen | Unseen | Replayed
