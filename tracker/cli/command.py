"""What a command consists of: options and arguments, settings and log, services, lists."""

import asyncio
import getpass
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import typer

from tracker.cli.output import note, print_json, print_table, showing_waits
from tracker.core.clock import utc_now
from tracker.core.errors import FloraUnreachable, TrackerError
from tracker.core.formatting import money
from tracker.core.starts import parse_tags

if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

    from tracker.services import Services
    from tracker.settings import Rotation, Settings
    from tracker.store.engine import Database

T = TypeVar("T")
V = TypeVar("V")

FLORA_SECONDS: Final = 28.0
"""How long a one-shot command waits for FLORA's first answer. A single call gives up sooner; this
limits several of them together."""

# Options and arguments: each is the default of the parameter that takes its value.


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


def parse_age(text: str) -> timedelta:
    """A duration, as the parser of an option. Raises `BadParameter`."""
    from tracker.settings.values import parse_duration

    return checked(parse_duration, text)


def parse_time(text: str) -> datetime:
    """An age such as `24h`, or a time such as `2026-11-28T03:00Z` (UTC without an offset), as the
    parser of an option. Raises `BadParameter`."""
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


# What runs a command.


def configure() -> "Settings":
    """Read the settings and configure the log. Raises `SettingsError`."""
    return configure_service().settings


def configure_service() -> "Rotation":
    """As `configure`, for a long-running process, whose secrets may be rotated."""
    from tracker.operations.telemetry import configure_logs
    from tracker.settings import Rotation, read_settings

    loaded = read_settings()
    settings = loaded.settings
    configure_logs(
        format=settings.tracker_log_format,
        level=settings.tracker_log_level,
        secrets=settings.secret_values,
    )
    return Rotation(settings, loaded, read_settings)


def run_once(
    work: Callable[["Services"], Awaitable[T]],
    *,
    needs_key: bool = False,
    concurrency: int | None = None,
    actor: str = "cli",
) -> T:
    """Open the services, run `work` with them, and close them.

    The audit log shows `actor` and the user. With `needs_key`, raises `SettingsError` where no API
    key is set. `concurrency` overrides TRACKER_API_CONCURRENCY.
    """
    settings = configure()
    if concurrency is not None:
        settings = settings.model_copy(update={"tracker_api_concurrency": concurrency})
    if needs_key:
        settings.require_api_key()

    async def run() -> T:
        from tracker.services import open_services
        from tracker.store.queries.audit import Principal, acting

        with acting(Principal(name=f"{actor}:{_user()}")):
            async with open_services(settings) as services, showing_waits(services):
                return await work(services)

    return asyncio.run(run())


def run_on_database(work: Callable[["Database"], Awaitable[T]]) -> T:
    """As `run_once`, for commands that need the database alone: they start in half the time."""
    settings = configure()

    async def run() -> T:
        from tracker.store.migrate import open_database

        async with open_database(
            settings.tracker_database_url, history_since=settings.tracker_history_since
        ) as database:
            return await work(database)

    return asyncio.run(run())


def print_list(
    name: str,
    find: Callable[["Database"], Awaitable[tuple[Sequence[T], str | None]]],
    to_json: Callable[[T], dict[str, Any]],
    columns: Mapping[str, str | Callable[[Mapping[str, Any]], object]],
    *,
    as_json: bool,
    hide: Sequence[str] = (),
    named: bool = False,
) -> int:
    """Print the page of a list that `find` returns: as JSON under `name`, or as a table. Return the
    number of its rows.

    `columns` are the table's: for each title the key of its values, or a function of the row. Times
    (keys that end in `at`) are shown to the second, costs (that end in `cost`) in USD. `hide` is
    that of `print_table`. With `named` a terminal shows the names of techniques in place of their
    ids.
    """

    async def work(database: "Database") -> tuple[list[dict[str, Any]], str | None, dict[str, str]]:
        found, next_cursor = await find(database)
        rows, names = [to_json(one) for one in found], {}
        if named and sys.stdout.isatty():
            from tracker.store.queries.techniques import technique_names

            ids = {row["technique_id"] for row in rows if row["technique_id"]}
            names = await technique_names(database, sorted(ids))
        return rows, next_cursor, names

    rows, next_cursor, names = run_on_database(work)
    if as_json:
        print_json({name: rows, "meta": {"next_cursor": next_cursor}})
        return len(rows)

    def cell(row: Mapping[str, Any], column: str | Callable[[Mapping[str, Any]], object]) -> object:
        if not isinstance(column, str):
            return column(row)
        value = row[column]
        if value is None:
            return None
        if column == "technique_id":
            return names.get(value, value)
        if column.endswith("cost"):
            return money(value)
        return f"{value[:19]}Z" if column == "at" or column.endswith("_at") else value

    values = ([cell(row, column) for column in columns.values()] for row in rows)
    print_table(columns, values, hide=hide)
    if next_cursor is not None:
        note(f"There are more: --cursor {next_cursor}")
    return len(rows)


def temporary_folder(prefix: str) -> "TemporaryDirectory[str]":
    """A new folder, removed with its `with` block. Raises `TrackerError` where none can be made."""
    from tempfile import TemporaryDirectory

    try:
        return TemporaryDirectory(prefix=prefix)
    except OSError as exc:
        said = f"no temporary folder can be made: {exc.strerror}; set TMPDIR to another place"
        raise TrackerError(said) from exc


def _user() -> str:
    """The person behind `sudo -u tracker` where there is one, else the process's user."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # in a container, a number without a name
        return str(os.getuid())


@asynccontextmanager
async def flora_deadline(
    services: "Services", seconds: float = FLORA_SECONDS
) -> AsyncIterator[None]:
    """Cancel the block where FLORA has not answered at all after `seconds`.

    After a first answer the client's own time-outs are enough. Raises `FloraUnreachable`.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:

            def check() -> None:
                # Each answer's `Date` sets the offset between the clocks.
                if all(
                    one.client is None or one.client.clock_offset is None
                    for one in services.workspaces
                ):
                    limit.reschedule(loop.time())

            timer = loop.call_later(seconds, check)
            try:
                yield
            finally:
                timer.cancel()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise FloraUnreachable(
            f"FLORA has not answered within {seconds:g} s", may_have_acted=True, timed_out=True
        ) from error
