"""The store: everything that reads and writes the database.

schema.py        the tables, their constraints and indexes
engine.py        the database: reads, and write transactions
postgres.py      connections to PostgreSQL; sqlite.py, to SQLite; url.py, their address
errors.py        errors of drivers as errors of the tracker
migrate.py       migrations; inspection.py, the database of `tracker doctor`
writing/         the writer, rollups, messages, retention
queries/         what is read, by subject, and the small writes beside it
coordination.py  claims, leases and signals between processes; clock.py, the time that they share
copy.py          a copy to another database
"""
