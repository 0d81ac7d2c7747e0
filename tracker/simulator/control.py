"""The simulator's own routes: true records, counted requests, faults, and the media files.

A media file is made from its output's identifier, so that each is different.
"""

import hashlib
import io
import struct
import wave
import zlib
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Final
from weakref import finalize

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tracker.simulator.faults import ErrorAnswer
from tracker.simulator.option_types import Number
from tracker.simulator.options import SECRETS, fault_of
from tracker.simulator.starts import parse_body
from tracker.simulator.world import World

_NUMBER: Final = TypeAdapter[float](Number)


class ControlRoutes:
    """Routes that FLORA does not have, without a key."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._files: Path | None = None

    def routes(self) -> list[Route]:
        """All routes, from the root."""
        return [
            Route("/simulator/runs", self.runs, methods=["GET"]),
            Route("/simulator/requests", self.requests, methods=["GET"]),
            Route("/simulator/deliveries", self.deliveries, methods=["GET"]),
            Route("/simulator/faults", self.faults, methods=["GET"]),
            Route("/simulator/faults", self.change_faults, methods=["POST"]),
            Route("/simulator/bills", self.bills, methods=["GET"]),
            Route("/simulator/colleague", self.colleague, methods=["POST"]),
            Route("/simulator/deletions", self.delete, methods=["POST"]),
            Route("/media/{name}", self.media, methods=["GET"]),
        ]

    async def runs(self, request: Request) -> Response:
        """Every run's true record, oldest first."""
        return JSONResponse({"runs": self._world.records()})

    async def requests(self, request: Request) -> Response:
        """How often each route gave each status; 0 stands for a cut connection."""
        counts = sorted(self._world.counts.items())
        return JSONResponse(
            {
                "total": self._world.counts.total(),
                "requests": [
                    {"route": route, "status": status, "count": count}
                    for (route, status), count in counts
                ],
            }
        )

    async def deliveries(self, request: Request) -> Response:
        """Every attempt at a callback, oldest first."""
        return JSONResponse({"deliveries": [asdict(sent) for sent in self._world.deliveries]})

    async def bills(self, request: Request) -> Response:
        """The true cost of every run, and the cost that reads show now, oldest first."""
        return JSONResponse({"bills": self._world.bills()})

    async def colleague(self, request: Request) -> Response:
        """Starts `{"technique": …, "count"?: 1}` as another program, without callback."""
        body = parse_body(await request.body())
        try:
            wanted = self._world.sample_request(str(body.get("technique")))
            count = int(body.get("count", 1))
        except (LookupError, TypeError, ValueError) as exc:
            raise ErrorAnswer.invalid(("technique", str(exc))) from None
        runs = [self._world.start(wanted, colleague=True) for _ in range(count)]
        return JSONResponse({"run_ids": [run.run_id for run in runs]})

    async def delete(self, request: Request) -> Response:
        """Deletes runs at FLORA: `{"run_ids": [...]}`."""
        run_ids = parse_body(await request.body()).get("run_ids")
        if not isinstance(run_ids, list) or not all(isinstance(one, str) for one in run_ids):
            raise ErrorAnswer.invalid(("run_ids", "must be a list of identifiers"))
        self._world.delete(run_ids)
        return JSONResponse({"deleted": sorted(self._world.deleted)})

    async def faults(self, request: Request) -> Response:
        """The present options that may be changed, without secrets."""
        shown = self._world.options.changeable
        return JSONResponse({name: shown[name] for name in shown if name not in SECRETS})

    async def change_faults(self, request: Request) -> Response:
        """Sets new values, `{"drop": 0.4, "errors": "10%"}`, and answers with the present options.

        `?after=60` changes them 60 seconds later, `?seconds=30` for 30 seconds, both by the
        simulator's clock.
        """
        query = request.query_params
        changes = parse_body(await request.body())
        try:
            after, lasting = (
                _NUMBER.validate_python(query.get(name, "0")) for name in ("after", "seconds")
            )
            self._world.change(changes, after=after, seconds=lasting or None)
        except ValueError as exc:
            name, _, reason = fault_of(exc).partition(": ")
            raise ErrorAnswer.invalid((name, reason or name)) from None
        return await self.faults(request)

    async def media(self, request: Request) -> Response:
        """The file behind an output's link, whole or the requested range."""
        name = request.path_params["name"]
        if name not in self._world.media_files:
            raise ErrorAnswer.not_found("output")
        output_id, _, extension = name.partition(".")
        content_type, make = _MEDIA[extension]
        file = self._directory() / name
        if not file.exists():
            file.write_bytes(make(output_id.encode()))
        return FileResponse(file, media_type=content_type)

    def close(self) -> None:
        if self._files is not None:
            rmtree(self._files, ignore_errors=True)

    def _directory(self) -> Path:
        if self._files is None:
            self._files = Path(mkdtemp(prefix="flora-simulator-"))
            # Also without `close`: when this object is collected, or the process ends.
            finalize(self, rmtree, self._files, ignore_errors=True)
        return self._files


def _png(output_id: bytes, size: int = 96) -> bytes:
    """A square that runs from one colour to another."""
    seed = hashlib.sha256(output_id).digest()
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


_MEDIA: Final = {
    "png": ("image/png", _png),
    "mp4": ("video/mp4", _mp4),
    "wav": ("audio/wav", _wav),
    "pdf": ("application/pdf", _pdf),
}
"""For each ending of a link, the content type and what makes the content from the output's id."""
