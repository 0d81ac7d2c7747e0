"""`GET /api/stream`: server-sent events, one for each change of a run, from any process.

::

    signals ──► Broadcaster ──► StreamReader ──► EventStream    one of each for a connection; one
                    │                                           broadcaster for the process
                    ▼ reads new events once for all readers
                GapTracker      up to which number no event can still appear

The numbers of `run_events` are the events' ids. An event is sent only when no smaller number can
still appear, so `Last-Event-ID` is all that a reader has to remember, and any process can resume
from it.
"""
