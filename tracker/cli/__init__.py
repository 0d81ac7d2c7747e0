"""The command line: one file for each subject, and no logic.

    app.py         `tracker` itself: the groups, `--version`, errors and exit statuses
    command.py     what commands share: options, settings, log, services and lists
    output.py      JSON, tables and notes on stdout; bars and lines on stderr

    serve.py       serve, worker
    runs.py        runs start|track|forget|list|show|watch|explain
    download.py    runs download
    starts.py      starts list|show|resolve|exclude
    batch.py       batch
    batches.py     batches list|show, and what both commands show of a batch
    techniques.py  techniques sync|list|show, spending
    webhooks.py    deliveries list|show|replay|acknowledge, endpoints list|test|enable,
                   messages list|show|resend|recover, listen
    operations.py  doctor, reconcile, poll, verify, db upgrade|current|copy|recount|prune,
                   audit list
    simulate.py    simulate, demo

A command imports what it needs when it runs: `--help` loads neither SQLAlchemy nor httpx.
"""

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command that `sys.argv` names, and exit with its status."""
    if sys.getfilesystemencoding() == "ascii":
        # LC_ALL=C with PYTHONUTF8=0: a prompt's other characters would reach FLORA as U+FFFD, and
        # no file could have them in its name. Started again, it reads all of them as UTF-8.
        command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execv(sys.executable, command)  # noqa: S606 - it is this command
    try:
        from tracker.cli.app import main as run
    except KeyboardInterrupt:  # Ctrl-C while the modules are loaded
        sys.exit(130)
    run()
