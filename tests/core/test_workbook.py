"""Workbooks are read as Excel shows them, and none exhausts the machine."""

import io
import struct
import zipfile
from datetime import date, datetime, time, timedelta
from typing import Any

import openpyxl
import pytest

from tracker.starting.sheet import (
    Sheet,
    SheetFormat,
    problem_lines,
    read_sheet,
    read_workbook,
)


def saved(*sheets: tuple[str, list[list[Any]]], formats: dict[str, str] | None = None) -> bytes:
    """A workbook with these sheets; `formats` are number formats of cells of the first."""
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    for cell, number_format in (formats or {}).items():
        book.worksheets[0][cell].number_format = number_format
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def edited(data: bytes, part: str, old: bytes, new: bytes) -> bytes:
    """The workbook with a part of it replaced."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w", 8) as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, content.replace(old, new) if name == part else content)
    return file.getvalue()


def problem(sheet: Sheet) -> str:
    (line,) = problem_lines(sheet.problems)
    return line


def test_cells_are_the_texts_that_excel_shows() -> None:
    """Whole numbers have no fraction, article numbers keep their zeros, dates are ISO 8601, and a
    line is the row in Excel."""
    values = [17, 17.0, 0.1 + 0.2, 42, date(2026, 7, 1)]
    values += [datetime(2026, 7, 1, 9, 30), time(8, 5), timedelta(hours=30)]  # noqa: DTZ001
    values += [True, "=A1", " é\n"]
    names = [f"c{number}" for number in range(len(values))]
    data = saved(("Sheet", [[], names, [], values]), formats={"D4": "00000"})
    data = edited(data, "xl/worksheets/sheet1.xml", b"<f>A1</f><v />", b"<f>A1</f><v>5</v>")
    sheet = read_sheet(data)
    assert sheet.problems == ()
    assert (sheet.header, sheet.rows[0].line) == (2, 4)
    assert [value for (value,) in sheet.rows[0].cells.values()] == [
        *("17", "17", "0.3", "00042", "2026-07-01", "2026-07-01T09:30:00", "08:05:00", "30:00:00"),
        *("TRUE", "5", " é\n"),
    ]
    assert (sheet.detected, sheet.bom) == ("", True)


def test_the_first_visible_sheet_is_read_or_the_named_one() -> None:
    """Which of several was read is reported; an unknown or empty one names the others."""
    data = saved(("Notes", []), ("Products", [["prompt"], ["tea"]]), ("Old", [["prompt"], ["a"]]))
    hidden = edited(
        data,
        "xl/workbook.xml",
        b'name="Notes" sheetId="1" state="visible"',
        b'name="Notes" sheetId="1" state="hidden"',
    )
    sheet = read_sheet(hidden)
    assert sheet.detected == "sheet 'Products' of 2 sheets (Products, Old)"
    assert sheet.rows[0].cells == {"prompt": ("tea",)}
    assert read_sheet(data, sheet_name="Old").rows[0].cells == {"prompt": ("a",)}
    assert problem(read_sheet(data)) == (
        "the sheet 'Notes' is empty; --sheet reads another: Products, Old"
    )
    assert "it has Notes, Products, Old" in problem(read_sheet(data, sheet_name="products"))


def test_formulas_without_a_usable_result_are_named() -> None:
    """`#N/A` is a problem of its cell if that is an input; so is a formula that was never computed,
    in any column. An empty text is a result."""
    rows = [["prompt", "note"], ["#N/A", "=A1"], ["=A1", '=""'], ["tea", "=A1"]]
    data = edited(
        saved(("Sheet", rows)),
        "xl/worksheets/sheet1.xml",
        b'<c r="B3"><f>""</f><v /></c>',
        b'<c r="B3" t="str"><f>""</f><v></v></c>',
    )
    without = "is a formula without a result: open the workbook in Excel and save it"
    assert problem_lines(read_sheet(data).problems) == [
        f"2 lines, column 'note': {without} (lines 2 and 4)",
        "line 2, column 'prompt': is the error #N/A",
        f"line 3, column 'prompt': {without}",
    ]


@pytest.mark.parametrize("data", [b"PK\x03\x04", b"PK\x03\x04" + b"x" * 500])
def test_a_damaged_workbook_is_a_problem(data: bytes) -> None:
    """The problem says what to do; so does that of another file in place of a workbook."""
    options: dict[str, Any]
    assert problem(read_sheet(data)).endswith("save it as .xlsx or CSV")
    for options in ({"file_format": SheetFormat.XLSX}, {"sheet_name": "Products"}):
        assert problem(read_sheet(b"a,b", **options)).startswith("the file is no Excel workbook")


def test_a_workbook_cannot_exhaust_the_machine() -> None:
    """What it unpacks to, its rows and its cells are limited, whatever it claims."""
    small = saved(("Sheet", [["prompt"], ["tea"]]))
    part, end = "xl/worksheets/sheet1.xml", b"</sheetData>"
    far = b'<row r="99999999999"><c r="XFD99999999999"><v>1</v></c></row></sheetData>'
    assert "more than" in problem(read_sheet(edited(small, part, end, far)))
    wide = b'<row><c r="XFD1"><v>1</v></c></row>' * 400 + end
    assert "more than" in problem(read_sheet(edited(small, part, end, wide)))
    packed = edited(small, part, end, b" " * 100_000 + end)
    assert len(packed) < 20_000
    assert "is larger than 97.7 KiB" in problem(read_workbook(packed, most_unpacked=100_000))
    # A format that stands there once shows every number with as many zeros.
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for row in range(1, 200):
        sheet.cell(row, 1, 7).number_format = 1000 * "0"
    file = io.BytesIO()
    book.save(file)
    assert len(file.getvalue()) < 20_000
    assert "has more than 97.7 KiB of text" in problem(
        read_workbook(file.getvalue(), most_unpacked=100_000)
    )
    # A part that declares less than it holds is not read beyond that.
    size = len(zipfile.ZipFile(io.BytesIO(packed)).read(part))
    claims = packed.replace(struct.pack("<I", size), struct.pack("<I", 10))
    assert "no workbook that can be read" in problem(read_sheet(claims))
