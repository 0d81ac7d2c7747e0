"""Writes to run state: the writer of observations, the inbox of callbacks, rollups, retention."""
