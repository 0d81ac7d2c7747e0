"""What a file's name ends in: by its Content-Type, else by its link, else by its output's type."""

import re
from mimetypes import MimeTypes
from typing import Final
from urllib.parse import unquote, urlsplit

_COMMON: Final = {
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/avif": ".avif",
    "image/gif": ".gif",
    "image/svg+xml": ".svg",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "audio/mpeg": ".mp3",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/wave": ".wav",
    "audio/vnd.wave": ".wav",
    "audio/mp4": ".m4a",
    "audio/ogg": ".ogg",
    "audio/flac": ".flac",
    "application/pdf": ".pdf",
    "application/json": ".json",
    "text/plain": ".txt",
    "text/markdown": ".md",
}
_OF_OUTPUT: Final = {
    "imageUrl": ".png",
    "videoUrl": ".mp4",
    "audioUrl": ".wav",
    "documentUrl": ".pdf",
    "text": ".txt",
}
_UNTOLD: Final = ("application/octet-stream", "binary/octet-stream", "application/binary")
"""Types with which a server says that it does not know."""
_IN_LINK: Final = re.compile(r"\.[A-Za-z0-9]{1,8}")
_TAKEN: Final = (".part",)
"""By this a file is known that is not whole."""
# Only what Python itself knows: the same everywhere, whatever the machine's own tables say.
_KNOWN: Final = MimeTypes(filenames=())


def ending(content_type: str | None, link: str, output_type: str) -> str:
    """The ending of the name, with its dot.

    `content_type` is the header's value, `link` where the file came from in the end, `output_type`
    FLORA's word (`imageUrl`, …).
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type and media_type not in _UNTOLD:
        known = _COMMON.get(media_type) or _KNOWN.guess_extension(media_type, strict=False)
        if known is not None:
            return known
    return _of_link(link) or _OF_OUTPUT.get(output_type, ".bin")


def _of_link(link: str) -> str | None:
    try:
        name = unquote(urlsplit(link).path).rpartition("/")[2]
    except ValueError:
        return None
    stem, dot, last = name.rpartition(".")
    found = f".{last}".lower()
    usable = stem and dot and _IN_LINK.fullmatch(found) and found not in _TAKEN
    return found if usable else None
