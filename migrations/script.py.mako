"""${message}

While this runs, and until every process has been restarted, THE OLD CODE IS STILL RUNNING against
the new schema. So a revision only adds what the old code can ignore: a column is nullable or has a
server default; a rename or a removal comes a release after the last code that used the old name. A
statement that waits for a lock, or scans a big table, stops every callback meanwhile: the time-outs
in env.py end it and try again, and an index on a big table is made CONCURRENTLY, in an autocommit
block, after the same index was dropped if it exists (it does, and is not valid, where an upgrade
was interrupted). tests/store/test_migration_locks.py refuses what others would have to wait for.

SQLite remakes a table for most changes but a new column (batch mode), and refuses to while a view
reads it: such a revision drops the views first, and makes them again.

There is no way back but a backup: a downgrade would throw away what has been seen.

Revision: ${up_revision}
Follows: ${down_revision | comma,n}
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}
