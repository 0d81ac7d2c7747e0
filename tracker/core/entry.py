"""What is written of runs: one entry for each thing that happened to one, and deliveries.

Sources make observations; the use cases wrap them into entries that also say what the sight was: a
callback, a read made for this run alone, an item of a list, the answer to a start.
"""

from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from tracker.core.observation import Observation
from tracker.core.quick import quick_dataclass
from tracker.core.tags import Tags

TRIAL: Final = "tracker.doctor"
"""The type of the deliveries with which `tracker doctor` tries the way that callbacks take. They
are signed, stored and answered like any other, speak of no run, and count in no statistics."""
TRIAL_IDS: Final = "whd_doctor_"
"""How their ids begin; hexadecimal digits follow."""


class DeliveryOutcome(StrEnum):
    """What became of a callback whose signature was right.

    It is stored as waiting, and answered. Whoever applies it makes it applied, together with its
    effect on its run, or quarantined, with the reason; a replay makes a quarantined one wait again.
    """

    WAITING = "waiting"
    APPLIED = "applied"
    QUARANTINED = "quarantined"


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An authentic callback as it came. `body` is the raw bytes; `created_at` is FLORA's time.

    `workspace_id` is the workspace whose secret signed it; the one that the body names where that
    is not known. `callback_token` is the last part of the address that it came to, where that is
    not the bare one.
    """

    delivery_id: str
    received_at: datetime
    body: bytes
    run_id: str | None = None
    event_type: str | None = None
    api_version: str | None = None
    workspace_id: str | None = None
    created_at: datetime | None = None
    callback_token: str | None = None


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run was seen.

    `reads` counts the API reads made for this run alone (none for an item of a list that was read
    for many). `claim` names the claim under which it was made, which is given back. The others
    come with the answer to our own start, whose row in the start log, (`slot`, `idempotency_key`),
    is closed in the same transaction; `reserved_cost` is the price of this run, in USD.
    `counted_before` says that the run's end was counted before retention removed it.
    """

    observation: Observation
    reads: int = 0
    claim: str | None = None
    inputs: list[dict[str, Any]] | None = None
    tags: Tags | None = None
    reserved_at: datetime | None = None
    reserved_cost: Decimal | None = None
    callback_expected: bool = False
    slot: str | None = None
    idempotency_key: str | None = None
    counted_before: bool = False


@quick_dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """A read made for this run alone showed nothing.

    `missing` is true where FLORA answered that the run does not exist, while it could be read in
    that workspace; else `error` says what went wrong, in words fit for a person. `reads` counts the
    reads made.
    """

    run_id: str
    at: datetime
    error: str
    missing: bool = False
    reads: int = 1
    claim: str | None = None


Entry = Seen | Unseen
