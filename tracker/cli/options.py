"""Options and arguments: each is the default of the parameter that takes its value."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import typer

from tracker.core.budget import parse_tags
from tracker.core.clock import utc_now

T = TypeVar("T")
V = TypeVar("V")


def argument(metavar: str, help: str, **details: Any) -> Any:
    """A required argument, unless it has a `default`; `details` are those of `typer.Argument`."""
    return typer.Argument(metavar=metavar, help=help, **details)


def option(help: str, *names: str, default: Any = None, **details: Any) -> Any:
    """An option, by default named like its parameter; `default=...` requires it."""
    return typer.Option(default, *names, help=help, **details)


def flag(name: str, help: str, *more: str) -> Any:
    """A switch that is off by default."""
    return option(help, name, *more, default=False)


def repeatable(name: str, metavar: str, help: str) -> Any:
    """An option that may be given any number of times."""
    return option(f"{help} Repeatable.", name, metavar=metavar, default=[])


def age(help: str, **details: Any) -> Any:
    """An option that `parse_age` reads."""
    return option(help, metavar="AGE", parser=parse_age, **details)


def checked(check: Callable[[V], T], value: V, option: str | None = None) -> T:
    """`check(value)`. Raises `BadParameter` for its `ValueError`, about `option` where a parser of
    the option does not call this."""
    try:
        return check(value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def check_run_id(text: str) -> str:
    """A text that can be a run's id. Raises `BadParameter`."""
    if not 1 <= len(text) <= 255 or not text.isprintable() or " " in text:
        raise typer.BadParameter("must be FLORA's run_… identifier")
    return text


def check_run_ids(texts: list[str]) -> list[str]:
    """Each of `texts` once. Raises `BadParameter` where one cannot be a run's id."""
    return list(dict.fromkeys(map(check_run_id, texts)))


def check_not_empty(text: str | None) -> str | None:
    """A script's variable that is not set must not mean that the option was left out."""
    if text == "":
        raise typer.BadParameter("must not be empty")
    return text


def parse_value(text: str, form: str, option: str) -> tuple[str, str | None, str]:
    """Id, type if it is given, and value of `ID=VALUE` or `ID:TYPE=VALUE`. Raises `BadParameter`
    where `text` is not of this `form`."""
    name, equals, value = text.partition("=")
    input_id, colon, type_ = name.partition(":")
    if not (equals and input_id) or (colon and not type_):
        raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
    return input_id, type_ or None, value


def parse_age(text: str | timedelta) -> timedelta:
    """A duration, as the parser of an option. Raises `BadParameter`."""
    from tracker.settings.values import parse_duration

    return checked(parse_duration, text)


def parse_time(text: str | datetime) -> datetime:
    """An age such as `24h`, or a time such as `2026-11-28T03:00Z` (UTC without an offset), as the
    parser of an option. Raises `BadParameter`."""
    if isinstance(text, datetime):
        return text
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return utc_now() - parse_age(text)
    try:
        return at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC)
    except OverflowError:
        raise typer.BadParameter("must be within the years 1 to 9999 UTC") from None


def parsed_tags(texts: list[str]) -> dict[str, str]:
    """The tags of `--tag`. Raises `BadParameter`."""
    return checked(parse_tags, texts, "--tag")


AS_JSON: Final = flag("--json", "Print JSON and nothing else on stdout.")
LIMIT: Final = option("Maximum rows.", default=50, min=1, max=100)
CURSOR: Final = option("Continue after a page: its next_cursor.")
TAGS: Final = repeatable("--tag", "KEY=VALUE", "Label the runs, for filters and budgets.")
WORKSPACE: Final = option(
    "Workspace id, where several are configured.", metavar="W", callback=check_not_empty
)
OF_WORKSPACE: Final = option("Filter by workspace.", metavar="W", callback=check_not_empty)
TECHNIQUE: Final = argument("TECHNIQUE", "Technique id (tech_…) or slug.")
RUN_ID: Final = argument("RUN_ID", "FLORA's run_… identifier.", callback=check_run_id)
RUN_IDS: Final = argument("RUN_ID", "FLORA's run_… identifiers.", callback=check_run_ids)
