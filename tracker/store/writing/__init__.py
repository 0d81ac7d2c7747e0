"""Writes to runs, deliveries and messages.

group_commit.py   commits what waits together, and answers after the commit
writer.py         merges and writes observations
statements.py     the statements of a write batch
messages.py       claims messages to endpoints, and stores the outcomes of attempts
rollups.py        counts by state, hour and day
retention.py      removes old rows
"""
