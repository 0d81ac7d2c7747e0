"""Conditions on the state of a run, in the words by which partial indexes are recognised.

Most runs have completed and are settled. The indexes by status and by tracking leave these out: who
wants them finds them among all runs, newest first. PostgreSQL has to see the value in the text of a
statement to know that such an index holds what is wanted, SQLite the very term of the index.
"""

from sqlalchemy import ColumnElement, and_

from tracker.core.run import RunStatus, Status, Tracking, status_of
from tracker.store.tables import runs, word


def has_status(status: Status) -> ColumnElement[bool]:
    """That a run has this status, whoever knows it."""
    known = status_of(status)
    wanted = runs.c.status == (word(known.value) if isinstance(known, RunStatus) else known)
    if known is RunStatus.COMPLETED:
        return wanted
    return and_(wanted, runs.c.status != word(RunStatus.COMPLETED.value))


def is_tracked_as(tracking: Tracking) -> ColumnElement[bool]:
    """That this is how the tracker stands to a run."""
    wanted = runs.c.tracking == word(tracking.value)
    if tracking is Tracking.SETTLED:
        return wanted
    return and_(wanted, runs.c.tracking != word(Tracking.SETTLED.value))
