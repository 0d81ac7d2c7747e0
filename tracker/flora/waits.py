"""How long to wait before a request is repeated: what FLORA asks for, else growing waits."""

import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

LONGEST_WAIT: Final = 60.0
"""No wait that FLORA asks for is kept longer than this, in seconds."""
UNTOLD_WAIT: Final = 5.0
"""FLORA's advice for a 429 that names no wait."""
_FIRST_BACKOFF: Final = 0.5
_LONGEST_BACKOFF: Final = 30.0
_NUMBER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


def backoff(attempt: int) -> float:
    """Seconds before the attempt after the `attempt`-th (from 1): doubling to 30, jitter off it."""
    wait = min(_FIRST_BACKOFF * 2.0 ** min(attempt - 1, 10), _LONGEST_BACKOFF)
    return wait * random.uniform(0.5, 1.0)


def asked_wait(headers: Mapping[str, str], *, now: datetime) -> float | None:
    """The seconds that an answer asks to wait, at most `LONGEST_WAIT`; `None` where it does not.

    `retry-after-ms` goes before `retry-after`, which is in seconds or a date. A date is measured
    from the answer's own `date`, so that it does not matter how our clock (`now`, UTC) is set.
    """
    milliseconds = headers.get("retry-after-ms", "")
    if _NUMBER.fullmatch(milliseconds):
        return min(float(milliseconds) / 1000, LONGEST_WAIT)
    asked = headers.get("retry-after", "")
    if _NUMBER.fullmatch(asked):
        return min(float(asked), LONGEST_WAIT)
    when = http_date(asked)
    if when is None:
        return None
    seconds = (when - (http_date(headers.get("date", "")) or now)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT)


def http_date(text: str) -> datetime | None:
    """The moment that an HTTP date names, aware, in UTC; `None` for what is not one."""
    try:
        parsed = parsedate_to_datetime(text)
        return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
