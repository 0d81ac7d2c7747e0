"""Tags (`key=value` pairs that say what a run is for), and budgets, which may cover a tag.

A tag's key is 1 to 64 of `A-Z a-z 0-9 . _ -`, its value 1 to 255 printable characters. A budget is
the most USD that may be spent per UTC period on the runs that it covers. A run counts in the period
of its start; a run started elsewhere in that of its `created_at`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
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


class Period(StrEnum):
    """After which period a budget starts again."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"
    """Never."""

    def bounds(self, now: datetime) -> tuple[datetime | None, datetime | None]:
        """Start of the period that holds `now` (UTC), and start of the next one."""
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        match self:
            case Period.DAY:
                return day, day + timedelta(days=1)
            case Period.MONTH:
                first = day.replace(day=1)
                return first, (first + timedelta(days=32)).replace(day=1)
        return None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At most `usd` per `period` for the runs of a workspace, technique and tag; `None` matches
    all."""

    usd: Decimal
    period: Period
    workspace_id: str | None = None
    technique_id: str | None = None
    tag: tuple[str, str] | None = None

    @property
    def scope(self) -> dict[str, str]:
        """What it covers, by setting name; empty for everything."""
        tag = self.tag and "=".join(self.tag)
        values = {"workspace_id": self.workspace_id, "technique_id": self.technique_id, "tag": tag}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def name(self) -> str:
        """Its name in messages, metrics and answers, such as `day:tag=team=red`."""
        covers = ",".join(f"{name}={value}" for name, value in self.scope.items())
        return f"{self.period}:{covers}" if covers else self.period.value

    def covers(self, workspace_id: str, technique_id: str, tags: Mapping[str, str]) -> bool:
        return (
            self.workspace_id in (None, workspace_id)
            and self.technique_id in (None, technique_id)
            and (self.tag is None or tags.get(self.tag[0]) == self.tag[1])
        )


@dataclass(frozen=True, slots=True)
class Budgets:
    """All configured budgets: one per workspace, and `[[budgets]]`."""

    of_each_workspace: tuple[Budget, ...] = ()
    others: tuple[Budget, ...] = ()

    def covering(self, workspace_id: str, technique_id: str, tags: Tags) -> list[Budget]:
        return [
            one
            for one in self.known([workspace_id])
            if one.covers(workspace_id, technique_id, tags)
        ]

    def known(self, workspace_ids: Iterable[str]) -> list[Budget]:
        each = [
            replace(one, workspace_id=workspace_id)
            for workspace_id in workspace_ids
            for one in self.of_each_workspace
        ]
        return [*each, *self.others]
