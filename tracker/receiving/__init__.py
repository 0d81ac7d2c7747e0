"""Callbacks: stored and acknowledged, then applied to their runs.

receive.py   verifies a callback and stores it in the inbox, the deliveries that wait
apply.py     takes what waits, in groups, and writes what it says of its runs
replay.py    makes a quarantined delivery wait again
"""
