"""The opaque cursors of lists that are read by key: where the page before ended, as two texts."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Integer, literal, tuple_

from tracker.core.errors import FieldFault, InvalidRequest
from tracker.store.text import dump_json, load_json


def encode(first: str, second: str) -> str:
    """The cursor that stands for a row's key; fit for a URL as it is."""
    text = dump_json([first, second])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(cursor: str) -> tuple[str, str]:
    """The key that a cursor stands for. Raises `InvalidRequest` for what `encode` never made."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        first, second = load_json(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, TypeError) as exc:
        raise refusal() from exc
    if not isinstance(first, str) or not isinstance(second, str):
        raise refusal()
    return first, second


def at(moment: datetime, last: str) -> str:
    """The cursor of a list that is sorted by a time and then by an id."""
    return encode(moment.isoformat(), last)


def after(key: Sequence[ColumnElement[Any]], cursor: str | None) -> list[ColumnElement[bool]]:
    """What holds for the rows of such a list, newest first, that come after the cursor; nothing
    where there is none. `key` are the list's two columns. Raises `InvalidRequest` for a cursor that
    cannot be read."""
    if cursor is None:
        return []
    first, text = decode(cursor)
    try:
        moment = datetime.fromisoformat(first).astimezone(UTC)
        last = int(text) if isinstance(key[1].type, Integer) else text
    except (ValueError, OverflowError) as exc:
        raise refusal() from exc
    if isinstance(last, int) and abs(last) >= 2**63:
        raise refusal()
    # Each value as its own column's type: a bare datetime would be bound as the driver sees fit.
    return [tuple_(*key) < tuple_(literal(moment, key[0].type), literal(last, key[1].type))]


def refusal() -> InvalidRequest:
    """The error for a cursor that was not given out here."""
    fault = FieldFault("cursor", "this cursor was not given out here; begin without one")
    return InvalidRequest("the cursor is not valid", [fault])
