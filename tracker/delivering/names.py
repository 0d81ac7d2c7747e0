"""Names of files: safe on every file system, stable on repetition, in the order of the sheet.

The outputs of a batch are named by the row's number, or its cell of a column, and the output:
`001_icon_1`, `SKU-0001_icon_1`. Those of single runs are named by the identifiers of both.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Final

from tracker.core.errors import InvalidRequest
from tracker.core.inputs import Port
from tracker.core.run import OUTPUT_KINDS, Output
from tracker.starting.batches.rows import RowState
from tracker.store.queries.batches import BatchRow

LONGEST_PART: Final = 60
"""Characters. With four parts, an ending and `.part.json` a file name stays below 255 bytes."""
_LONGEST_READABLE: Final = 100
"""Bytes of a cell, or of the name of an output."""
_HARMLESS: Final = re.compile(r"[A-Za-z0-9_-]+")
_OTHER: Final = re.compile(r"[^A-Za-z0-9_-]+")
_UNREADABLE: Final = re.compile(r"[^\w.-]+")
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\.", re.IGNORECASE | re.ASCII)
"""Begins a name that Windows takes for a device."""


def row_numbers(rows: Sequence[RowState]) -> list[str]:
    """The number of each row in the sheet, with leading zeros, so that they sort."""
    width = max(3, len(str(max((row.entry.position for row in rows), default=0))))
    return [f"{row.entry.position:0{width}}" for row in rows]


def row_names(batch: BatchRow, rows: Sequence[RowState], name_by: str) -> list[str]:
    """A different name for each row of a batch: its cell in the column `name_by`.

    A row whose cell is empty or repeated gets its number, too. Raises `InvalidRequest` for an
    unknown column.
    """
    column, input_id = naming_column(batch, name_by)
    numbers = row_numbers(rows)
    parts = []
    for row in rows:
        values = [one["value"] for one in row.inputs or () if one["id"] == input_id]
        parts.append(_readable("_".join(values) if input_id else row.entry.carried.get(column, "")))
    counts = Counter(map(str.casefold, parts))
    taken = {part for part, count in counts.items() if count == 1}
    names = []
    for part, number in zip(parts, numbers, strict=True):
        if not part or counts[part.casefold()] > 1:
            part = f"{part}_{number}".strip("_")
            while part.casefold() in taken:
                part += f"_{number}"
            taken.add(part.casefold())
        names.append(part)
    return names


def naming_column(batch: BatchRow, name_by: str) -> tuple[str, str | None]:
    """The column of that name, in any case, and the input that it is, if any.

    Raises `InvalidRequest` for an unknown one.
    """
    columns: dict[str, str | None] = dict.fromkeys(batch.columns or ())
    columns |= {column: input_id for input_id, column, _ in batch.mapping or ()}
    found = [one for one in columns if one.casefold() == name_by.casefold()]
    column = name_by if name_by in columns else found[0] if len(found) == 1 else None
    if column is None:
        raise InvalidRequest(
            f"the sheet has no column {name_by!r} to name files by; it has {', '.join(columns)}"
        )
    return column, columns[column]


def output_names(outputs: Sequence[Output], ports: Sequence[Port]) -> list[str]:
    """A name for each output of a run: what it is, and its number in FLORA's order: `icon_1`.

    What it is comes from the technique's definition (`ports`) where that has an output for each,
    else from the type.
    """
    fits = len(ports) == len(outputs) and all(
        port.type in ("", output.type) for port, output in zip(ports, outputs, strict=True)
    )
    width = len(str(len(outputs)))
    words = [_word(port) for port in ports] if fits else [""] * len(outputs)
    return [
        f"{word or OUTPUT_KINDS.get(one.type, 'output')}_{number:0{width}}"
        for number, (word, one) in enumerate(zip(words, outputs, strict=True), start=1)
    ]


def _word(port: Port) -> str:
    """The id of an output without its number, or else its name; an id that has digits within is
    not made for people."""
    for text in (port.id, port.name):
        word = _readable(text.rstrip("0123456789"))
        if word and not any(map(str.isdigit, word)):
            return word
    return ""


def _readable(text: str) -> str:
    """`text` as part of a name, with letters of any script; empty if nothing can be kept."""
    kept = _UNREADABLE.sub("_", unicodedata.normalize("NFC", text)).strip("._-")
    if _DEVICE.match(kept):
        kept = kept.replace(".", "_", 1)
    return kept.encode()[:_LONGEST_READABLE].decode(errors="ignore").rstrip("._-")


def file_stem(*identifiers: str) -> str:
    """A file name without its ending: safe, readable, and different for different identifiers.

    Where characters are replaced or cut off, a piece of the identifier's digest is added.
    """
    return ".".join(map(_name_part, identifiers))


def _name_part(text: str) -> str:
    """`text` as one part of a name: never empty, without dots, slashes or a leading dash."""
    if len(text) <= LONGEST_PART and _HARMLESS.fullmatch(text) and not text.startswith("-"):
        return text
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    kept = _OTHER.sub("_", text).strip("_-")[: LONGEST_PART - len(digest) - 1]
    return f"{kept}-{digest}" if kept else digest
