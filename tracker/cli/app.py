"""`tracker` itself: its commands, and how each of them ends.

Exit status 0 is done, 1 failed, 2 wrong usage or missing settings, 130 interrupted. What is
expected to go wrong is one line on stderr; only a fault of the tracker's own shows a traceback.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from tracker.cli import (
    audit,
    batch,
    batches,
    database,
    deliveries,
    doctor,
    local,
    looking,
    runs,
    serving,
    spending,
    starts,
    techniques,
)
from tracker.core.errors import (
    FieldFault,
    InvalidRequest,
    SettingsError,
    StoreUnavailable,
    TrackerError,
)
from tracker.core.plain import plain

app = typer.Typer(
    name="tracker",
    help="Brings every FLORA run to its true end, outputs and cost in your database.",
    epilog="Settings come from the environment; README.md lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: rich's takes longer to import than everything else here together.
    rich_markup_mode=None,
)
serving.add_to(app)
looking.add_to(app)
app.add_typer(runs.app)
batch.add_to(app)
app.add_typer(batches.app)
app.add_typer(starts.app)
spending.add_to(app)
app.add_typer(techniques.app)
app.add_typer(deliveries.app)
app.add_typer(audit.app)
app.add_typer(database.app)
doctor.add_to(app)
local.add_to(app)


def _show_version(asked: bool) -> None:
    if asked:
        from tracker import __version__

        typer.echo(f"tracker {__version__}")
        raise typer.Exit


@app.callback()
def _tracker(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command that `sys.argv` names, and exit with its status."""
    try:
        status = app(prog_name="tracker", standalone_mode=False)
    except typer.TyperException as error:
        _explain(error)
        sys.exit(error.exit_code)
    except (SettingsError, InvalidRequest) as error:
        _say(_with_fields(error))
        sys.exit(2)
    except TrackerError as error:
        _say(_with_fields(error) + _advice(error))
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _explain(error: typer.TyperException) -> None:
    """Say what is wrong with the command and where its usage is told; no command at all is help."""
    message = error.format_message().replace("Value error, ", "").replace("Input should", "must")
    context = getattr(error, "ctx", None)
    if context is None:
        _say(message)
    elif message == context.get_help():
        typer.echo(message, err=True)
    else:
        _say(f"{message.rstrip('.')} (see {context.command_path} --help)")


def _with_fields(error: TrackerError) -> str:
    """What the error says, and each field that it names, unless its message tells that already."""
    message = str(error)
    fields: Sequence[FieldFault] = getattr(error, "fields", ())
    told = [f"{one.field}: {one.message}" for one in fields if one.message not in message]
    return f"{message}: {'; '.join(told)}" if told else message


def _advice(error: TrackerError) -> str:
    """What to do about a database that is away, where the message does not tell that already."""
    if not isinstance(error, StoreUnavailable) or "TRACKER_DATABASE_URL" in str(error):
        return ""
    return "; TRACKER_DATABASE_URL names the database, and `tracker doctor` looks at what is wrong"


def _say(message: str) -> None:
    # An error quotes what FLORA, a header or a command's argument said.
    typer.echo(f"tracker: {plain(' '.join(message.split()))}", err=True)
