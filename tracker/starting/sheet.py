"""Sheets: CSV, JSON lines or a workbook become rows of cells, or a list of all problems.

Reading does not stop at the first problem: each is noted with its line, and the caller decides.
Delimiter and encoding of CSV are detected unless they are given.
"""

import csv
import io
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time, timedelta
from enum import StrEnum
from itertools import islice
from typing import Any, Final

from tracker.core.errors import TrackerError
from tracker.core.formatting import counted, line_numbers, size

Values = tuple[str, ...]
"""One cell: one text, or several if a JSON line has a list."""

DELIMITERS: Final = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
"""The delimiters that are detected, and their names."""

MOST_FIELDS: Final = 1_000
"""Different fields of JSON objects; each is a column of the results."""
_SAMPLE: Final = 50
"""Records whose width is compared with the header's to detect the delimiter."""
_FOREIGN: Final = {
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook (.xls) or has a password: save it as .xlsx",
    b"%PDF": "is a PDF: save the sheet as .xlsx or CSV",
    b"<": "is HTML or XML: open it in Excel and save it as .xlsx",
}
_EXACT: Final = 2**53
_INEXACT: Final = "is no number that can be kept exactly: write it as a text"
_WORKBOOK: Final = b"PK\x03\x04"
_UNFIT: Final = re.compile(r"[\x00\ud800-\udfff]")
_UTF8: Final = re.compile(r"[^\x00-\x7f\udc80-\udcff]")


class SheetFormat(StrEnum):
    """The format of a file of rows."""

    CSV = "csv"
    JSONL = "jsonl"
    XLSX = "xlsx"


@dataclass(frozen=True, slots=True, order=True)
class SheetProblem:
    """A problem of a sheet. Lines count from 1; 0 is the whole sheet, an empty `column` the whole
    line. `of_input` is a problem only if the column is an input."""

    line: int
    column: str
    message: str
    of_input: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return _located([self.line], self.column, self.message)

    @property
    def of_fields(self) -> str:
        """The message for rows that are objects: their fields are mapped without an option."""
        message, option, _ = self.message.partition("; use --map")
        more = "; name a field like the input, or map one in `columns`" if option else ""
        return message + more


def problem_lines(problems: Iterable[SheetProblem]) -> list[str]:
    """One line for each cause: how many lines of the sheet have it, and which."""
    causes: dict[tuple[str, str], list[int]] = {}
    for one in sorted(problems):
        causes.setdefault((one.column, one.message), []).append(one.line)
    return [_located(lines, *cause) for cause, lines in causes.items()]


def _located(lines: Sequence[int], column: str, message: str) -> str:
    several = len(lines) > 1
    line = counted(len(lines), "line") if several else f"line {lines[0]}" if lines[0] else ""
    where = ", ".join(filter(None, (line, f"column {column!r}" if column else "")))
    which = f" ({line_numbers(lines)})" if several else ""
    return f"{where}: {message}{which}" if where else message


class SheetRefused(TrackerError):
    """The sheet has `problems`, by line; nothing was started."""

    def __init__(self, problems: Iterable[SheetProblem]) -> None:
        self.problems = tuple(sorted(problems))
        found = counted(len(self.problems), "problem")
        super().__init__(f"{found} in the sheet; nothing was started")


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetRow:
    """One row, without its empty cells."""

    line: int
    cells: dict[str, Values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A sheet. `header` is the line of the names, 0 if each row names its own cells.

    `columns` have different names: the second of one name gets a number, and `repeated` holds the
    name. `detected` says how the file was read where that is not the default. `delimiter` and
    `bom` are how to write results for the program that wrote the sheet.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[SheetRow, ...] = ()
    problems: tuple[SheetProblem, ...] = ()
    header: int = 0
    repeated: frozenset[str] = frozenset()
    detected: str = ""
    delimiter: str = ","
    bom: bool = False


def read_sheet(
    data: bytes,
    *,
    file_format: SheetFormat | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    sheet_name: str | None = None,
) -> Sheet:
    """A sheet from the bytes of a file: a workbook by its content, else CSV unless `file_format`
    says otherwise.

    `sheet_name` is the workbook's sheet, instead of the first. Raises `LookupError` for an unknown
    `encoding`.
    """
    if data.startswith(_WORKBOOK) and file_format in (None, SheetFormat.XLSX):
        return read_workbook(data, sheet_name)
    if file_format is SheetFormat.XLSX or sheet_name is not None:
        return refused("the file is no Excel workbook (.xlsx)")
    if file_format is SheetFormat.JSONL:
        return read_jsonl(data, encoding=encoding)
    return read_csv(data, delimiter=delimiter, encoding=encoding)


def read_csv(data: bytes, *, delimiter: str | None = None, encoding: str | None = None) -> Sheet:
    """A sheet from CSV; the first line names the columns."""
    text, encoding_found = _decoded(data, encoding)
    if isinstance(text, Sheet):
        return text
    detected = [encoding_found] if encoding_found else []
    hint = re.match(r"sep=([,;\t|])\r?\n", text)  # Excel's own first line
    if delimiter is None:
        delimiter = hint[1] if hint else _detected_delimiter(text)
        if delimiter != ",":
            detected.insert(0, f"delimiter {DELIMITERS.get(delimiter, repr(delimiter))}")
    problems: list[SheetProblem] = []
    records = _records(text, delimiter, problems)
    if hint:
        next(records, None)
    return sheet_of(
        records,
        problems,
        detected=", ".join(detected),
        delimiter=delimiter,
        bom=not data.isascii() and (bool(encoding_found) or data.startswith(b"\xef\xbb\xbf")),
    )


def sheet_of(
    records: Iterable[tuple[int, list[str]]], problems: list[SheetProblem], **facts: Any
) -> Sheet:
    """A sheet of records, each with its line; the first names the columns. `facts` are further
    fields of the sheet."""
    remaining = iter(records)
    header, titles = next(remaining, (1, []))
    found = list(remaining)
    titles = [title.strip() for title in titles]
    if not titles and not problems:
        problems.append(SheetProblem(1, "", "the sheet is empty: its first line names the columns"))
    filled = {n for _, values in found for n, value in enumerate(values) if value.strip()}
    # Cells beyond the header are kept, too: they may be the names, below a title.
    beyond = [""] * (max(filled, default=0) + 1 - len(titles))
    columns = _distinct_names([*titles, *beyond], filled)
    wider = f"the line has more cells than the header, which has {len(titles)}"
    rows = []
    for line, values in found:
        if any(value.strip() for value in values[len(titles) :]):
            problems.append(SheetProblem(line, "", wider))
        elif [value.strip() for value in values[: len(titles)]] == titles:
            problems.append(SheetProblem(line, "", "the line repeats the header: delete it"))
        cells: dict[str, Values] = {}
        for name, value in zip(columns, values, strict=False):
            if not value.strip():
                continue
            if (unfit := _unfit(value)) is not None:
                problems.append(SheetProblem(line, name, unfit))
            cells[name] = (value,)
        rows.append(SheetRow(line=line, cells=cells))
    return Sheet(
        columns=tuple(filter(None, columns[: len(titles)])),
        rows=tuple(rows),
        problems=tuple(sorted(problems)),
        header=header,
        repeated=frozenset(name for name, count in Counter(titles).items() if name and count > 1),
        **facts,
    )


def _distinct_names(titles: Sequence[str], filled: set[int]) -> list[str]:
    """A name for each column: a number is added to the second of one name, and a column without
    title that has cells is `column 3`."""
    names: list[str] = []
    for position, title in enumerate(titles):
        name, number = title or (f"column {position + 1}" if position in filled else ""), 2
        while name and name in names:
            name, number = f"{title} ({number})", number + 1
        names.append(name)
    return names


def read_jsonl(data: bytes, *, encoding: str | None = None) -> Sheet:
    """A sheet from JSON lines: objects whose values are texts, numbers, or lists of these."""
    whole, detected = _decoded(data, encoding)
    if isinstance(whole, Sheet):
        return whole
    problems: list[SheetProblem] = []

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, text in enumerate(whole.split("\n"), start=1):
            if not text.strip():
                continue
            try:
                # Numbers stay as they are written.
                found = json.loads(text, object_pairs_hook=_once, parse_float=str, parse_int=str)
                if isinstance(found, dict):
                    yield line, found
                    continue
                message = "the line is not a JSON object"
            except json.JSONDecodeError as error:
                message = f"the line is not JSON: {error.msg}"
            except ValueError as error:
                message = str(error)
            except RecursionError:
                message = "the line is nested too deeply"
            problems.append(SheetProblem(line, "", message))

    return sheet_of_objects(objects(), problems, detected=detected)


def sheet_of_objects(
    objects: Iterable[tuple[int, dict[str, Any]]],
    problems: list[SheetProblem] | None = None,
    detected: str = "",
) -> Sheet:
    """A sheet of JSON objects, each with its line; their fields are its columns."""
    problems = [] if problems is None else problems
    columns: dict[str, None] = {}
    rows = []
    for line, found in objects:
        cells: dict[str, Values] = {}
        for name, value in found.items():
            columns.setdefault(name)
            values = _json_values(value, SheetProblem(line, name, ""), problems)
            if values:
                cells[name] = values
        rows.append(SheetRow(line=line, cells=cells))
    if len(columns) > MOST_FIELDS:
        message = f"the rows have {len(columns)} different fields; {MOST_FIELDS} are possible"
        return refused(message)
    return Sheet(
        columns=tuple(columns), rows=tuple(rows), problems=tuple(problems), detected=detected
    )


def refused(message: str) -> Sheet:
    """The sheet of a file that cannot be read at all."""
    return Sheet(problems=(SheetProblem(0, "", message),))


def _decoded(data: bytes, encoding: str | None) -> tuple[str | Sheet, str]:
    """The text of a file, or a sheet with the problem; and the encoding, if it was detected and is
    not UTF-8."""
    for mark, message in ({} if encoding else _FOREIGN).items():
        if data.startswith(mark):
            return refused(f"the file {message}"), ""
    if data.startswith(_WORKBOOK):
        return refused("the file is a workbook, not text: leave out --format"), ""
    detected = ""
    if encoding is None and (encoding := _utf16(data)) is not None:
        detected = "encoding UTF-16"
    if encoding is None:
        text = data.decode("utf-8-sig", errors="surrogateescape")
        if not text.isascii() and (legacy := _cp1252(data, text)) is not None:
            return legacy, f"encoding cp1252 (Windows), as in {_sample(legacy)!r}"
        # Bytes that are not UTF-8 are reported with their cell.
        return text, ""
    try:
        return data.decode(encoding).removeprefix("\ufeff"), detected
    except UnicodeError as error:
        before = data[: getattr(error, "start", 0)]
        line = before.decode(encoding, errors="replace").count("\n") + 1
        problem = SheetProblem(line, "", f"is not {encoding}: use another --encoding")
        return Sheet(problems=(problem,)), ""


def _utf16(data: bytes) -> str | None:
    """The form of UTF-16 that a file is in, with its mark or without; `None` if it is in none."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    for encoding, first in (("utf-16-le", 1), ("utf-16-be", 0)):
        if len(data) > 1 and not data[first:40:2].strip(b"\0"):
            return encoding
    return None


def _cp1252(data: bytes, text: str) -> str | None:
    """The file in cp1252, which Excel writes on Windows; `None` if it is UTF-8.

    `text` is the file in UTF-8 with surrogates for other bytes. One character of UTF-8 decides for
    it: such a file is damaged, and cp1252 would start paid runs with mangled texts. So would it for
    other scripts, in which most characters beyond ASCII have two such neighbours.
    """
    if _UTF8.search(text):
        return None
    try:
        found = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    beyond = len(re.findall(r"[^\x00-\x7f]", found))
    return None if 4 * sum(map(len, re.findall(r"[^\x00-\x7f]{3,}", found))) > beyond else found


def _sample(text: str) -> str:
    """The first words of a file that hold a character beyond ASCII, to be checked by a person."""
    found = re.search(r"[\w .'-]{0,12}[^\x00-\x7f][\w .'-]{0,12}", text)
    return found[0].strip() if found else ""


def _detected_delimiter(text: str) -> str:
    """The delimiter that cuts the header into several cells, and most other lines into as many."""

    def score(delimiter: str) -> tuple[float, int]:
        records = _records(text, delimiter, [])
        widths = [len(values) for _, values in islice(records, _SAMPLE)]
        if not widths or widths[0] < 2:
            return 0.0, 0
        return sum(width == widths[0] for width in widths) / len(widths), widths[0]

    return max(DELIMITERS, key=score)


def _records(
    text: str, delimiter: str, problems: list[SheetProblem]
) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            # The rest cannot be parsed: an open quote includes all of it.
            problems.append(SheetProblem(line, "", f"the line is not CSV: {error}"))
            return
        if values is None:
            return
        if any(value.strip() for value in values):
            yield line, values


def _json_values(value: Any, at: SheetProblem, problems: list[SheetProblem]) -> Values:
    """The texts of a JSON value; its problem is added to `problems`."""
    texts = []
    for one in value if isinstance(value, list) else [value]:
        if one is None:
            continue
        if isinstance(one, dict | list):
            kind = "an object" if isinstance(one, dict) else "a list in a list"
            problems.append(replace(at, message=f"must be text, not {kind}", of_input=True))
        if isinstance(one, float) and not abs(one) < _EXACT:
            problems.append(replace(at, message=_INEXACT))
        try:
            text = one if isinstance(one, str) else json.dumps(one)
        except RecursionError:
            problems.append(replace(at, message="is nested too deeply"))
            continue
        if (unfit := _unfit(text)) is not None:
            problems.append(replace(at, message=unfit))
        if text.strip():
            texts.append(text)
    return tuple(texts)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises `ValueError` if a name occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice in one object")
    return found


def _unfit(text: str) -> str | None:
    """Why a text cannot be sent or stored."""
    found = set(_UNFIT.findall(text))
    if not found:
        return None
    if "\0" in found:
        return "contains a NUL character"
    if any("\udc80" <= letter <= "\udcff" for letter in found):
        return "is not UTF-8: save the sheet as UTF-8, or use --encoding"
    return "holds half a character (a lone surrogate)"


# Excel workbooks (`.xlsx`).
#
# openpyxl streams the cells of one sheet. A workbook comes from anywhere, so what is unpacked, the
# number of cells and their text are limited: a text or a format that stands there once may be that
# of every cell.

MOST_UNPACKED: Final = 256 * 1024**2
"""Bytes of all parts of a workbook, unpacked, and characters of all cells that are read."""
MOST_CELLS: Final = 5_000_000
"""Empty cells between others count, too."""
MOST_ROWS: Final = 1_048_576
"""Rows of a sheet in Excel."""


class _TooLarge(Exception):
    """The sheet has more rows, cells or text than are read."""


def read_workbook(
    data: bytes, sheet_name: str | None = None, *, most_unpacked: int = MOST_UNPACKED
) -> Sheet:
    """The rows of a workbook's first visible sheet, or the one of that name.

    A cell is its value as text: whole numbers without a fraction, dates in ISO 8601, formulas their
    stored results.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # No part unpacks to more than it declares: zipfile stops there.
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > most_unpacked:
            return refused(f"the workbook is larger than {size(most_unpacked)}: export it as CSV")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # extensions of Excel that do not concern cells
            return _first_sheet(data, sheet_name, most_unpacked)
    except _TooLarge as error:
        return refused(str(error))
    except Exception as error:  # openpyxl lets the errors of each parser through
        why = f"{type(error).__name__}: {error}".strip(": ")
        return refused(f"the file is no workbook that can be read ({why}): save it as .xlsx or CSV")


def _first_sheet(data: bytes, sheet_name: str | None, most_text: int) -> Sheet:
    import openpyxl  # noqa: PLC0415 - few sheets are workbooks

    # Of a formula one shows the result, the other that there is one.
    book, formulas = (
        openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=results)
        for results in (True, False)
    )
    sheets = {one.title: one for one in book.worksheets if one.sheet_state == "visible"}
    sheets = sheets or {one.title: one for one in book.worksheets}
    names = ", ".join(sheets)
    if sheet_name is not None and sheet_name not in book.sheetnames:
        return refused(f"the workbook has no sheet {sheet_name!r}; it has {names}")
    title = sheet_name or next(iter(sheets), "")
    problems: list[SheetProblem] = []
    detected = ""
    if len(sheets) > 1 and sheet_name is None:
        detected = f"sheet {title!r} of {counted(len(sheets), 'sheet')} ({names})"
    records = _filled_rows(book[title], formulas[title], problems, most_text)
    found = sheet_of(records, problems, detected=detected, bom=True)
    if not found.columns and len(problems) == 1:
        others = ", ".join(name for name in sheets if name != title)
        another = f"; --sheet reads another: {others}" if others else ""
        return refused(f"the sheet {title!r} is empty{another}")
    return found


def _filled_rows(
    sheet: Any, formulas: Any, problems: list[SheetProblem], most_text: int
) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, with its number."""
    titles: list[str] = []
    cells = text = 0
    for one in (sheet, formulas):
        one.reset_dimensions()  # other programs write wrong ones
    rows = zip(sheet.iter_rows(), formulas.iter_rows(), strict=True)
    for line, (row, formula_row) in enumerate(rows, start=1):
        cells += len(row)
        if line > MOST_ROWS or cells > MOST_CELLS:
            raise _TooLarge(
                f"the sheet {sheet.title!r} has more than {MOST_ROWS:,} rows or {MOST_CELLS:,} "
                "cells: delete those that are empty"
            )
        values = [_cell_text(cell) for cell in row]
        text += sum(map(len, values))
        if text > most_text:
            raise _TooLarge(
                f"the sheet {sheet.title!r} has more than {size(most_text)} of text: delete what "
                "is not needed"
            )
        titles = titles or (values if any(value.strip() for value in values) else [])
        for title, cell, formula in zip(titles, row, formula_row, strict=False):
            if cell.data_type == "e":
                message = f"is the error {cell.value}"
                problems.append(SheetProblem(line, title.strip(), message, of_input=True))
            elif formula.data_type == "f" and cell.value is None and cell.data_type == "n":
                message = "is a formula without a result: open the workbook in Excel and save it"
                problems.append(SheetProblem(line, title.strip(), message))
        if any(value.strip() for value in values):
            yield line, values


def _cell_text(cell: Any) -> str:
    value = cell.value
    match value:
        case None:
            return ""
        case bool():
            return str(value).upper()
        case int():
            # 17 in the format 00000 is an article number with its zeros.
            zeros = cell.number_format
            return f"{value:0{len(zeros)}}" if zeros and not zeros.strip("0") else str(value)
        case float():
            return str(int(value)) if value.is_integer() else f"{value:.15g}"
        case datetime() if value.time() == time():
            return value.date().isoformat()
        case datetime() | time():
            return value.isoformat(timespec="seconds")
        case date():
            return value.isoformat()
        case timedelta():
            minutes, seconds = divmod(round(value.total_seconds()), 60)
            return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    return str(value)
