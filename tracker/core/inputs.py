"""Whether a technique can be started with these inputs: its definition, read as a rule.

Every start costs money, so what FLORA would refuse, or would fail at once, is found before. `check`
is a pure function of the definition and the inputs; it names every fault, not only the first one.

It refuses nothing that FLORA may take. What a definition leaves unsaid is not checked: one that
names no inputs allows any, an input of a type that nobody has heard of takes any value.

Which inputs are needed? FLORA's newest definitions mark what may be left out with `optional`; the
reference knows no such mark, and the description may say it in words. An input that neither way
says that it may be left out is needed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from tracker.core.errors import FieldFault, InvalidRequest
from tracker.core.net import is_loopback

STARTABLE: Final = ("text", "imageUrl", "videoUrl")
"""The types that FLORA's starts take."""
NOT_STARTABLE: Final = ("audioUrl", "documentUrl")
"""The types that definitions have and starts lack."""

_TAKEN: Final = f"FLORA's starts take only {', '.join(STARTABLE[:-1])} and {STARTABLE[-1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input or output of a technique. `type` is empty where the definition does not say it.

    `several` allows more than one value, `element` takes the id of a FLORA element in place of a
    link. `aspect_ratio` and `duration` (seconds) are what FLORA asks the media to have; whether
    they do is not looked at.
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
        """What the media have to be like, in words: `16:9, 5 s`; empty where nothing is asked."""
        length = None if self.duration is None else f"{self.duration:g} s"
        return ", ".join(part for part in (self.aspect_ratio, length) if part)

    @property
    def startable(self) -> bool:
        """Whether a start can bring it."""
        return self.type not in NOT_STARTABLE


def check(ports: Sequence[Port], inputs: Sequence[Mapping[str, Any]]) -> list[FieldFault]:
    """Every fault of `inputs` (`{"id", "type", "value"}` each), by the inputs of a definition.

    A fault of one input is named as the API names it (`inputs.0.value`), one that is missing by its
    id (`inputs.face`). No value is repeated in a message.
    """
    if not ports:
        return []
    known = {port.id: port for port in ports}
    faults: list[FieldFault] = []
    given: set[str] = set()
    sent = 0
    for position, one in enumerate(inputs):
        at = f"inputs.{position}"
        input_id = one.get("id")
        port = known.get(input_id) if isinstance(input_id, str) else None
        if port is None:
            faults.append(FieldFault(f"{at}.id", _unknown(input_id, known)))
            continue
        if port.id in given and not port.several:
            faults.append(FieldFault(f"{at}.id", f"{port.id} takes one value only"))
        if port.optional and is_left_out(one):
            continue
        sent += 1
        given.add(port.id)
        faults += _wrong(at, one, port)
    faults += [_missing(port) for port in known.values() if _needed(port, given)]
    if not sent and not faults:
        faults.append(FieldFault("inputs", "at least one input is needed"))
    return faults


def is_left_out(one: Mapping[str, Any]) -> bool:
    """Whether an input is a text that says nothing.

    FLORA refuses an empty text (flora-api.md, 8): an optional one is left out of the start.
    """
    return one.get("type") == "text" and one.get("value") == ""


def obstacle(ports: Iterable[Port]) -> str | None:
    """Why a technique with these inputs cannot be started at all; `None` where it can."""
    needed = [port for port in ports if not port.optional and not port.startable]
    if not needed:
        return None
    return f"it needs {' and '.join(f'{port.id} ({port.type})' for port in needed)}, but {_TAKEN}"


def typed(
    ports: Sequence[Port], given: Iterable[tuple[str, str | None, str]]
) -> list[dict[str, Any]]:
    """Inputs as a start takes them, of (id, type or `None`, value) each.

    A type that was not given is the definition's; an id that it does not have gets none, and is
    `check`'s to report. Raises `InvalidRequest` where a type is missing and the definition names no
    inputs.
    """
    types = {port.id: port.type for port in ports}
    given = list(given)
    if not ports and (untyped := [n for n, (_, type_, _) in enumerate(given) if type_ is None]):
        message = "the technique's definition names no inputs, so the type has to be given"
        raise InvalidRequest(message, [FieldFault(f"inputs.{n}.type", message) for n in untyped])
    return [
        {"id": input_id, "type": type_ or types.get(input_id, ""), "value": value}
        for input_id, type_, value in given
    ]


def _needed(port: Port, given: set[str]) -> bool:
    return not port.optional and port.id not in given


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
    """What is wrong with one input whose id is known."""
    type_, value = one.get("type"), one.get("value")
    if not port.startable:
        return [FieldFault(f"{at}.type", f"{port.id} is {port.type}: {_TAKEN}")]
    faults: list[FieldFault] = []
    if type_ not in STARTABLE:
        faults.append(FieldFault(f"{at}.type", f"must be one of {', '.join(STARTABLE)}"))
    elif port.type in STARTABLE and type_ != port.type:
        faults.append(FieldFault(f"{at}.type", f"{port.id} takes {port.type}, not {type_}"))
    if not isinstance(value, str) or not value:
        faults.append(FieldFault(f"{at}.value", "must be a text that is not empty"))
    elif _takes_link(port, type_) and not (port.element and "://" not in value):
        reason = _unfit_link(value)
        if reason is not None:
            faults.append(FieldFault(f"{at}.value", f"{port.id} {reason}"))
    return faults


def _takes_link(port: Port, type_: object) -> bool:
    """Whether the value is a link, by the definition or, where that does not say, by its type."""
    decides = port.type if port.type in STARTABLE else type_
    return decides in ("imageUrl", "videoUrl")


def _unfit_link(value: str) -> str | None:
    """What is wrong with a link that FLORA is to read; `None` for nothing."""
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
