"""The store: everything that reads and writes the database.

schema.py      the tables, their constraints and indexes
engine.py      the database: reads, and write transactions
postgres.py    connections to PostgreSQL; sqlite.py, to SQLite; url.py, their address
errors.py      errors of drivers as errors of the tracker
migrate.py     migrations
writing/       what changes runs: the writer, the inbox, rollups, retention
queries/       what reads
rows.py        a run's record as a row, and back; text.py, text and JSON that fit
claims.py      claims on due runs, leases
signals.py     changes, reported to other processes; clock.py, the time that they share
copy.py        a copy to another database; inspection.py, the database of `tracker doctor`
"""
