"""`tracker` itself: its commands, errors and exit statuses.

Exit status 0 is done, 1 failed, 2 wrong usage or missing settings, 130 interrupted. An expected
error is one line on stderr; only a bug shows a traceback.
"""

import errno
import gc
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import typer
from typer.core import TyperArgument

from tracker.cli import (
    batch,
    batches,
    download,
    operations,
    runs,
    serve,
    simulate,
    starts,
    techniques,
    webhooks,
)
from tracker.cli.command import option
from tracker.cli.output import note
from tracker.core.errors import (
    FieldFault,
    InvalidRequest,
    SettingsError,
    StoreUnavailable,
    TrackerError,
)

app = typer.Typer(
    name="tracker",
    help="Keeps the final status, outputs and cost of every FLORA run, even when its callback is "
    "lost.",
    epilog="Settings come from the environment; README.md lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: rich's takes longer to import than everything else here together.
    rich_markup_mode=None,
)
for command in (
    *(serve.serve, serve.worker, operations.reconcile, operations.poll, operations.verify),
    *(batch.batch, techniques.spending, webhooks.listen, operations.doctor),
    *(simulate.simulate, simulate.demo),
):
    app.command()(command)
runs.app.command()(download.download)
for group in (
    *(runs.app, batches.app, starts.app, techniques.app, webhooks.deliveries),
    *(webhooks.endpoints, webhooks.messages, operations.audit, operations.db),
):
    app.add_typer(group)

# An argument's metavar says what it is; typer's help would add "<str>" or "<list[str]>" to it.
TyperArgument.display_type_rich = lambda self, ctx: None  # type: ignore[method-assign]

_INPUT: Final = re.compile(r"inputs\.\d+\.(id|type|value)")
"""The field of an input by its position, which means nothing on a command line."""

_OBJECTS_BEFORE_COLLECTION: Final = 200_000
"""More than a short command makes: nearly all of them are modules and stay, so that looking for
garbage among them would be a fifteenth of its time."""


def _show_version(asked: bool) -> None:
    if asked:
        from tracker import __version__

        typer.echo(f"tracker {__version__}")
        raise typer.Exit


@app.callback()
def _tracker(
    version: bool = option(
        "Show the version.", "--version", default=False, callback=_show_version, is_eager=True
    ),
) -> None:
    pass


_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a write to stdout says that has no place; without a file name it is about no other file."""


def main() -> NoReturn:
    """Run the command that `sys.argv` names, and exit with its status."""
    _collect_late()
    _prepare_streams()
    try:
        sys.exit(_run())
    finally:
        # Without this, Python collects garbage as it exits: a quarter of a short command's time.
        gc.freeze()


def _collect_late() -> None:
    """Collect no garbage before there is much, as most commands end before; then as Python does."""
    usual = gc.get_threshold()

    def collecting(*_: object) -> None:
        gc.callbacks.remove(collecting)
        gc.set_threshold(*usual)

    gc.callbacks.append(collecting)
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)


def _run() -> int:
    try:
        status = app(prog_name="tracker", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        _print_usage_error(error)
        return error.exit_code
    except TrackerError as error:
        _print_error(_message(error))
        return 2 if isinstance(error, SettingsError | InvalidRequest) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except OSError as error:
        if not (error.filename is None and error.errno in _FULL) and not _is_output_lost():
            raise
        # Python flushes stdout once more as it exits, and would report the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _print_error(f"stdout cannot be written: {error.strerror}")
        return 1
    return status if isinstance(status, int) else 0


def _prepare_streams() -> None:
    """Discard what is printed to a stream that the caller has closed (`>&-`), and escape what the
    encoding of stdout lacks, as Python does for stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open to the end
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_output_lost() -> bool:
    """Whether stdout takes nothing more."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _print_usage_error(error: typer.TyperException) -> None:
    """Print what is wrong, and the command that shows the usage; without a command, the help."""
    message = error.format_message().replace("Value error, ", "").replace("Input should", "must")
    context = getattr(error, "ctx", None)
    if context is None:
        _print_error(message)
    elif message == context.get_help():
        typer.echo(message, err=True)
    else:
        _print_error(f"{message.rstrip('.')} (see {context.command_path} --help)")


def _message(error: TrackerError) -> str:
    """The error's message, its fields where the message does not name them, and advice."""
    message = str(error)
    faults: Sequence[FieldFault] = getattr(error, "fields", ())
    fields = [
        one.message if _INPUT.fullmatch(one.field) else f"{one.field}: {one.message}"
        for one in faults
        if one.message not in message
    ]
    if fields:
        message = f"{message}: {'; '.join(fields)}"
    if isinstance(error, StoreUnavailable) and "TRACKER_DATABASE_URL" not in message:
        message += "; check TRACKER_DATABASE_URL, and run `tracker doctor`"
    return message


def _print_error(message: str) -> None:
    note(f"tracker: {' '.join(message.split())}")
