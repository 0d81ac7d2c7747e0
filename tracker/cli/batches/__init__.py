"""Batches: a run for each row of a file, and the results."""
