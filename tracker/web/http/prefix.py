"""The path that the application is mounted under, such as `/flora`.

It is taken off each request and put in front of each address in the response, as a proxy would:
routes, access rules, pages and templates know paths from the application's own root alone. The
server or the host application names it as `root_path`: Starlette's `Mount`, FastAPI's `app.mount`,
`uvicorn --root-path`. An application that is not mounted does not pass through here.
"""

import re
from typing import Final
from urllib.parse import quote

from starlette.types import Message, Scope, Send

_PREFIX: Final = "tracker.prefix"
_OURS: Final = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "query_string", "headers"),
    *("client", "server"),
)
"""What ASGI says of a request. What the host adds to it stays there: its exception handlers, which
Starlette's routes would call with our errors, its router, state and session."""
_ADDRESSES: Final = frozenset((b"location", b"hx-redirect"))
"""Headers that hold an address of this application."""
_LINKS: Final = re.compile(
    rb'(\s(?:href|src|action|formaction|hx-get|hx-post|data-stream)=")(?=/(?!/))'
)
"""The attributes of our pages that hold a path. Values are escaped: a quotation mark before a path
is always one of a template."""


def without_prefix(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """An HTTP request as it would be if the application were not mounted, and where to send."""
    inner = {key: scope[key] for key in _OURS if key in scope}
    inner["root_path"] = ""
    root_path = scope.get("root_path", "").rstrip("/")
    if not root_path:
        return inner, send
    path = scope["path"]
    if path == root_path or path.startswith(f"{root_path}/"):  # some servers take it off themselves
        inner["path"] = path[len(root_path) :] or "/"
    # Quoted, because a part of it may be a parameter of the host's route, which anyone chooses.
    # Two slashes would lead to another host.
    prefix = inner[_PREFIX] = "/" + quote(root_path.strip("/"))

    async def send_with_prefix(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [
                (name, prefix.encode() + value)
                if name in _ADDRESSES and value[:1] == b"/"
                else (name, value)
                for name, value in message.get("headers", ())
            ]
            message = {**message, "headers": headers}
        await send(message)

    return inner, send_with_prefix


def prefix_of(scope: Scope) -> str:
    """The prefix of a request, `""` where there is none."""
    prefix: str = scope.get(_PREFIX, "")
    return prefix


def link_below(prefix: str, page: bytes) -> bytes:
    """A page of ours whose links lead below the prefix."""
    return _LINKS.sub(rb"\1" + prefix.encode(), page) if prefix else page
