"""`--input ID=VALUE` and `--input ID:TYPE=VALUE`: what a run is started with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from tracker.services import Services


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
    """The inputs as a start takes them, missing types filled in from the technique's definition.

    Whether they fit it is found when the run is started. Raises `InvalidRequest` where neither the
    caller nor the definition says a type, and whatever asking FLORA raises.
    """
    from tracker.core import inputs

    ports: Sequence[inputs.Port] = ()
    if any(one.type is None for one in given):
        workspace = services.workspaces.pick(workspace_id)
        ports = (await services.catalogue.definition(workspace, technique)).ports
    return inputs.typed(ports, [(one.id, one.type, one.value) for one in given])
