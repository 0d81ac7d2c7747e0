"""How one value reads: durations, addresses, lists of secrets.

Each function takes what stands in the environment or in the file and returns what it means, or
raises `ValueError` with words that follow the setting's name and never repeat a value that could be
secret.
"""

import math
import re
from datetime import timedelta
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from tracker.core.net import is_loopback

_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST: Final = timedelta(days=36500)
_HOST: Final = re.compile(r"[\w.-]+|[0-9a-f:.]+(%\w+)?", re.ASCII)
"""A name, or an IPv6 address without its brackets."""


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
    """Secrets separated by commas or white space, in their order, each once; a list of such too."""
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
    """An address to which paths are added: without a slash at its end.

    `https` everywhere, `http` for a loopback host only, since what goes there is secret.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port == 0 or not _HOST.fullmatch(host) or re.search(r"[^!-~]", url):
        raise ValueError("must be an address such as https://example.org")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ValueError("must begin with https:// (http:// only for a loopback host)")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user name or a password")
    if "?" in url or "#" in url:
        raise ValueError("must end before any ? or #")
    return url.rstrip("/")


def check_database_url(url: str) -> str:
    """A database of a kind that the tracker keeps runs in, with or without the driver's name."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.split("+")[0] not in ("sqlite", "postgresql", "postgres"):
        raise ValueError("must begin with sqlite:///, postgresql:// or postgres://")
    if scheme.startswith("sqlite") and rest.split("?")[0] in ("", "/", "/:memory:"):
        raise ValueError("must name a file, as sqlite:///tracker.db does")
    return url


def passwords_in(url: str) -> frozenset[str]:
    """What in a database URL is secret, as it stands there and decoded."""
    try:
        parts = urlsplit(url)
        raw = [parts.password, *parse_qs(parts.query).get("password", ())]
    except ValueError:
        return frozenset()
    return frozenset(form for text in raw if text for form in (text, unquote(text)))
