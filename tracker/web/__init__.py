"""The HTTP side: FLORA's callbacks, the API, the dashboard, health and metrics.

    app.py        the applications: routes and middleware; `/healthz`, `/readyz` and `/metrics`
    callbacks.py  `POST /callbacks/flora`
    api/          `/api`, and `/openapi.json`, which describes it
    stream.py     `/api/stream`
    dashboard/    the pages for people
    auth.py       access control; sessions.py, signed-in browsers
    http/         the server, and its limits on clients

Nothing is decided here: a request is checked, a service is called, and its result is returned.
"""
