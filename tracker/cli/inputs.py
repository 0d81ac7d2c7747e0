"""`--input ID=VALUE` and `--input ID:TYPE=VALUE`: what a run is started with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import typer

from tracker.core.errors import FieldFault, InvalidRequest

if TYPE_CHECKING:
    from tracker.wiring import Services

_STARTABLE: Final = ("text", "imageUrl", "videoUrl")
"""The types that a start knows. A link to anything else (a sound, a document) goes as text."""


@dataclass(frozen=True, slots=True)
class Given:
    """One input as it was given; `type` is `None` where the technique has to say it."""

    id: str
    type: str | None
    value: str


def parse(texts: Iterable[str]) -> list[Given]:
    """Each `ID=VALUE` or `ID:TYPE=VALUE`. A value may hold anything, `=` too."""
    given = []
    for text in texts:
        name, equals, value = text.partition("=")
        input_id, colon, input_type = name.partition(":")
        if not equals or not input_id or (colon and not input_type):
            raise typer.BadParameter(
                f"{text!r} is not ID=VALUE or ID:TYPE=VALUE", param_hint="--input"
            )
        given.append(Given(input_id, input_type or None, value))
    return given


async def typed(
    services: "Services", technique: str, workspace_id: str | None, given: Sequence[Given]
) -> list[dict[str, Any]]:
    """The inputs as a start takes them, types filled in from the technique's definition.

    FLORA is asked only where a type is missing. Raises `InvalidRequest` for an input that the
    technique does not have, and whatever asking FLORA raises.
    """
    types: dict[str, str] = {}
    if any(one.type is None for one in given):
        workspace = services.workspaces.pick(workspace_id)
        definition = await services.catalogue.definition(workspace, technique)
        types = {str(port.get("id")): str(port.get("type")) for port in definition.inputs}
    return [
        {"id": one.id, "type": one.type or _type_of(one.id, types, technique), "value": one.value}
        for one in given
    ]


def _type_of(input_id: str, types: dict[str, str], technique: str) -> str:
    if input_id not in types:
        message = f"{technique} has no input {input_id!r}; it has {', '.join(types) or 'none'}"
        raise InvalidRequest(message, [FieldFault(f"inputs.{input_id}", message)])
    return types[input_id] if types[input_id] in _STARTABLE else "text"
