"""How each output of a run is shown: as an image, a player, a text, a document or a link.

Links are other people's text. Only `http` and `https` addresses become links, and only what the
content security policy allows is loaded into the page; everything else stays text.
"""

from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from tracker.core.run import Output

MAX_LINK: Final = 8192
_KINDS: Final = {
    "imageUrl": "image",
    "videoUrl": "video",
    "audioUrl": "audio",
    "documentUrl": "document",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputView:
    """One output on a page.

    `kind` is "image", "video", "audio", "document", "text", "link" (of an unknown type, or not to
    be loaded into the page) or "unsafe" (no web address). `value` is the link, or the text itself.
    """

    output_id: str
    type: str
    kind: str
    value: str
    host: str = ""


def plain_http_origin(flora_base_url: str) -> str | None:
    """The one origin whose files may be loaded by plain http: a local FLORA; else `None`."""
    parts = urlsplit(flora_base_url)
    return f"http://{parts.netloc}" if parts.scheme == "http" else None


def web_link(text: str) -> str | None:
    """`text` if it is a plain `http(s)` address that may become a link; else `None`."""
    if len(text) > MAX_LINK or any(ord(each) <= 0x20 or ord(each) == 0x7F for each in text):
        return None
    if "\\" in text:  # browsers read it as a slash, so the host may be another than it seems
        return None
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises where it is no port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        return None
    return text


def view_output(output: Output, *, media_origin: str | None) -> OutputView:
    """How to show an output, where `media_origin` may be loaded by plain http."""
    kind, host = "unsafe", ""
    if output.type == "text":
        kind = "text"
    elif link := web_link(output.url):
        parts = urlsplit(link)
        host = parts.hostname or ""
        loadable = parts.scheme == "https" or f"http://{parts.netloc}" == media_origin
        kind = _KINDS.get(output.type, "link") if loadable else "link"
    return OutputView(
        output_id=output.output_id, type=output.type, kind=kind, value=output.url, host=host
    )
