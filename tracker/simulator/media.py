"""The small files behind output links: made from the output's identifier, so each is its own."""

import hashlib
import io
import struct
import wave
import zlib
from typing import Final

EXTENSIONS: Final = {
    "imageUrl": "png",
    "videoUrl": "mp4",
    "audioUrl": "wav",
    "documentUrl": "pdf",
}
"""The file name extension for each type of output that is a link."""

CONTENT_TYPES: Final = {
    "png": "image/png",
    "mp4": "video/mp4",
    "wav": "audio/wav",
    "pdf": "application/pdf",
}


def media_bytes(output_id: str, extension: str) -> bytes:
    """The content of an output's file.

    Images, sounds and documents are valid; a video is only a container without a track.
    """
    seed = hashlib.sha256(output_id.encode()).digest()
    match extension:
        case "png":
            return _png(seed)
        case "wav":
            return _wav(seed)
        case "pdf":
            return _pdf(output_id)
        case _:
            return _mp4(seed)


def _png(seed: bytes, size: int = 96) -> bytes:
    """A square that runs from one colour to another."""
    first, last = seed[:3], seed[3:6]
    rows = bytearray()
    for y in range(size):
        rows.append(0)  # the row's filter: none
        for x in range(size):
            at = (x + y) / (2 * size - 2)
            rows += bytes(round(a + (b - a) * at) for a, b in zip(first, last, strict=True))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _wav(seed: bytes) -> bytes:
    """A quarter of a second of a square wave."""
    half_period = 8 + seed[0] % 24
    samples = bytes(160 if i // half_period % 2 else 96 for i in range(2000))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(8000)
        sound.writeframes(samples)
    return file.getvalue()


def _pdf(output_id: str) -> bytes:
    """One page that names its output."""
    text = b"BT /F1 12 Tf 20 60 Td (%s) Tj ET" % output_id.encode("ascii", "replace")
    objects = (
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 240 120]/Contents 4 0 R"
        b"/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(text), text),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    )
    file = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(file))
        file += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return bytes(file) + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\n"
        b"startxref\n%d\n%%%%EOF\n" % (size, table, size, len(file))
    )


def _mp4(seed: bytes) -> bytes:
    """A file type box and a data box of a few bytes."""
    kind = b"isom" + struct.pack(">I", 512) + b"isomiso2mp41"
    return b"".join(
        struct.pack(">I", 8 + len(data)) + name + data
        for name, data in ((b"ftyp", kind), (b"mdat", seed))
    )
