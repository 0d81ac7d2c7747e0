"""What a run made, as what it is: an image, a player, a text, a document.

Links are other people's text. Only `http` and `https` become links, and only what the browser may
load under our content policy is shown in the page itself; everything else stays plain text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from tracker.core.run import Output

LONGEST_LINK: Final = 8192
_KINDS: Final = {
    "imageUrl": "image",
    "videoUrl": "video",
    "audioUrl": "audio",
    "documentUrl": "document",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One output for the page.

    `kind` is "image", "video", "audio", "document", "text", "link" (of a type that is not known, or
    not to be loaded here) or "unsafe" (no web address). `value` is the link, or the text itself.
    """

    output_id: str
    type: str
    kind: str
    value: str
    host: str = ""


def web_link(text: str) -> str | None:
    """`text` where it is a plain `http(s)` address that may become a link; else `None`."""
    if len(text) > LONGEST_LINK or any(ord(each) <= 0x20 or ord(each) == 0x7F for each in text):
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


class Gallery:
    """Decides what is shown as what. `flora` is FLORA's base URL.

    A local FLORA serves its files by plain http, and only that one origin may.
    """

    def __init__(self, flora: str) -> None:
        parts = urlsplit(flora)
        self.plain_origin = f"http://{parts.netloc}" if parts.scheme == "http" else None

    def shown(self, outputs: Iterable[Output]) -> list[Shown]:
        """Each output, in order."""
        return [self._one(output) for output in outputs]

    def _one(self, output: Output) -> Shown:
        if output.type == "text":
            return Shown(
                output_id=output.output_id, type=output.type, kind="text", value=output.url
            )
        link = web_link(output.url)
        if link is None:
            kind, host = "unsafe", ""
        else:
            parts = urlsplit(link)
            host = parts.hostname or ""
            loadable = parts.scheme == "https" or f"http://{parts.netloc}" == self.plain_origin
            kind = _KINDS.get(output.type, "link") if loadable else "link"
        return Shown(
            output_id=output.output_id, type=output.type, kind=kind, value=output.url, host=host
        )
