"""The local FLORA: its answers, its callbacks and its faults."""
