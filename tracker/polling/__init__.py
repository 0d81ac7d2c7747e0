"""Polling: rounds of polling, history sweeps, verification, and following runs to their end."""
