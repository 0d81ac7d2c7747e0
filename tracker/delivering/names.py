"""File names from other people's identifiers: they stay in their folder, and no two become one.

A name is made of parts, joined by dots. A part keeps what is harmless; where anything had to be
replaced or cut off, a piece of the original's digest is added, so that it stays its own.
"""

import re
from hashlib import blake2b
from typing import Final

LONGEST_PART: Final = 60
"""Characters; with four parts, an ending and `.part.json` a name stays below 255 bytes."""
_HARMLESS: Final = re.compile(r"[A-Za-z0-9_-]+")
_OTHER: Final = re.compile(r"[^A-Za-z0-9_-]+")


def part(text: str) -> str:
    """`text` as one part of a name: never empty, without dots, slashes, or a leading dash."""
    if len(text) <= LONGEST_PART and _HARMLESS.fullmatch(text) and not text.startswith("-"):
        return text
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    kept = _OTHER.sub("_", text).strip("_-")[: LONGEST_PART - len(digest) - 1]
    return f"{kept}-{digest}" if kept else digest


def stem(*texts: str) -> str:
    """The name of a file without its ending, from what tells it apart."""
    return ".".join(map(part, texts))
