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
_RUN_BY_A_CLICK: Final = """
exe com scr pif cpl msi msix msp mst appx msc dll ocx sys drv bat cmd ps1 psm1 psd1 ps1xml vbs
vbe vb js jse ws wsf wsh wsc sct hta chm hlp reg inf ins isp lnk url scf appref-ms gadget job
rgs xbap xll jnlp settingcontent library search

app command tool workflow action pkg mpkg dmg scpt scptd terminal webloc inetloc fileloc
sh bash zsh csh ksh fish run elf so out deb rpm apk appimage snap desktop service

py pyc pyw pyz pl pm rb php phtml phar lua tcl jar class war swf mjs cjs ipynb
html htm xhtml xht shtml mht mhtml xml xsl xslt svgz
docm dotm xlsm xltm xlam pptm potm ppam ppsm sldm iso img vhd vhdx
"""
_EXECUTABLE: Final = frozenset(_RUN_BY_A_CLICK.split())
"""What a double click might run: programs and scripts of Windows, of macOS and Linux, of
interpreters and browsers, documents with macros, and images of disks, which hide what is in them.
Such a file is kept as `.bin`."""
# Only what Python itself knows: the same everywhere, whatever the machine's own tables say.
_KNOWN: Final = MimeTypes(filenames=())


def ending(content_type: str | None, link: str, output_type: str) -> str:
    """The ending of the name, with its dot.

    `content_type` is the header's value, `link` where the file came from in the end, `output_type`
    FLORA's word (`imageUrl`, …). What could be run by a double click ends in `.bin`.
    """
    found = _told(content_type, link, output_type)
    return ".bin" if found[1:] in _EXECUTABLE else found


def _told(content_type: str | None, link: str, output_type: str) -> str:
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
