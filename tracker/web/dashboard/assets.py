"""The files below /static: cached for good, under an address that changes with their content.

One hash covers all files, so that a module which imports another by a relative address gets the
version that belongs to it.
"""

import hashlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.web.http.responses import not_found

IMMUTABLE: Final = "public, max-age=31536000, immutable"
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""What is served; other files (licences) are not."""


class Assets:
    """The files, read once: they are small."""

    def __init__(self) -> None:
        root = resources.files("tracker.web.dashboard") / "static"
        self._files = dict(sorted(_read(root, "")))
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        self._hash = digest.hexdigest()[:16]

    def url(self, name: str) -> str:
        """The address of a file, for a template. Raises `KeyError` for an unknown one."""
        _ = self._files[name]
        return f"/static/{self._hash}/{name}"

    def route(self) -> Route:
        """The route of all files."""
        return Route("/static/{hash}/{name:path}", self._serve, methods=["GET"])

    async def _serve(self, request: Request) -> Response:
        """A file. Under the hash of another version it is not cached."""
        name = request.path_params["name"]
        content = self._files.get(name)
        if content is None:
            raise not_found("There is no such file.")
        current = request.path_params["hash"] == self._hash
        return Response(
            content,
            media_type=_TYPES[name.rpartition(".")[2]],
            headers={"Cache-Control": IMMUTABLE if current else "no-cache"},
        )


def _read(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            yield from _read(entry, f"{name}/")
        elif name.rpartition(".")[2] in _TYPES:
            yield name, entry.read_bytes()
