"""Arguments that several commands share."""

from datetime import timedelta
from typing import Annotated

import typer

from tracker.core.tags import parse_tags


def check_run_id(text: str) -> str:
    """`text`, where it can be a run's id. Raises `BadParameter`."""
    if not 1 <= len(text) <= 255 or not text.isprintable():
        raise typer.BadParameter("must be FLORA's run_… identifier")
    return text


def check_run_ids(texts: list[str] | None) -> list[str]:
    """Each of `texts` once, where all can be a run's id. Raises `BadParameter`."""
    return list(dict.fromkeys(map(check_run_id, texts or ())))


def parse_age(text: str, option: str) -> timedelta:
    """How long ago. Raises `BadParameter`, naming the option, for what is no duration."""
    from tracker.settings.values import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def parsed_tags(texts: list[str] | None) -> dict[str, str]:
    """The tags of `--tag`. Raises `BadParameter`."""
    try:
        return parse_tags(texts or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tag") from error


TagOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        metavar="KEY=VALUE",
        help="What it is for: kept, filtered by, budgeted by. Repeatable.",
    ),
]
RunId = Annotated[
    str, typer.Argument(metavar="RUN_ID", help="FLORA's run_… identifier.", callback=check_run_id)
]
RunIds = Annotated[
    list[str],
    typer.Argument(metavar="RUN_ID…", help="FLORA's run_… identifiers.", callback=check_run_ids),
]
