"""The way past the gate and the router, for the paths that take the load."""

from starlette.types import ASGIApp, Receive, Scope, Send


class Shortcut:
    """Hands the requests for `path`, and for one part below it, to `endpoint`, and all others on.

    What lies between costs a callback half as much again as all that is done with it before it is
    written, and has no say in it: anybody may send one, and no route but its own fits.
    """

    def __init__(self, app: ASGIApp, *, path: str, endpoint: ASGIApp) -> None:
        self._app = app
        self._path = path
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        straight = False
        if scope["type"] == "http":
            path, _, last = scope["path"].rpartition("/")
            straight = scope["path"] == self._path or (path == self._path and last != "")
        await (self._endpoint if straight else self._app)(scope, receive, send)
