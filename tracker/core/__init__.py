"""The core: runs, observations, how they merge, and when to poll next.

Pure functions and frozen values on the standard library alone, without clocks and I/O.
"""
