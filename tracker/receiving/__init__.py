"""Callbacks: stored and acknowledged, then applied to their runs.

receive.py   verifies a callback and stores it in the inbox, in groups
apply.py     applies waiting deliveries, in groups; a quarantined one again
"""
