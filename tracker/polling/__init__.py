"""Polling: single reads, history pages, sweeps, verification, and following runs to their end."""
