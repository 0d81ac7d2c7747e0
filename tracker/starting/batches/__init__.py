"""Batches: a start for each row of a sheet, planned, ordered, launched and followed."""
