"""How an HTTP body may be packed: once, and by a way whose growth has a bound.

A body that is packed twice, or by a newer way, can stand for gigabytes in a few kilobytes, and is
unpacked before anybody can count it. One layer of these grows a thousandfold at most, and what is
read of a connection at a time is small.
"""

from typing import Final

_BOUNDED: Final = frozenset({"", "identity", "gzip", "deflate"})


def is_bounded(content_encoding: str | None) -> bool:
    """Whether a body with this `Content-Encoding` (`None` for none) may be unpacked."""
    return (content_encoding or "").strip().lower() in _BOUNDED
