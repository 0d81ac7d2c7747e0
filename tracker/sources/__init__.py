"""Where news of runs comes from: starts, callbacks, polls, history pages.

Each source asks or is told, and returns observations. None of them knows that there is a database.
"""
