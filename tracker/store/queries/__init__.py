"""Queries, one module for each subject, with the few writes that belong to it."""
