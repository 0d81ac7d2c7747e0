"""Inputs given as Python values become the inputs of a start, and rows the plan of a batch."""

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, time
from decimal import Decimal
from enum import EnumType
from math import isfinite, isnan
from numbers import Real
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from tracker.core.errors import FIELDS_NAMED, FieldFault, InvalidRequest
from tracker.core.formatting import counted
from tracker.library.run import ACTOR

if TYPE_CHECKING:
    from tracker.services import Services
    from tracker.starting.rows import BatchPlan

InputValue = str | int | float | Decimal | bool | date | time | None
InputValues = Mapping[str, InputValue | Sequence[InputValue]] | Sequence[Mapping[str, str]]
"""A value (or several) for each input's id, or inputs as the API takes them."""
Rows = Iterable[Mapping[str, InputValue | Sequence[InputValue]]]
"""A value (or several) for each field of each row of a batch."""

S = TypeVar("S")
T = TypeVar("T")

_POSITION: Final = re.compile(r"inputs\.(\d+)\.(id|type|value)")


def given_inputs(inputs: InputValues) -> list[dict[str, Any]]:
    """The inputs as `{"id", "type", "value"}` each; the type is `None` where it is not given.

    Raises `InvalidRequest`, which names each wrong field.
    """
    faults: list[FieldFault] = []
    values: list[dict[str, Any]] = []
    for where, name, kind, value in _flat(inputs):
        text = _text_of(value)
        if not isinstance(name, str) or not isinstance(kind, str | None):
            faults.append(FieldFault(where, "its id and type must be texts"))
        elif text is None:
            given = value if isinstance(value, float | Decimal) else type(value).__name__
            message = f"must be a text, a number, a boolean or a date, not {given}"
            faults.append(FieldFault(where, message))
        else:
            values.append({"id": name, "type": kind, "value": text})
    _raise(faults)
    return values


def _flat(inputs: InputValues) -> Iterator[tuple[str, object, object, object]]:
    """Where it stands, id, type (`None` if not given) and value of each input."""
    if not isinstance(inputs, Mapping):
        try:
            for number, one in enumerate(inputs):
                yield f"inputs.{number}", one.get("id"), one.get("type"), one.get("value")
        except (AttributeError, TypeError):  # a text, or a list of texts
            _raise([FieldFault("inputs", "must be a mapping of input ids to values")])
        return
    for name, value in inputs.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None:
                yield f"inputs.{name}", name, None, item


async def planned(
    services: "Services", technique: str, rows: Iterable[object], **options: Any
) -> "BatchPlan":
    """The plan of these rows; `columns` is the field of an input, by its id.

    Raises `InvalidRequest`, which names rows and fields, and what `Batches.plan` raises.
    """
    from tracker.starting.plan import ColumnMapping
    from tracker.starting.sheet import SheetRefused, sheet_of_objects

    explicit = [ColumnMapping(*one) for one in options.pop("columns").items()]
    objects: list[tuple[int, dict[str, Any]]] = []
    faults: list[FieldFault] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            message = f"must be a mapping, not {type(row).__name__}"
            faults.append(FieldFault(f"rows.{number}", message))
            continue
        cells: dict[str, Any] = {}
        for name, value in cast("Mapping[object, object]", row).items():
            given = cast("list[object]", value) if isinstance(value, list | tuple) else [value]
            cells[str(name)] = texts = [_text_of(one) for one in given if one is not None]
            if None in texts:
                message = "must be a text, a number, a boolean or a date, or a list of them"
                faults.append(FieldFault(f"rows.{number}.{name}", message))
        objects.append((number, cells))
    if not objects and not faults:
        faults.append(FieldFault("rows", "must not be empty"))
    if faults:
        raise _nothing_started(faults)
    # In a thread: many rows would hold up what else the process does.
    sheet = await asyncio.to_thread(sheet_of_objects, objects)
    options["name"] = options["name"] or counted(len(objects), "row")
    try:
        plan, _ = await services.batches.plan(
            technique, sheet, explicit=explicit, source=ACTOR, **options
        )
    except SheetRefused as refused:
        for one in refused.problems:
            where = [str(part) for part in ("rows", one.line, one.column) if part]
            faults.append(FieldFault(".".join(where), one.of_fields))
        raise _nothing_started(faults) from refused
    return plan


def _nothing_started(faults: list[FieldFault]) -> InvalidRequest:
    more = f"; and {len(faults) - FIELDS_NAMED} more" if len(faults) > FIELDS_NAMED else ""
    named = "; ".join(map(str, faults[:FIELDS_NAMED]))
    return InvalidRequest(f"nothing was started: {named}{more}", faults)


def naming_fields(
    error: InvalidRequest, given: InputValues, inputs: Sequence[Mapping[str, Any]]
) -> InvalidRequest:
    """The error with its fields named as in `given`, and in its text."""

    def field_of(fault: FieldFault) -> FieldFault:
        found = _POSITION.fullmatch(fault.field)
        if found is None or not isinstance(given, Mapping) or int(found[1]) >= len(inputs):
            return fault
        return replace(fault, field=f"inputs.{inputs[int(found[1])]['id']}")

    faults = [field_of(fault) for fault in error.fields]
    named = [str(fault) for fault in faults if fault.message not in str(error)]
    return InvalidRequest("; ".join([str(error), *named[:FIELDS_NAMED]]), faults)


def _text_of(value: object) -> str | None:
    """A text, number, boolean, date or time as an input has it; `None` for anything else, as
    `nan`."""
    if isinstance(value, str):
        return value
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, float | Decimal) and not isfinite(value):
        return None
    if isinstance(value, Decimal):
        return str(value)
    return json.dumps(value) if isinstance(value, bool | int | float) else None


def _raise(faults: Sequence[FieldFault]) -> None:
    if faults:
        named = "; ".join(map(str, faults[:FIELDS_NAMED]))
        raise InvalidRequest(f"the inputs are not valid; {named}", faults)


def valid(field: str, check: Callable[[S], T], value: S) -> T:
    """`check(value)`. Raises `InvalidRequest` for its `ValueError`, and for a value of a type that
    it does not take."""
    try:
        return check(value)
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        message = str(error) if isinstance(error, ValueError) else f"cannot be {value!r:.80}"
        if isinstance(check, EnumType):
            message = f"must be one of {', '.join(map(str, check))}"
        raise InvalidRequest(f"{field}: {message}", [FieldFault(field, message)]) from error


def check_seconds(value: object) -> float | None:
    """A number of seconds, or `None`. Raises `ValueError` for anything else."""
    try:
        return None if value is None else check_number(value)
    except ValueError:
        raise ValueError(f"must be a number of seconds or None, not {value!r:.80}") from None


def check_number(value: object) -> float:
    """A number, which may be infinite. Raises `ValueError` for anything else."""
    if not isinstance(value, Real | Decimal) or isnan(value):
        raise ValueError(f"must be a number, not {value!r:.80}")
    return float(value)


def check_texts(**values: object) -> None:
    """Raise `InvalidRequest` for a value that is neither a text nor `None`, by its name."""
    for name, value in values.items():
        if value is not None:
            valid(name, check_text, value)


def check_text(value: object) -> str:
    """A text. Raises `ValueError` for anything else, such as an order's number for a key."""
    if not isinstance(value, str):
        raise ValueError(f"must be a text, not {value!r:.80}")
    return value
