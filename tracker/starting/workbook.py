"""Excel workbooks (`.xlsx`) become sheets.

openpyxl streams the cells of one sheet. A workbook comes from anywhere, so what is unpacked, the
number of cells and their text are limited: a text or a format that stands there once may be that of
every cell.
"""

import io
import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from typing import Any, Final

import openpyxl

from tracker.core.formatting import counted, size
from tracker.starting.sheet import Sheet, SheetProblem, refused, sheet_of

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
            return _read(data, sheet_name, most_unpacked)
    except _TooLarge as error:
        return refused(str(error))
    except Exception as error:  # openpyxl lets the errors of each parser through
        why = f"{type(error).__name__}: {error}".strip(": ")
        return refused(f"the file is no workbook that can be read ({why}): save it as .xlsx or CSV")


def _read(data: bytes, sheet_name: str | None, most_text: int) -> Sheet:
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
    records = _records(book[title], formulas[title], problems, most_text)
    found = sheet_of(records, problems, detected=detected, bom=True)
    if not found.columns and len(problems) == 1:
        others = ", ".join(name for name in sheets if name != title)
        another = f"; --sheet reads another: {others}" if others else ""
        return refused(f"the sheet {title!r} is empty{another}")
    return found


def _records(
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
        values = [_text(cell) for cell in row]
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


def _text(cell: Any) -> str:
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
