"""Pages of a newest-first list: an opaque cursor that is, as at FLORA, an offset in disguise.

With `opaque_cursors` nobody else can read the offset, and the cursor knows its age.
"""

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from tracker.simulator.options import Options
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
        raise _bad_cursor()
    return offset


class Page(NamedTuple, Generic[Item]):
    """Some items of a list, the offset of the first one, and the cursor of the next page."""

    items: Sequence[Item]
    offset: int
    next_cursor: str | None


def page(
    items: Sequence[Item], query: Mapping[str, str], options: Options, now_ms: int
) -> Page[Item]:
    """The page that `cursor` and `limit` in `query` ask for.

    Raises `Problem` where `limit` is not a number from 1 to 100 or the cursor is not one of ours.
    """
    text = query.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= MAX_LIMIT):
        raise Problem.invalid(("limit", f"must be a number from 1 to {MAX_LIMIT}"))
    cursor, start = query.get("cursor"), 0
    if cursor and options.opaque_cursors:
        start = _open_cursor(cursor, options, now_ms)
    elif cursor:
        start = decode_cursor(cursor)
    end = start + int(text)
    following: str | None = None
    if end < len(items):
        opaque = options.opaque_cursors
        following = _opaque_cursor(end, options, now_ms) if opaque else encode_cursor(end)
    return Page(items[start:end], start, following)


def _opaque_cursor(offset: int, options: Options, now_ms: int) -> str:
    content = json.dumps([offset, now_ms, options.cursor_epoch]).encode()
    return base64.urlsafe_b64encode(_masked(content, options.seed)).rstrip(b"=").decode("ascii")


def _open_cursor(cursor: str, options: Options, now_ms: int) -> int:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        offset, made_ms, epoch = json.loads(_masked(raw, options.seed))
        age = (now_ms - made_ms) / 1000
    except (ValueError, TypeError, RecursionError):
        raise _bad_cursor() from None
    if epoch != options.cursor_epoch or age > (options.cursor_seconds or math.inf):
        raise _bad_cursor()
    return int(offset)


def _masked(content: bytes, seed: int) -> bytes:
    """The content made unreadable, or readable again."""
    mask = hashlib.shake_128(b"cursor/%d" % seed).digest(len(content))
    return bytes(a ^ b for a, b in zip(content, mask, strict=True))


def _bad_cursor() -> Problem:
    return Problem.invalid(("cursor", "is not a cursor of this list"))
