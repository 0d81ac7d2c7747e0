"""The techniques: FLORA's published catalogue, with made-up inputs, outputs and output files.

`techniques.tsv` holds one technique a line. Inputs and outputs are written `id:type`, followed by
`@16x9` for a required aspect ratio, `~5` for a required duration in seconds, and the flags `?`
optional, `*` several values, `+` takes an element.
"""

import csv
import hashlib
import io
import re
import struct
import wave
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Final

EXTENSIONS: Final = {"imageUrl": "png", "videoUrl": "mp4", "audioUrl": "wav", "documentUrl": "pdf"}
"""The file name extension for each type that is a link."""
CONTENT_TYPES: Final = {
    "png": "image/png",
    "mp4": "video/mp4",
    "wav": "audio/wav",
    "pdf": "application/pdf",
}
"""The content type for each extension."""

_PORT: Final = re.compile(
    r"(?P<id>\w+):(?P<type>\w+?)(?:@(?P<wide>\d+)x(?P<high>\d+))?(?:~(?P<seconds>\d+))?(?P<flags>[?*+]*)"
)
_DESCRIPTIONS: Final = {
    "imageUrl": "Link to an image.",
    "videoUrl": "Link to a video.",
    "audioUrl": "Link to a sound file.",
    "documentUrl": "Link to a document.",
    "text": "Plain text.",
}


@dataclass(frozen=True, slots=True)
class SimulatedPort:
    """One input or output of a technique."""

    id: str
    type: str
    aspect_ratio: str | None = None
    duration: int | None = None
    optional: bool = False
    several: bool = False
    element: bool = False

    @property
    def accepts(self) -> str:
        """The type under which a start sends this input.

        A start has only text, images and videos; a link to a sound or a document is sent as text.
        """
        return self.type if self.type in ("imageUrl", "videoUrl") else "text"

    def definition(self) -> dict[str, Any]:
        """The input or output as `GET /techniques/{id}` shows it."""
        shown: dict[str, Any] = {
            "id": self.id,
            "name": self.id.replace("_", " ").capitalize(),
            "type": self.type,
            "description": _DESCRIPTIONS[self.type],
        }
        if self.aspect_ratio is not None:
            shown["specified_aspect_ratio"] = self.aspect_ratio
        if self.duration is not None:
            shown["specified_duration"] = self.duration
        flags = {
            "optional": self.optional,
            "allow_multiple": self.several,
            "accepts_element": self.element,
        }
        return shown | {name: True for name, is_set in flags.items() if is_set}

    def sample(self) -> dict[str, str]:
        """A value that a start accepts for this input."""
        link = f"https://example.com/sample.{EXTENSIONS.get(self.type)}"
        value = "A lighthouse at dusk" if self.type == "text" else link
        return {"id": self.id, "type": self.accepts, "value": value}


@dataclass(frozen=True, slots=True)
class SimulatedTechnique:
    """A technique of the catalogue. `run_cost` is USD for each completed run."""

    technique_id: str
    name: str
    description: str
    run_cost: float
    inputs: tuple[SimulatedPort, ...]
    outputs: tuple[SimulatedPort, ...]

    @property
    def slug(self) -> str:
        """The short name by which a technique is also addressed."""
        return self.technique_id.removeprefix("tech_")

    def list_item(self) -> dict[str, Any]:
        """The technique as the list shows it: without inputs and outputs."""
        return {
            "technique_id": self.technique_id,
            "name": self.name,
            "description": self.description,
            "run_cost": self.run_cost,
            "inputs": [],
            "outputs": [],
        }

    def definition(self) -> dict[str, Any]:
        """The technique as it is shown alone: with inputs and outputs."""
        return self.list_item() | {
            "inputs": [port.definition() for port in self.inputs],
            "outputs": [port.definition() for port in self.outputs],
        }

    def sample_inputs(self) -> list[dict[str, str]]:
        """Inputs that a start accepts: every required one, or the first where none is required."""
        required = [port for port in self.inputs if not port.optional]
        return [port.sample() for port in required or self.inputs[:1]]


GENERATIONS: Final = {
    output.id: SimulatedTechnique("", output.id, "", price, (), (output,))
    for output, price in (
        (SimulatedPort("image", "imageUrl"), 0.04),
        (SimulatedPort("video", "videoUrl"), 0.5),
        (SimulatedPort("audio", "audioUrl"), 0.06),
        (SimulatedPort("text", "text"), 0.01),
    )
}
"""The output and the price of each type of generation, in the form of a technique."""


@cache
def load_catalogue() -> Mapping[str, SimulatedTechnique]:
    """All techniques by their `tech_…` identifier, in the catalogue's order."""
    with (resources.files("tracker.simulator") / "techniques.tsv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    techniques = [
        SimulatedTechnique(
            technique_id=f"tech_{row['slug']}",
            name=row["name"],
            description=row["description"],
            run_cost=float(row["run_cost"]),
            inputs=tuple(map(parse_port, row["inputs"].split())),
            outputs=tuple(map(parse_port, row["outputs"].split())),
        )
        for row in rows
    ]
    return MappingProxyType({technique.technique_id: technique for technique in techniques})


def parse_port(text: str) -> SimulatedPort:
    """The input or output that `text` describes. Raises `ValueError` where it describes none."""
    parts = _PORT.fullmatch(text)
    if parts is None or parts["type"] not in _DESCRIPTIONS:
        raise ValueError(f"the catalogue holds an input or output that cannot be read: {text}")
    return SimulatedPort(
        id=parts["id"],
        type=parts["type"],
        aspect_ratio=f"{parts['wide']}:{parts['high']}" if parts["wide"] else None,
        duration=int(parts["seconds"]) if parts["seconds"] else None,
        optional="?" in parts["flags"],
        several="*" in parts["flags"],
        element="+" in parts["flags"],
    )


def make_file(output_id: str, extension: str) -> bytes:
    """The file behind an output's link, made from the output's id, so that each is different."""
    return _FILES[extension](output_id.encode())


def _png(output_id: bytes, size: int = 96) -> bytes:
    """A square that runs from one colour to another."""
    seed = hashlib.sha256(output_id).digest()
    first, last = seed[:3], seed[3:6]
    steps = 2 * size - 2
    diagonals = b"".join(
        bytes(round(a + (b - a) * step / steps) for a, b in zip(first, last, strict=True))
        for step in range(steps + 1)
    )
    no_filter = b"\0"
    rows = b"".join(no_filter + diagonals[3 * y : 3 * (y + size)] for y in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _wav(output_id: bytes) -> bytes:
    """A quarter of a second of a square wave."""
    half_period = 8 + hashlib.sha256(output_id).digest()[0] % 24
    samples = bytes(160 if i // half_period % 2 else 96 for i in range(2000))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(8000)
        sound.writeframes(samples)
    return file.getvalue()


def _pdf(output_id: bytes) -> bytes:
    """One page that names its output."""
    text = b"BT /F1 12 Tf 20 60 Td (%s) Tj ET" % output_id
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


def _mp4(output_id: bytes) -> bytes:
    """A file type box and a data box of a few bytes: a container without a track."""
    kind = b"isom" + struct.pack(">I", 512) + b"isomiso2mp41"
    return b"".join(
        struct.pack(">I", 8 + len(data)) + name + data
        for name, data in ((b"ftyp", kind), (b"mdat", output_id))
    )


_FILES: Final = {"png": _png, "mp4": _mp4, "wav": _wav, "pdf": _pdf}
