"""`tracker doctor`: checks a deployment from end to end, and says what to fix.

It does not use `tracker.services`: what is broken must not hide the rest. Nothing is changed except
for the doctor's own test deliveries, which are deleted again.

    examination.py   all checks together, in bounded time
    settings.py      settings, signing secrets, tokens, API keys and clocks
    database.py      the database, its schema, its disk
    webhooks.py      test deliveries to the public URL, test events to the endpoints
    delivery.py      one test delivery, and what its answer means
    work.py          worker, sweeps, and what waits for a person
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Name = Literal[
    "settings",
    "secrets",
    "tolerance",
    "token",
    "database",
    "database TLS",
    "migrations",
    "notifications",
    "disk",
    "key",
    "clock",
    "machine clock",
    "public url",
    "certificate",
    "callbacks",
    "own addresses",
    "answer time",
    "body limit",
    "test deliveries",
    "endpoints",
    "connection",
    "worker",
    "sweeps",
    "missed callbacks",
    "inbox",
    "quarantine",
    "starts",
    "conflicts",
    "bills",
    "messages",
]
"""The lines of a report, in their order; docs/doctor.md has a section for each."""


class Level(StrEnum):
    """`WARNING` can wait, or could not be decided; `FAILED` loses something, or soon will."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's report: what was `seen`, and what to do (empty if nothing).

    `workspace` is set if several are configured. No text holds a secret.
    """

    name: Name
    level: Level
    seen: str
    advice: str = ""
    workspace: str | None = None


def ok(name: Name, seen: str) -> Finding:
    """Nothing to do."""
    return Finding(name=name, level=Level.OK, seen=seen)


def warning(name: Name, seen: str, advice: str) -> Finding:
    """Someone should look at it when there is time."""
    return Finding(name=name, level=Level.WARNING, seen=seen, advice=advice)


def failed(name: Name, seen: str, advice: str) -> Finding:
    """It does not work, or soon will not."""
    return Finding(name=name, level=Level.FAILED, seen=seen, advice=advice)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them."""
    levels = {finding.level for finding in findings}
    return next((one for one in (Level.FAILED, Level.WARNING) if one in levels), Level.OK)
