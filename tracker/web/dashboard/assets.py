"""The files below /static: cached for good, under an address that changes with their content.

One hash covers all of them, so that a module which imports another by a relative address gets the
one that it was tested with.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tracker.web.http.errors import not_found

FOR_GOOD: Final = "public, max-age=31536000, immutable"
_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""What is served; other files (licences) only lie there."""


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str


class Assets:
    """The files, read once: they are small."""

    def __init__(self) -> None:
        root = resources.files("tracker.web.dashboard") / "static"
        self._files = dict(sorted(_read(root, "")))
        digest = hashlib.sha256()
        for name, file in self._files.items():
            digest.update(f"{name}\0{len(file.content)}\0".encode())
            digest.update(file.content)
        self._hash = digest.hexdigest()[:16]

    def url(self, name: str) -> str:
        """The address of a file, for a template. Raises `KeyError` where there is none."""
        _ = self._files[name]
        return f"/static/{self._hash}/{name}"

    def route(self) -> Route:
        """The route of all of them."""
        return Route("/static/{hash}/{name:path}", self._serve, methods=["GET"])

    async def _serve(self, request: Request) -> Response:
        """A file. Under another hash, asked for by a page of another version, it is not kept."""
        file = self._files.get(request.path_params["name"])
        if file is None:
            raise not_found("There is no such file.")
        known = request.path_params["hash"] == self._hash
        return Response(
            file.content,
            media_type=file.media_type,
            headers={"Cache-Control": FOR_GOOD if known else "no-cache"},
        )


def _read(folder: Traversable, below: str) -> list[tuple[str, _File]]:
    found: list[tuple[str, _File]] = []
    for entry in folder.iterdir():
        name = f"{below}{entry.name}"
        if entry.is_dir():
            found += _read(entry, f"{name}/")
        elif media_type := _TYPES.get(name.rpartition(".")[2]):
            found.append((name, _File(entry.read_bytes(), media_type)))
    return found
