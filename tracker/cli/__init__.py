"""The command line: one file for each group of commands, and no logic.

    app.py         `tracker` itself: the groups, `--version`, errors and exit statuses
    setup.py       settings, log, services, and arguments that commands share
    output.py      JSON, tables and notes on stdout; bars and lines on stderr
    serve.py       serve, worker                simulation.py  serve --simulate
    reconcile.py   reconcile, poll, verify
    runs.py        runs start|track|forget|list|show
    watch.py       runs watch|explain           download.py  runs download
    starts.py      starts list|show|resolve
    batch.py       batch                        batches.py   batches list|show, results
    techniques.py  techniques sync|list|show    deliveries.py  deliveries list|show|replay
    spending.py    spending                     audit.py     audit list
    database.py    db upgrade|current|copy|recount|prune
    doctor.py      doctor                       simulate.py  simulate, demo

A command imports what it needs when it runs: `--help` loads neither SQLAlchemy nor httpx.
"""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command that `sys.argv` names, and exit with its status."""
    try:
        from tracker.cli.app import main as run
    except KeyboardInterrupt:  # Ctrl-C while the modules are loaded
        sys.exit(130)
    run()
