"""What a look brings: a name, how bad it is, what was seen, and what to do."""

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
    "worker",
    "sweeps",
    "missed callbacks",
    "inbox",
    "quarantine",
    "starts",
    "conflicts",
    "bills",
]
"""The lines of a report, in their order; docs/doctor.md has a section for each."""


class Level(StrEnum):
    """How bad it is.

    A warning can wait, or could not be decided; what failed loses something, or will.
    """

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's report. `advice` is empty where there is nothing to do.

    `workspace` names whose it is, where several are configured. No text holds a secret.
    """

    name: Name
    level: Level
    seen: str
    advice: str = ""
    workspace: str | None = None


def ok(name: Name, seen: str, *, workspace: str | None = None) -> Finding:
    """It is as it should be."""
    return Finding(name=name, level=Level.OK, seen=seen, workspace=workspace)


def warning(name: Name, seen: str, advice: str, *, workspace: str | None = None) -> Finding:
    """Somebody should look at it when there is time."""
    return Finding(name=name, level=Level.WARNING, seen=seen, advice=advice, workspace=workspace)


def failed(name: Name, seen: str, advice: str, *, workspace: str | None = None) -> Finding:
    """It does not work, or will soon not."""
    return Finding(name=name, level=Level.FAILED, seen=seen, advice=advice, workspace=workspace)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them."""
    levels = {finding.level for finding in findings}
    return next((one for one in (Level.FAILED, Level.WARNING) if one in levels), Level.OK)
