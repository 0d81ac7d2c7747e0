"""Parsers of single values: durations, URLs, cron expressions, lists of secrets.

Each takes the value from the environment or the file, or raises `ValueError` with a message that
follows the setting's name and never repeats a value that could be secret.
"""

import math
import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice, pairwise, takewhile
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from cronsim import CronSim, CronSimError

from tracker.core.net import is_loopback

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST: Final = timedelta(days=36500)
_HOST: Final = re.compile(r"[\w.-]+|[0-9a-f:.]+(%\w+)?", re.ASCII)
"""A name, or an IPv6 address without its brackets."""
_CRON_TIMES: Final = 1500
"""How many times of a cron expression its longest wait is taken from: a week, unless it is every
few minutes."""
_CRON_AHEAD: Final = timedelta(days=40 * 365)


def parse_duration(value: object) -> timedelta:
    """A duration: seconds as a number, or `30s`, `90m`, `24h`, `7d`."""
    match value:
        case timedelta():
            return value
        case str():
            found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", value.strip().lower(), re.ASCII)
            seconds = float(found[1]) * _UNITS[found[2]] if found else math.nan
        case int() | float() if not isinstance(value, bool):
            seconds = float(min(value, 1e12))
        case _:
            seconds = math.nan
    if math.isnan(seconds):
        raise ValueError("must be a duration such as 30s, 90m, 24h or 7d, or a number of seconds")
    if not 0 <= seconds <= _LONGEST.total_seconds():
        raise ValueError("must be a duration between 0 and a hundred years")
    return timedelta(seconds=seconds)


def split_secrets(value: object) -> tuple[str, ...]:
    """Secrets separated by commas or white space, or a list of such, each once."""
    if value is None:
        return ()
    parts = value if isinstance(value, list | tuple) else [value]
    found: list[str] = []
    for part in parts:
        if hasattr(part, "get_secret_value"):
            part = part.get_secret_value()
        if not isinstance(part, str):
            raise ValueError("must be text: secrets separated by commas or spaces")
        found += [secret for secret in re.split(r"[\s,]+", part) if secret]
        if part and not found:
            raise ValueError("holds nothing but commas and spaces")
    return tuple(dict.fromkeys(found))


def check_root_url(url: str) -> str:
    """A URL to which paths are added, without a slash at its end.

    `http` is for loopback hosts only, since secrets are sent there.
    """
    scheme, host = _scheme_and_host(url, "https://example.org")
    if scheme != "https" and not (scheme == "http" and is_loopback(host)):
        raise ValueError("must begin with https:// (http:// only for a loopback host)")
    if "?" in url or "#" in url:
        raise ValueError("must end before any ? or #")
    return url.rstrip("/")


def _scheme_and_host(url: str, example: str) -> tuple[str, str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port == 0 or not _HOST.fullmatch(host) or re.search(r"[^!-~]", url):
        raise ValueError(f"must be an address such as {example}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user name or a password")
    return parts.scheme, host


def check_endpoint_url(url: str) -> str:
    """The URL of an endpoint, with any path and query."""
    scheme, _ = _scheme_and_host(url, "https://example.org/hook")
    if scheme not in ("https", "http"):
        raise ValueError("must begin with https:// or http://")
    if "#" in url:
        raise ValueError("must not hold a fragment (#)")
    return url


def check_database_url(url: str) -> str:
    """The URL of a SQLite or PostgreSQL database, with or without the driver's name."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.split("+")[0] not in ("sqlite", "postgresql", "postgres"):
        raise ValueError("must begin with sqlite:///, postgresql:// or postgres://")
    if scheme.startswith("sqlite") and rest.split("?")[0] in ("", "/", "/:memory:"):
        raise ValueError("must name a file, as sqlite:///tracker.db does")
    return url


def passwords_in(url: str) -> frozenset[str]:
    """The passwords in a database URL, as they are written there and decoded."""
    try:
        parts = urlsplit(url)
        raw = [parts.password, *parse_qs(parts.query).get("password", ())]
    except ValueError:
        return frozenset()
    return frozenset(form for text in raw if text for form in (text, unquote(text)))


def check_cron(expression: str) -> str:
    """A cron expression of five fields, in lower case; 0 and 7 are Sunday."""
    fields = expression.lower().split()
    if len(fields) != 5:
        raise ValueError(
            "must have five fields (minute, hour, day of month, month, day of week), "
            f"as */5 * * * * has; this has {len(fields)}"
        )
    try:
        next(CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        field = str(error).removeprefix("Bad ").replace("-", " ")
        raise ValueError(
            f"has a {field} that cron does not read: numbers, names, ranges, lists and steps"
        ) from error
    except StopIteration as error:
        raise ValueError("never matches a date") from error
    return " ".join(fields)


def longest_wait(expression: str, after: datetime) -> float:
    """The longest time between two of the next times of a cron expression, in seconds."""
    midnight = after.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return _longest_wait(expression, midnight)


@lru_cache(16)  # it takes tens of milliseconds
def _longest_wait(expression: str, after: datetime) -> float:
    end = after + _CRON_AHEAD
    times = takewhile(lambda time: time < end, CronSim(expression, after))
    waits = (later - time for time, later in pairwise(islice(times, _CRON_TIMES)))
    return max((wait.total_seconds() for wait in waits), default=0.0)
