"""`GET /api/stream`: every change of a run, from whichever process, as server-sent events.

::

    signals ──► broadcaster ──► reader ──► response     one of each for a connection, but for
                    │ reads the timeline on              the broadcaster: one for the process
                    ▼
                  whole      up to which number nothing can come any more

However many readers there are, a change is read once. The timeline's numbers are the events' ids,
and an event goes out only when no smaller number can still come: so `Last-Event-ID` is all that a
reader has to remember, and any process can go on from there.
"""
