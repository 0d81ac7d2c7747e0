"""Outputs as pages show them: in full, or as small pictures in lists.

Outputs are other people's text. Only `http` and `https` addresses become links, and only what the
content security policy allows is loaded into the page; everything else stays text.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from tracker.core.formatting import unturned
from tracker.core.run import OUTPUT_KINDS, Output

MAX_LINK: Final = 8192


class OutputView(NamedTuple):
    """An output with its name, how to show it (see `presentation`), and the host of its link."""

    output: Output
    name: str
    kind: str
    host: str


def output_views(
    outputs: Sequence[Output] | None,
    ports: Sequence[Mapping[str, Any]] = (),
    *,
    media_origin: str | None,
) -> list[OutputView]:
    """Outputs in order; `ports` are the outputs that their technique defines."""
    outputs = outputs or ()
    names = output_names(outputs, ports)
    return [
        OutputView(one, name, *presentation(one, media_origin=media_origin))
        for one, name in zip(outputs, names, strict=True)
    ]


def output_names(outputs: Sequence[Output], ports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The technique's names for its outputs; where these are not as it defines them, their types,
    numbered."""
    if [one.type for one in outputs] == [port.get("type") for port in ports]:
        return [str(port.get("name") or port.get("id")) for port in ports]
    types, seen = Counter(one.type for one in outputs), Counter[str]()
    names = []
    for one in outputs:
        seen[one.type] += 1
        name = OUTPUT_KINDS.get(one.type, "output").capitalize()
        names.append(f"{name} {seen[one.type]}" if types[one.type] > 1 else name)
    return names


def plain_http_origin(flora_base_url: str) -> str | None:
    """The one origin whose files may be loaded by plain http: a local FLORA; else `None`."""
    parts = urlsplit(flora_base_url)
    return f"http://{parts.netloc}" if parts.scheme == "http" else None


def web_link(text: str) -> str | None:
    """`text` if it is a plain `http(s)` address that may become a link; else `None`."""
    if len(text) > MAX_LINK or any(ord(each) <= 0x20 or ord(each) == 0x7F for each in text):
        return None
    if unturned(text) != text:  # it would look like another address
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


def presentation(output: Output, *, media_origin: str | None) -> tuple[str, str]:
    """How to show an output, and the host of its link, where there is one.

    One of "image", "video", "audio", "document", "text", "link" (of an unknown type, or not to be
    loaded into the page) and "unsafe" (no web address). Plain http is loaded from `media_origin`
    alone.
    """
    if output.type == "text":
        return "text", ""
    if web_link(output.url) is None:
        return "unsafe", ""
    parts = urlsplit(output.url)
    loadable = parts.scheme == "https" or f"http://{parts.netloc}" == media_origin
    return OUTPUT_KINDS.get(output.type, "link") if loadable else "link", parts.hostname or ""
