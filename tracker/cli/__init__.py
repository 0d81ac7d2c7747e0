"""The command line: one file for each group of commands, and no logic in them.

    app.py       `tracker` itself: the groups, `--version`, errors and exit statuses
    errand.py    what every command does first: settings, log, services, one event loop
    output.py    what commands print: JSON for programs, tables for people
    inputs.py    `--input ID=VALUE`; follow.py, `--wait`
    serving.py   serve, worker                 looking.py   reconcile, poll
    runs.py      runs start|track|list|show    database.py  db upgrade|current
    local.py     simulate, demo

A command imports what it runs when it runs, so that `--help` is quick.
"""

from tracker.cli.app import main

__all__ = ["main"]
