"""Explains a run in sentences: what happened to it, its state now, its next poll."""
