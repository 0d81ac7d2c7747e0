"""The HTTP side: FLORA's callbacks, the API for people and programs, health.

    app.py        the routes; server.py, the process around them
    callbacks.py  what FLORA posts; shortcut.py and constant.py, its way in and out past the rest;
                  bounds.py, how long it may take
    runs.py       /api/runs; techniques.py, /api/techniques; schemas.py, what may be asked of them
    openapi.py    /openapi.json; operations.py, what there is; shapes.py, what is answered
    health.py     /healthz and /readyz
    dashboard/    the pages for people
    auth.py       who may see what; sessions.py, signed-in browsers; throttle.py, how often to try
    edge.py       what every answer has in common, errors included; everywhere.py, its headers;
                  faults.py, which error is which
    connection.py what a client may make of one; connection_limit.py, of all together
    body.py       reading what a client sends, within bounds (limits.py)
    services.py   what the rest of the tracker gives to all this

Nothing is decided here: a request is checked, a use case is called, and what it returns is shown.
"""
