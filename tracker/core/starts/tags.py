"""Tags: `key=value` pairs that say what a run is for.

A key is 1 to 64 of `A-Z a-z 0-9 . _ -`, a value 1 to 255 printable characters.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

MOST_TAGS: Final = 16
"""Most tags of one run: each has daily rollups of its own."""
LONGEST_TAG: Final = 255
_KEY: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

Tags = dict[str, str]


def check_tag_key(key: str) -> str:
    """`key` if it is a valid tag key; raises `ValueError`."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"tag {key[:80]!r}: a key is 1 to 64 of A-Z a-z 0-9 . _ -")
    return key


def check_tags(tags: Mapping[Any, Any]) -> Tags:
    """The tags sorted by key; raises `ValueError`, which names the tag and the fault."""
    for key, value in tags.items():
        check_tag_key(str(key))
        if not isinstance(value, str) or not 1 <= len(value) <= LONGEST_TAG:
            raise ValueError(f"tag {key!r}: a value is a text of 1 to {LONGEST_TAG} characters")
        if not value.isprintable():
            raise ValueError(f"tag {key!r}: a value has printable characters only")
    if len(tags) > MOST_TAGS:
        raise ValueError(f"a run has at most {MOST_TAGS} tags, and these are {len(tags)}")
    return dict(sorted(tags.items()))


def parse_tag(text: str) -> tuple[str, str]:
    """The key and the value of `KEY=VALUE`; raises `ValueError`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text[:80]!r} is not KEY=VALUE")
    ((key, value),) = check_tags({key.strip(): value.strip()}).items()
    return key, value


def parse_tags(texts: Iterable[str]) -> Tags:
    """Like `parse_tag` for several; raises `ValueError` also if a key appears twice."""
    pairs = [parse_tag(text) for text in texts]
    tags = dict(pairs)
    if len(tags) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"tag {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return check_tags(tags)
