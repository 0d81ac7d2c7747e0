"""What a start is made of: inputs, keys of rows, tags, and the budgets that it counts in."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from tracker.core.errors import FieldFault, InvalidRequest
from tracker.core.net import is_loopback
from tracker.core.run import Output

# Inputs, which are validated against the definition of a technique before a start is paid for.
#
# `check` is a pure function of the definition and the inputs; it reports every fault. It accepts
# whatever FLORA may accept: a definition without inputs allows any, an unknown type takes any
# value. An input is required unless the definition marks it `optional` (FLORA's newest definitions
# do) or its description says so.

STARTABLE: Final = ("text", "imageUrl", "videoUrl")
"""The input types that a start accepts."""
NOT_STARTABLE: Final = ("audioUrl", "documentUrl")
"""Input types of definitions that a start does not accept."""

_TAKEN: Final = f"FLORA's starts take only {', '.join(STARTABLE[:-1])} and {STARTABLE[-1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input or output of a technique; `type` is empty if the definition does not say it.

    `several` allows more than one value; `element` accepts the id of a FLORA element instead of a
    link. `aspect_ratio` and `duration` (seconds) are what the media should have; they are not
    checked.
    """

    id: str
    type: str = ""
    name: str = ""
    description: str = ""
    optional: bool = False
    several: bool = False
    element: bool = False
    aspect_ratio: str | None = None
    duration: float | None = None

    @property
    def hint(self) -> str:
        """What the media should be like, such as `16:9, 5 s`; empty for anything."""
        length = None if self.duration is None else f"{self.duration:g} s"
        return ", ".join(part for part in (self.aspect_ratio, length) if part)

    @property
    def startable(self) -> bool:
        """Whether a start accepts this type."""
        return self.type not in NOT_STARTABLE


def fits(defined: Sequence[Port], outputs: Sequence[Output]) -> bool:
    """Whether a run has the outputs that its technique defines, so that they bear its names."""
    return len(defined) == len(outputs) and all(
        port.type in ("", output.type) for port, output in zip(defined, outputs, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueDefinition:
    """A technique of FLORA's catalogue. `run_cost` is USD for each run.

    `inputs` and `outputs` are FLORA's own objects, including unknown fields.
    """

    technique_id: str
    name: str
    description: str | None = None
    run_cost: Decimal | None = None
    inputs: tuple[dict[str, Any], ...] = ()
    outputs: tuple[dict[str, Any], ...] = ()


def check(ports: Sequence[Port], inputs: Sequence[Mapping[str, Any]]) -> list[FieldFault]:
    """All faults of `inputs` (`{"id", "type", "value"}` each) against a definition's inputs.

    A fault is named as in the API (`inputs.0.value`), a missing input by its id (`inputs.face`).
    Messages repeat no value.
    """
    if not ports:
        return []
    known = {port.id: port for port in ports}
    faults: list[FieldFault] = []
    values: set[str] = set()
    sent = 0
    for position, one in enumerate(inputs):
        at = f"inputs.{position}"
        input_id = one.get("id")
        port = known.get(input_id) if isinstance(input_id, str) else None
        if port is None:
            faults.append(FieldFault(f"{at}.id", _unknown(input_id, known)))
            continue
        if port.id in values and not port.several:
            faults.append(FieldFault(f"{at}.id", f"{port.id} takes one value only"))
        if port.optional and is_empty_text(one):
            continue
        sent += 1
        values.add(port.id)
        faults += _wrong(at, one, port)
    faults += [_missing(p) for p in known.values() if not p.optional and p.id not in values]
    if not sent and not faults:
        faults.append(FieldFault("inputs", "at least one input is needed"))
    return faults


def is_empty_text(one: Mapping[str, Any]) -> bool:
    """Whether an input is an empty text.

    FLORA refuses empty texts (flora-api.md, 8): an optional one is left out of the start.
    """
    return one.get("type") == "text" and one.get("value") == ""


def obstacle(ports: Iterable[Port]) -> str | None:
    """Why a technique with these inputs cannot be started at all; `None` if it can."""
    needed = [port for port in ports if not port.optional and not port.startable]
    if not needed:
        return None
    return f"it needs {' and '.join(f'{port.id} ({port.type})' for port in needed)}, but {_TAKEN}"


def typed(ports: Sequence[Port], inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`inputs` with the types of the definition where they have none.

    An unknown id gets an empty type, and `check` reports it. Raises `InvalidRequest` if a type is
    missing and the definition names no inputs.
    """
    untyped = [number for number, one in enumerate(inputs) if not one.get("type")]
    if untyped and not ports:
        message = "the technique's definition names no inputs, so the type has to be given"
        raise InvalidRequest(message, [FieldFault(f"inputs.{n}.type", message) for n in untyped])
    types = {port.id: port.type for port in ports}
    return [{**one, "type": one.get("type") or types.get(one["id"], "")} for one in inputs]


def _missing(port: Port) -> FieldFault:
    if not port.startable:
        return FieldFault(f"inputs.{port.id}", f"is required, and is {port.type}: {_TAKEN}")
    about = ", ".join(part for part in (port.type, port.hint) if part)
    return FieldFault(f"inputs.{port.id}", f"is required ({about})" if about else "is required")


def _unknown(input_id: object, known: Mapping[str, Port]) -> str:
    if not isinstance(input_id, str):
        return "must be a text"
    return f"the technique has no input {input_id!r} (it has {', '.join(known)})"


def _wrong(at: str, one: Mapping[str, Any], port: Port) -> list[FieldFault]:
    type_, value = one.get("type"), one.get("value")
    if not port.startable:
        return [FieldFault(f"{at}.type", f"{port.id} is {port.type}: {_TAKEN}")]
    faults: list[FieldFault] = []
    if type_ not in STARTABLE:
        faults.append(FieldFault(f"{at}.type", f"must be one of {', '.join(STARTABLE)}"))
    elif port.type in STARTABLE and type_ != port.type:
        faults.append(FieldFault(f"{at}.type", f"{port.id} takes {port.type}, not {type_}"))
    if not isinstance(value, str) or not value:
        faults.append(FieldFault(f"{at}.value", "must not be empty"))
    elif (port.type if port.type in STARTABLE else type_) in ("imageUrl", "videoUrl"):
        is_element = port.element and "://" not in value
        if not is_element and (reason := _link_fault(value)):
            faults.append(FieldFault(f"{at}.value", f"{port.id} {reason}"))
    return faults


def _link_fault(value: str) -> str | None:
    """The fault of a link that FLORA is to read, if any."""
    try:
        parts = urlsplit(value)
        scheme, host = parts.scheme, parts.hostname
        _ = parts.port  # raises where it is no port
    except ValueError:
        return "must be an https link"
    if scheme not in ("http", "https") or not host:
        return "must be an https link"
    if scheme == "http" and not is_loopback(host):
        return "must be an https link (http is for this machine alone)"
    return None


# Idempotency keys of the rows of a sheet, so that each row is started once.
#
# A row is identified by its technique, its inputs and the number of equal rows before it. Its key
# stays the same when other rows are added, removed or sorted, and in another file.

Input = dict[str, str]
"""One input as FLORA takes it: `id`, `type` and `value`."""

T = TypeVar("T", bound=Mapping[str, Any])

_HEX_DIGITS: Final = 24
"""Enough to rule out accidental collisions; inputs are compared before anything is sent."""

_ROW: Final = re.compile(r"row-([0-9a-f]{24})(?:-again(\d{1,9}))?(?:-retry(\d{1,9}))?", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class RunNumber:
    """Which run of a row: `generation` counts deliberate reruns, `attempt` the retries after
    failures within one generation."""

    generation: int = 0
    attempt: int = 0

    def again(self) -> "RunNumber":
        """The first of the next generation."""
        return RunNumber(self.generation + 1)

    def retried(self) -> "RunNumber":
        return replace(self, attempt=self.attempt + 1)

    def before(self) -> "RunNumber":
        return replace(self, attempt=self.attempt - 1)


def canonical(inputs: Iterable[T]) -> list[T]:
    """The inputs sorted by id; several values of one input keep their order."""
    return sorted(inputs, key=lambda one: one["id"])


def same_values(one: Iterable[Mapping[str, Any]], other: Iterable[Mapping[str, Any]]) -> bool:
    """Whether both are the same ids with the same values, as `canonical` orders them."""
    return _values(one) == _values(other)


def same_types(stored: Iterable[Mapping[str, Any]], given: Iterable[Mapping[str, Any]]) -> bool:
    """Whether inputs of the same values have the stored types, or none."""
    pairs = zip(canonical(stored), canonical(given), strict=True)
    return all(its.get("type") in (None, "", kept.get("type")) for kept, its in pairs)


def _values(inputs: Iterable[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(one["id"], one.get("value")) for one in canonical(inputs)]


def row_digests(technique_id: str, rows: Iterable[Sequence[Input]]) -> list[str]:
    """One digest per row, in order; `technique_id` is the `tech_…` form."""
    seen: Counter[str] = Counter()
    digests = []
    for inputs in rows:
        asked = digest_of([technique_id, canonical(inputs)])
        digests.append(digest_of([asked, seen[asked]])[:_HEX_DIGITS])
        seen[asked] += 1
    return digests


def row_key(digest: str, run_number: RunNumber) -> str:
    """The idempotency key of that run of a row."""
    key = f"row-{digest}"
    if run_number.generation:
        key += f"-again{run_number.generation}"
    if run_number.attempt:
        key += f"-retry{run_number.attempt}"
    return key


def key_parts(key: str) -> tuple[str, RunNumber] | None:
    """The digest and run number that `row_key` made the key of; `None` for any other key."""
    found = _ROW.fullmatch(key)
    return found and (found[1], RunNumber(int(found[2] or 0), int(found[3] or 0)))


def batch_id(
    workspace_id: str, technique_id: str, rows: Iterable[tuple[int, str, RunNumber]]
) -> str:
    """The id of a batch: the same for the same positions and digests of rows.

    A rerun is a batch of its own, a retry of some rows is not.
    """
    named = [(position, digest, run_number.generation) for position, digest, run_number in rows]
    return f"bat_{digest_of([workspace_id, technique_id, named])[:16]}"


def digest_of(value: Any) -> str:
    """A digest of a JSON value, in hex: equal for equal values, whatever the order of fields."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# Tags: `key=value` pairs that say what a run is for.
#
# A key is 1 to 64 of `A-Z a-z 0-9 . _ -`, a value 1 to 255 printable characters.

MOST_TAGS: Final = 16
"""Most tags of one run: each has daily rollups of its own."""
LONGEST_TAG: Final = 255
_TAG_KEY: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

Tags = dict[str, str]


def check_tag_key(key: str) -> str:
    """`key` if it is a valid tag key; raises `ValueError`."""
    if not _TAG_KEY.fullmatch(key):
        raise ValueError(f"tag {key[:80]!r}: a key is 1 to 64 of A-Z a-z 0-9 . _ -")
    return key


def check_tags(tags: Mapping[Any, Any]) -> Tags:
    """The tags sorted by key; raises `ValueError`, which names the tag and the fault."""
    if not isinstance(tags, Mapping):
        raise ValueError("must be a mapping of keys to values")
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


# Budgets: the most USD that may be spent per UTC period on the runs that a budget covers.
#
# A run counts in the period of its start; a run started elsewhere in that of its `created_at`.


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
