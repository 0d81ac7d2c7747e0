"""The use cases: receive, start, track, poll, sweep.

Each takes what a source brings through the door. The web, the worker and the command line call only
these.
"""
