"""The command line: one file for each group of commands, and no logic in them.

    app.py       `tracker` itself: the groups, `--version`, errors and exit statuses
    errand.py    what every command does first: settings, log, services, one event loop
    output.py    what commands print: JSON for programs, tables for people
    inputs.py    `--input ID=VALUE`; arguments.py, what several commands take
    follow.py    `--wait` and what it shows; progress.py and download_progress.py, on stderr
    serving.py   serve, worker                 looking.py   reconcile, poll
    runs.py      runs start|track|list|show    database.py  db upgrade|current
    watching.py  runs watch|explain            download.py  runs download
    deliveries.py  deliveries list|show|replay  local.py     simulate, demo
    techniques.py  techniques sync|list|show   batches.py  batches list|show
    batch.py     batch; batch_report.py, batch_output.py and batch_progress.py, what it shows

A command imports what it runs when it runs, so that `--help` is quick.
"""

from tracker.cli.app import main

__all__ = ["main"]
