"""The core: what a run is, what was seen of it, and how sights become a run.

Pure functions and frozen values; only the standard library is imported here, nothing reads a clock
and nothing does I/O.
"""
