"""Pages of a newest-first list: an opaque cursor that is, as at FLORA, an offset in disguise."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from tracker.simulator.problems import Problem

DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 100

Item = TypeVar("Item")


def encode_cursor(offset: int) -> str:
    """The cursor that stands for `offset`: base64url of `{"offset":N}` without padding."""
    return base64.urlsafe_b64encode(b'{"offset":%d}' % offset).rstrip(b"=").decode("ascii")


def decode_cursor(cursor: str) -> int:
    """The offset that a cursor stands for. Raises `Problem` for what `encode_cursor` never made."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        offset = json.loads(raw)["offset"]
    except (ValueError, binascii.Error, KeyError, TypeError, RecursionError):
        offset = None
    if type(offset) is not int or offset < 0:
        raise Problem.invalid(("cursor", "is not a cursor of this list"))
    return offset


def page(items: Sequence[Item], query: Mapping[str, str]) -> tuple[Sequence[Item], str | None]:
    """The page that `cursor` and `limit` in `query` ask for, and the cursor of the next one.

    Raises `Problem` where `limit` is not a number from 1 to 100 or the cursor is not one of ours.
    """
    text = query.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= MAX_LIMIT):
        raise Problem.invalid(("limit", f"must be a number from 1 to {MAX_LIMIT}"))
    start = decode_cursor(query["cursor"]) if query.get("cursor") else 0
    end = start + int(text)
    return items[start:end], encode_cursor(end) if end < len(items) else None
