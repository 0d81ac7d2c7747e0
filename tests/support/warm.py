"""What every `tracker` process does first is done here once, in the one that they are forked from.

Importing this runs a command: afterwards its definitions, schemas and statements are at hand.
"""

import gc
import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from tempfile import TemporaryDirectory

import pytest  # noqa: F401 - where what a process calls first is imported from needs it
import typer.main

from tests.support.compiled import share_compiled
from tests.support.contexts import one_context, share_context
from tracker.cli import main
from tracker.cli.app import app

_command = typer.main.get_command(app)
typer.main.get_command = lambda _: _command  # type: ignore[assignment]


_environ, _folder = dict(os.environ), os.getcwd()
for _name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
    os.environ.pop(_name, None)  # what is forked has variables of its own
share_compiled()
share_context()
for _trust_env in (True, False):
    one_context(trust_env=_trust_env)


def _run(*arguments: str) -> None:
    sys.argv = ["tracker", *arguments]
    with suppress(SystemExit), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        main()


with TemporaryDirectory() as _empty:
    os.chdir(_empty)
    _run("runs", "list")
    _run("runs", "list", "--json")
    os.chdir(_folder)
os.environ.clear()
os.environ.update(_environ)

# No process collects what all of them share, nor copies it while it collects.
gc.collect()
gc.freeze()
