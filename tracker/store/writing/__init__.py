"""Writes to runs and deliveries.

group_commit.py   commits what waits together, and answers after the commit
writer.py         merges and writes observations
statements.py     the statements, with statements_postgres.py and statements_sqlite.py
rollups.py        counts by state, hour and day
retention.py      removes old rows
"""
