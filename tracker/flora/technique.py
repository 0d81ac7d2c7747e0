"""The definitions of techniques in FLORA's catalogue, parsed as tolerantly as by `parse`."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from math import prod
from typing import Any, Final

from tracker.core.errors import FloraUnreadable
from tracker.core.inputs import Port, Technique, is_empty_text
from tracker.flora.parse import (
    as_dollars,
    as_id,
    as_number,
    as_object,
    as_objects,
    as_text,
    depth_within,
)

DEEPEST: Final = 32
"""How deeply an unknown field may be nested to be kept."""
_SAYS_OPTIONAL: Final = re.compile(
    r"(?<!not )(?<!non-)\b(optional(ly)?\b|(leave|left) (\w+ )?(out|empty|blank)\b)"
    r"|\bnot (required|needed|mandatory)\b",
    re.IGNORECASE,
)


def technique(payload: object) -> Technique:
    """Parse a technique. Raises `FloraUnreadable` without an id."""
    fields = as_object(payload)
    technique_id = as_id(fields.get("technique_id"))
    if technique_id is None:
        raise FloraUnreadable("the technique has no technique_id")
    return Technique(
        technique_id=technique_id,
        name=as_text(fields.get("name")) or technique_id,
        description=as_text(fields.get("description")),
        run_cost=as_dollars(fields.get("run_cost")),
        inputs=_kept(fields.get("inputs")),
        outputs=_kept(fields.get("outputs")),
    )


def _kept(value: object) -> tuple[dict[str, Any], ...]:
    """The objects of a list, without values that are nested too deeply for a database."""
    return tuple(
        {name: inner for name, inner in fields.items() if depth_within(inner, DEEPEST)}
        for fields in as_objects(value)
    )


def ports(objects: Iterable[dict[str, Any]]) -> tuple[Port, ...]:
    """A definition's inputs or outputs; none if one of them has no id.

    A definition that is only partly understood would refuse what FLORA accepts.
    """
    read = [_port(fields) for fields in objects]
    known = tuple(port for port in read if port is not None)
    return known if len(known) == len(read) else ()


def runs_of(technique: Technique, inputs: Iterable[Mapping[str, Any]]) -> int:
    """The number of runs of a start with these inputs: one for each value of an input that accepts
    several, without empty texts, which are not sent."""
    values = Counter(one["id"] for one in inputs if not is_empty_text(one))
    return prod(max(values[port.id], 1) for port in ports(technique.inputs) if port.several)


def cost_of(technique: Technique, inputs: Iterable[Mapping[str, Any]]) -> Decimal | None:
    """The price of such a start, in USD; `None` if FLORA names none."""
    return None if technique.run_cost is None else technique.run_cost * runs_of(technique, inputs)


def _port(fields: dict[str, Any]) -> Port | None:
    port_id = as_id(fields.get("id"))
    if port_id is None:
        return None
    description = as_text(fields.get("description")) or ""
    return Port(
        id=port_id,
        type=as_id(fields.get("type")) or "",
        name=as_text(fields.get("name")) or "",
        description=description,
        optional=_may_be_left_out(fields, description),
        several=fields.get("allow_multiple") is True,
        element=fields.get("accepts_element") is True,
        aspect_ratio=as_text(fields.get("specified_aspect_ratio")),
        duration=as_number(fields.get("specified_duration")) or None,  # 0 is no length at all
    )


def _may_be_left_out(fields: dict[str, Any], description: str) -> bool:
    """Whether an input is marked as optional or, without a mark, described as such."""
    if isinstance(fields.get("optional"), bool):
        return fields["optional"] is True
    if isinstance(fields.get("required"), bool):
        return fields["required"] is False
    return _SAYS_OPTIONAL.search(description) is not None
