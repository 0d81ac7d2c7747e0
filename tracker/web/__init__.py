"""The HTTP side: FLORA's callbacks, the API for people and programs, health.

    app.py        the routes; server.py, the process around them
    callbacks.py  what FLORA posts
    runs.py       /api/runs; schemas.py, what may be asked of it
    health.py     /healthz and /readyz
    auth.py       who may see what
    edge.py       what every answer has in common, errors included; faults.py, which error is which
    body.py       reading what a client sends, within bounds (limits.py)
    services.py   what the rest of the tracker gives to all this

Nothing is decided here: a request is checked, a use case is called, and what it returns is shown.
"""
